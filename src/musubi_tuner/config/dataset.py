"""The dataset TOML: `[general]` defaults, `[[datasets]]`, `[[validation_datasets]]`."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from musubi_tuner.config.names import DATASET_KEYS
from musubi_tuner.config.validation import (
    AnyPath,
    Count,
    FrameRate,
    Frames,
    Share,
    Wording,
    multiple_of_32,
    nearest,
    options,
    validated,
)
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_toml, real_path

_SOURCES: dict[str, tuple[Literal["video", "image", "audio"], bool]] = {
    "video_directory": ("video", True),
    "image_directory": ("image", True),
    "audio_directory": ("audio", True),
    "video_jsonl_file": ("video", False),
    "image_jsonl_file": ("image", False),
    "audio_jsonl_file": ("audio", False),
}
_FITTING = {
    "reference_directory": ("video", "image"),
    "mask_directory": ("video", "image"),
    "reference_audio_directory": ("video", "audio"),
    "separate_audio_directory": ("video",),
    "flip_x": ("video", "image"),
    "keyframes": ("video",),
}
"""Kinds of datasets that these keys are for."""
_LENGTHS = ("target_frames", "target_seconds")
_NO_PLAN = (
    "batch_size",
    "num_repeats",
    "video_loss_weight",
    "audio_loss_weight",
    "preserve_base",
    "caption_dropout_rate",
    "label",
    "cache_directory",
)


def _width_and_height(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2 or any(type(side) is not int for side in value):
        raise ValueError("must be [width, height] in pixels")
    for name, side in zip(("width", "height"), value, strict=True):
        try:
            multiple_of_32(side)
        except ValueError as error:
            raise ValueError(f"{name} {side} {error}") from error
    return tuple(value)


_FrameCounts = Annotated[
    tuple[Frames, ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list | tuple) else (value,)),
    AfterValidator(lambda counts: tuple(sorted(set(counts)))),
]


def _keyframe(place: Any) -> Any:
    known = type(place) is int and 0 <= place < 10**9 or isinstance(place, str) and re.fullmatch("first|last|every [1-9][0-9]{0,8}", place)
    if not known:
        raise ValueError('must be a list of "first", "last", numbers of frames from 0 on, and "every N"')
    return place


_Keyframes = Annotated[
    tuple[int | str, ...],
    BeforeValidator(lambda value: tuple(map(_keyframe, value if isinstance(value, list | tuple) else (value,)))),
]

_Weight = Annotated[float, Field(ge=0, le=1e6)]
CaptionExtension = Annotated[
    str, Field(pattern=r"^\.[^/\\\x00]*[^/\\\x00.]$", max_length=64), Wording("an ending that begins with a dot, such as '.txt'")
]


@options
class GeneralSettings:
    """What `[general]` may hold, and every dataset."""

    caption_extension: CaptionExtension = ".txt"
    resolution: Annotated[tuple[int, int], BeforeValidator(_width_and_height)] = (768, 512)
    """(width, height): the area that buckets keep, or the exact size where buckets are off."""
    batch_size: Count = 1
    num_repeats: Annotated[int, Field(ge=1, le=10_000)] = 1
    enable_bucket: bool = True
    bucket_no_upscale: bool = False
    target_frames: _FrameCounts = ()
    target_seconds: Annotated[float, Field(ge=0.001, le=86_400)] | None = None
    frame_extraction: Literal["head", "chunk", "slide", "uniform", "full"] = "head"
    frame_stride: Count = 8
    """slide: frames from one window's start to the next one's."""
    frame_sample: Annotated[int, Field(ge=1, le=10_000)] = 1
    """uniform: number of windows."""
    max_frames: Count = 129
    """full: longest window."""
    source_fps: FrameRate | None = None
    """Rate to assume of sources whose own is wrong."""
    target_fps: FrameRate | None = None
    """Rate to resample to by timestamp; None keeps each clip's own."""
    video_loss_weight: _Weight | None = None
    audio_loss_weight: _Weight | None = None
    caption_dropout_rate: Share | None = None
    preserve_base: bool = False
    """Its items keep what the base model makes of them, in place of learning their content."""
    supervise_silence: bool = False
    """Digital silence is learned as sound; otherwise such a clip counts as one without sound."""
    flip_x: Annotated[bool | Literal["force"], Wording('true, false, or "force" (captions with left or right too)')] = False
    """Mirror images as further clips: of sources whose captions do not tell left from right, or `force`: of all."""
    keyframes: _Keyframes = ()
    """Frames of each clip that are cached as keyframes, of which training chooses: `first`, `last`, numbers from 0 on, `every N`."""
    reference_downscale: Count = 1
    """How many times smaller than the clips their references are cached."""
    reference_temporal_scale: Count = 1
    """How many frames of the clips one frame of their references stands for."""


@options
class _Companions(GeneralSettings):
    """Folders of files that belong to the sources, by stem."""

    reference_directory: AnyPath | None = None
    """References by the stems of the sources; a jsonl names them by `reference_path`."""
    reference_audio_directory: AnyPath | None = None
    """Sounds that are played beside the sources' own; in a jsonl `reference_audio_path`."""
    mask_directory: AnyPath | None = None
    """Masks by the stems of the sources, white counts; in a jsonl `mask_path`."""
    separate_audio_directory: AnyPath | None = None
    """The videos' sound, in place of what is in their files; in a jsonl `audio_path`."""


@options
class _Entry(_Companions):
    """One table of `[[datasets]]` as it is written."""

    video_directory: AnyPath | None = None
    image_directory: AnyPath | None = None
    audio_directory: AnyPath | None = None
    video_jsonl_file: AnyPath | None = None
    image_jsonl_file: AnyPath | None = None
    audio_jsonl_file: AnyPath | None = None
    cache_directory: AnyPath | None = None


@options
class DatasetSpec(_Companions):
    """One dataset, with `[general]` filled in and its paths resolved."""

    label: str
    """Its place in the TOML, such as `datasets[0]`."""
    kind: Literal["video", "image", "audio"]
    directory: Path | None
    jsonl_file: Path | None
    cache_directory: Path

    @property
    def root(self) -> Path:
        """The folder that source paths are relative to."""
        return self.directory if self.directory is not None else self.listing.parent

    @property
    def listing(self) -> Path:
        """The jsonl file of a dataset that has no directory."""
        assert self.jsonl_file is not None, "a dataset has one of the two"
        return self.jsonl_file

    def settings(self) -> dict[str, Any]:
        """What shapes planning, as plain JSON values."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_later = field.name in ("flip_x", "keyframes", "supervise_silence") or field.name.startswith(
                ("reference_", "separate_", "mask_")
            )
            if field.name not in _NO_PLAN and not (is_later and value == field.default):
                if isinstance(value, Path):
                    value = _from_cache(value, self.cache_directory)
                values[field.name] = list(value) if isinstance(value, tuple) else value
        return values


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """All datasets of a TOML."""

    path: Path
    datasets: tuple[DatasetSpec, ...]
    validation_datasets: tuple[DatasetSpec, ...]

    @property
    def all(self) -> tuple[DatasetSpec, ...]:
        return self.datasets + self.validation_datasets

    @property
    def reference_factors(self) -> tuple[int, int]:
        """In space and time: how much coarser than the clips the references are; one pair for a whole run."""
        spec = self.datasets[0]
        return spec.reference_downscale, spec.reference_temporal_scale


def load_dataset_config(path: Path) -> DatasetConfig:
    """Read and check a dataset TOML. Relative paths in it are relative to the TOML's own folder.

    Raises:
        UserError: names the section, the key, the value and the rule.
    """
    values = read_toml(path, named="--dataset_config", remedy="Give the dataset TOML.")
    sections = {"general": {}, "datasets": [], "validation_datasets": []}
    for key, value in values.items():
        if key not in sections:
            raise UserError(
                f"{path}: unknown section '{key}'.{nearest(key, sections)} There are [general], [[datasets]] and [[validation_datasets]]."
            )
        written = f"[{key}]" if key == "general" else f"[[{key}]]"
        tables = value if isinstance(value, list) else [value]
        if type(value) is not type(sections[key]) or not all(isinstance(table, dict) for table in tables):
            raise UserError(f"{path}: {key} = {value!r}: must be written {written}.")
    general, lists = values.get("general", {}), {name: values.get(name, []) for name in ("datasets", "validation_datasets")}
    foreign = [key for table in (general, *lists["datasets"], *lists["validation_datasets"]) for key in table if key in DATASET_KEYS]
    if foreign:
        raise UserError("\n".join(f"{path}: unknown key '{key}': {DATASET_KEYS[key]}." for key in dict.fromkeys(foreign)))
    for key in general:
        if key not in _keys(GeneralSettings) and key in _keys(_Entry):
            raise UserError(f"{path}: general: unknown key '{key}'. It belongs in [[datasets]].")
    validated(GeneralSettings, general, where=f"{path}: general")
    specs = {name: tuple(_spec(path, f"{name}[{i}]", general, entry) for i, entry in enumerate(found)) for name, found in lists.items()}
    if not specs["datasets"]:
        raise UserError(f"{path}: no [[datasets]]. Give one at least, with video_directory, image_directory or audio_directory.")
    config = DatasetConfig(path, **specs)
    for spec in config.all:
        if (spec.reference_downscale, spec.reference_temporal_scale) != config.reference_factors:
            raise UserError(
                f"{path}: {spec.label}: reference_downscale and reference_temporal_scale differ from those of datasets[0]; "
                "a LoRA has one of each. Set them in [general]."
            )
    return config


def _spec(path: Path, label: str, general: Mapping[str, Any], table: Mapping[str, Any]) -> DatasetSpec:
    named = [key for key in _SOURCES if key in table]
    entry = validated(_Entry, {**_applying(general, table, named), **table}, where=f"{path}: {label}")
    if len(named) != 1:
        raise UserError(f"{path}: {label}: exactly one of {', '.join(_SOURCES)} is needed, found {', '.join(named) or 'none'}.")
    kind, is_directory = _SOURCES[named[0]]
    paths = {
        key: real_path(path.parent / value) if not value.is_absolute() else value
        for key in _keys(_Entry)
        if isinstance(value := getattr(entry, key), Path)
    }
    source = paths[named[0]]
    if is_directory and not source.is_dir() and "cache_directory" not in paths or not is_directory and not source.parent.is_dir():
        raise UserError(f"{path}: {label}: {named[0]} = {table[named[0]]!r}: no such {'folder' if is_directory else 'file'} ({source}).")
    values: dict[str, Any] = {key: paths.get(key, getattr(entry, key)) for key in _keys(_Companions)}
    spec = DatasetSpec(
        label=label,
        kind=kind,
        directory=source if is_directory else None,
        jsonl_file=None if is_directory else source,
        cache_directory=paths.get("cache_directory", source if is_directory else source.parent),
        **values,
    )
    if broken := _broken_rule(spec):
        raise UserError(f"{path}: {label}: {broken}")
    return spec


def _applying(general: Mapping[str, Any], table: Mapping[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """What [general] says, where it applies: not what other kinds of datasets are for, and no length beside the dataset's own."""
    kind = _SOURCES[named[0]][0] if named else "video"
    apart = {key for key, kinds in _FITTING.items() if kind not in kinds}
    if kind == "audio":
        apart.add("target_frames")
    if not table.keys().isdisjoint(_LENGTHS):
        apart.update(_LENGTHS)
    return {key: value for key, value in general.items() if key not in apart}


def _broken_rule(spec: DatasetSpec) -> str | None:
    """Of those over several keys, the first one that a dataset breaks, in words."""
    for key, kinds in _FITTING.items():
        if getattr(spec, key) and spec.kind not in kinds:
            return f"{key} is for {' and '.join({'video': 'videos', 'image': 'images', 'audio': 'sounds'}[kind] for kind in kinds)}."
    step = 32 * spec.reference_downscale
    if any(side % step for side in spec.resolution):
        return f"resolution = {list(spec.resolution)}: with reference_downscale = {spec.reference_downscale} both are multiples of {step}."
    if spec.target_frames and spec.target_seconds is not None:
        return "target_frames and target_seconds exclude each other; give one."
    if spec.kind == "video" and spec.frame_extraction != "full" and not spec.target_frames and spec.target_seconds is None:
        return "target_frames or target_seconds is needed for videos, such as target_frames = [25, 49]."
    if spec.kind == "audio" and spec.target_frames:
        return "target_frames is for videos; give sound datasets target_seconds, or neither for whole files."
    if spec.kind == "audio" and spec.frame_extraction == "slide":
        return "frame_extraction = 'slide' counts video frames; sound datasets take head, chunk, uniform or full."
    return None


def _keys(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def _from_cache(path: Path, cache_directory: Path) -> str:
    """`path` as seen from the cache directory, so that both can be moved together."""
    try:
        return Path(os.path.relpath(path, cache_directory)).as_posix()
    except ValueError:  # another drive on Windows
        return path.as_posix()
