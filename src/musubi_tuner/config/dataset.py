"""The dataset TOML: `[general]` defaults, `[[datasets]]`, `[[validation_datasets]]`."""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.config.flags import nearest
from musubi_tuner.runtime.errors import UserError

FRAME_EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")
_SOURCES = {
    "video_directory": ("video", True),
    "image_directory": ("image", True),
    "audio_directory": ("audio", True),
    "video_jsonl_file": ("video", False),
    "image_jsonl_file": ("image", False),
    "audio_jsonl_file": ("audio", False),
}
_TYPES: dict[str, tuple[type, ...]] = {
    **{key: (str,) for key in _SOURCES},
    "caption_extension": (str,),
    "resolution": (list,),
    "batch_size": (int,),
    "num_repeats": (int,),
    "enable_bucket": (bool,),
    "bucket_no_upscale": (bool,),
    "cache_directory": (str,),
    "target_frames": (list, int),
    "target_seconds": (int, float),
    "frame_extraction": (str,),
    "frame_stride": (int,),
    "frame_sample": (int,),
    "max_frames": (int,),
    "source_fps": (int, float),
    "target_fps": (int, float),
    "video_loss_weight": (int, float),
    "audio_loss_weight": (int, float),
    "preserve_base": (bool,),
    "caption_dropout_rate": (int, float),
    "flip_x": (bool, str),
    "reference_directory": (str,),
    "reference_audio_directory": (str,),
    "mask_directory": (str,),
    "separate_audio_directory": (str,),
    "reference_downscale": (int,),
    "reference_temporal_scale": (int,),
}
_IN_WORDS = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false", list: "a list in [ ]"}
_BESIDE = ("reference_directory", "mask_directory", "reference_audio_directory", "separate_audio_directory")
"""Folders of files that belong to the sources, by stem."""
_NOT_IN_GENERAL = (*_SOURCES, "cache_directory", *_BESIDE)
_COUNTS = ("batch_size", "num_repeats", "frame_stride", "frame_sample", "max_frames", "reference_downscale", "reference_temporal_scale")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """One dataset, with `[general]` filled in."""

    label: str
    """Its place in the TOML, such as `datasets[0]`."""
    kind: str
    """`video`, `image` or `audio`."""
    directory: Path | None
    jsonl_file: Path | None
    cache_directory: Path
    caption_extension: str = ".txt"
    resolution: tuple[int, int] = (768, 512)
    """(width, height): the area that buckets keep, or the exact size where buckets are off."""
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = True
    bucket_no_upscale: bool = False
    target_frames: tuple[int, ...] = ()
    target_seconds: float | None = None
    frame_extraction: str = "head"
    frame_stride: int = 8
    """slide: frames from one window's start to the next one's."""
    frame_sample: int = 1
    """uniform: number of windows."""
    max_frames: int = 129
    """full: longest window."""
    source_fps: float | None = None
    """Rate to assume of sources whose own is wrong."""
    target_fps: float | None = None
    """Rate to resample to by timestamp; None keeps each clip's own."""
    video_loss_weight: float | None = None
    audio_loss_weight: float | None = None
    caption_dropout_rate: float | None = None
    preserve_base: bool = False
    """Its items keep what the base model makes of them, in place of learning their content."""
    flip_x: bool | str = False
    """Mirror images as further clips: of sources whose captions do not tell left from right, or `force`: of all."""
    reference_directory: Path | None = None
    """References by the stems of the sources; a jsonl names them by `reference_path`."""
    reference_audio_directory: Path | None = None
    """Sounds that are played beside the sources' own; in a jsonl `reference_audio_path`."""
    mask_directory: Path | None = None
    """Masks by the stems of the sources, white counts; in a jsonl `mask_path`."""
    separate_audio_directory: Path | None = None
    """The videos' sound, in place of what is in their files; in a jsonl `audio_path`."""
    reference_downscale: int = 1
    """How many times smaller than the clips their references are cached."""
    reference_temporal_scale: int = 1
    """How many frames of the clips one frame of their references stands for."""

    @property
    def root(self) -> Path:
        """The folder that source paths are relative to."""
        return self.directory if self.directory is not None else self.jsonl_file.parent

    def settings(self) -> dict[str, Any]:
        """What shapes planning, as plain JSON values."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_later = field.name == "flip_x" or field.name.startswith(("reference_", "separate_", "mask_"))
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
    if not path.is_file():
        raise UserError(f"--dataset_config {path}: {'is a folder' if path.is_dir() else 'no such file'}. Give the dataset TOML.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}. In Windows paths use / or double the \\ (or single quotes).") from error
    sections = ("general", "datasets", "validation_datasets")
    for key in values:
        if key not in sections:
            raise UserError(
                f"{path}: unknown section '{key}'.{nearest(key, sections)} There are [general], [[datasets]] and [[validation_datasets]]."
            )
    general = values.get("general", {})
    _check_keys(path, "general", general, [key for key in _TYPES if key not in _NOT_IN_GENERAL])
    lists = {name: values.get(name, []) for name in sections[1:]}
    for name, entries in lists.items():
        if not isinstance(entries, list):
            raise UserError(f"{path}: [{name}] must be written [[{name}]].")
    specs = {name: tuple(_spec(path, f"{name}[{i}]", general, entry) for i, entry in enumerate(entries)) for name, entries in lists.items()}
    if not specs["datasets"]:
        raise UserError(f"{path}: no [[datasets]]. Give one at least, with video_directory, image_directory or audio_directory.")
    config = DatasetConfig(path, specs["datasets"], specs["validation_datasets"])
    for spec in config.all:
        if (spec.reference_downscale, spec.reference_temporal_scale) != config.reference_factors:
            raise UserError(
                f"{path}: {spec.label}: reference_downscale and reference_temporal_scale differ from those of datasets[0]; "
                "a LoRA has one of each. Set them in [general]."
            )
    return config


def _spec(path: Path, label: str, general: Mapping[str, Any], entry: Mapping[str, Any]) -> DatasetSpec:
    _check_keys(path, label, entry, list(_TYPES))
    merged = {**general, **entry}
    given = [key for key in _SOURCES if key in entry]
    if len(given) != 1:
        raise UserError(f"{path}: {label}: exactly one of {', '.join(_SOURCES)} is needed, found {', '.join(given) or 'none'}.")
    kind, is_directory = _SOURCES[given[0]]
    source = _path(path, entry[given[0]])
    if is_directory and not source.is_dir() and "cache_directory" not in merged or not is_directory and not source.parent.is_dir():
        raise UserError(f"{path}: {label}: {given[0]} = {entry[given[0]]!r}: no such {'folder' if is_directory else 'file'} ({source}).")
    values: dict[str, Any] = {key: value for key, value in merged.items() if key not in _SOURCES and key != "cache_directory"}
    for key in _BESIDE:
        if key in values:
            values[key] = _path(path, values[key])
    if "resolution" in values:
        values["resolution"] = _resolution(path, label, values["resolution"])
    for key in ("target_seconds", "source_fps", "target_fps"):
        if key in values:
            values[key] = float(values[key])
    if "target_frames" in values:
        values["target_frames"] = _target_frames(path, label, values["target_frames"])
    cache = _path(path, merged["cache_directory"]) if "cache_directory" in merged else (source if is_directory else source.parent)
    spec = DatasetSpec(
        label=label,
        kind=kind,
        directory=source if is_directory else None,
        jsonl_file=None if is_directory else source,
        cache_directory=cache,
        **values,
    )
    _check_spec(path, spec)
    return spec


def _from_cache(path: Path, cache_directory: Path) -> str:
    """`path` as seen from the cache directory, so that both can be moved together."""
    try:
        return Path(os.path.relpath(path, cache_directory)).as_posix()
    except ValueError:  # another drive on Windows
        return path.as_posix()


def _path(toml: Path, text: str) -> Path:
    path = Path(text)
    return path if path.is_absolute() else (toml.parent / path).resolve()


def _check_keys(path: Path, label: str, values: Mapping[str, Any], allowed: list[str]) -> None:
    for key, value in values.items():
        if key not in allowed:
            hint = " It belongs into [[datasets]]." if key in _TYPES else nearest(key, allowed)
            raise UserError(f"{path}: {label}: unknown key '{key}'.{hint}")
        types = _TYPES[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f"{path}: {label}: {key} = {value!r}: must be {' or '.join(_IN_WORDS[t] for t in types)}.")


def _resolution(path: Path, label: str, value: list[Any]) -> tuple[int, int]:
    if len(value) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in value):
        raise UserError(f"{path}: {label}: resolution = {value!r}: must be [width, height] in pixels.")
    for name, side in zip(("width", "height"), value, strict=True):
        if side < 32 or side % 32:
            low = max(32, side // 32 * 32)
            raise UserError(f"{path}: {label}: resolution {name} {side}: must be a multiple of 32; the nearest are {low} and {low + 32}.")
    return value[0], value[1]


def _target_frames(path: Path, label: str, value: int | list[Any]) -> tuple[int, ...]:
    frames = value if isinstance(value, list) else [value]
    for count in frames:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1 or count % 8 != 1:
            near = ""
            if isinstance(count, int) and count > 0:
                low = max(1, (count - 1) // 8 * 8 + 1)
                near = f"; the nearest are {low} and {low + 8}"
            raise UserError(f"{path}: {label}: target_frames {count!r}: the model takes 8n+1 frames (9, 17, 25, 33, ...){near}.")
    return tuple(sorted(set(frames)))


def _check_spec(path: Path, spec: DatasetSpec) -> None:
    def refuse(text: str) -> None:
        raise UserError(f"{path}: {spec.label}: {text}")

    if spec.frame_extraction not in FRAME_EXTRACTIONS:
        refuse(f"frame_extraction = {spec.frame_extraction!r}: must be one of {', '.join(FRAME_EXTRACTIONS)}.")
    for name in _COUNTS:
        if getattr(spec, name) < 1:
            refuse(f"{name} = {getattr(spec, name)}: must be 1 at least.")
    for name in ("target_seconds", "source_fps", "target_fps"):
        value = getattr(spec, name)
        if value is not None and value <= 0:
            refuse(f"{name} = {value}: must be above 0.")
    for name in ("video_loss_weight", "audio_loss_weight"):
        value = getattr(spec, name)
        if value is not None and value < 0:
            refuse(f"{name} = {value}: must not be negative.")
    if spec.caption_dropout_rate is not None and not 0 <= spec.caption_dropout_rate <= 1:
        refuse(f"caption_dropout_rate = {spec.caption_dropout_rate}: a share between 0 and 1.")
    if not spec.caption_extension.startswith("."):
        refuse(f"caption_extension = {spec.caption_extension!r}: must begin with a dot, such as '.txt'.")
    if spec.flip_x not in (True, False, "force"):
        refuse(f'flip_x = {spec.flip_x!r}: must be true, false, or "force" (captions with left or right too).')
    if spec.flip_x and spec.kind == "audio":
        refuse("flip_x is for videos and images.")
    step = 32 * spec.reference_downscale
    if any(side % step for side in spec.resolution):
        refuse(f"resolution = {list(spec.resolution)}: with reference_downscale = {spec.reference_downscale} both are multiples of {step}.")
    if spec.reference_directory is not None and spec.kind == "audio":
        refuse("reference_directory is for videos and images.")
    if spec.mask_directory is not None and spec.kind == "audio":
        refuse("mask_directory is for videos and images.")
    if spec.separate_audio_directory is not None and spec.kind != "video":
        refuse("separate_audio_directory is for videos.")
    if spec.reference_audio_directory is not None and spec.kind == "image":
        refuse("reference_audio_directory is for videos and sounds.")
    if spec.kind == "video" and spec.frame_extraction != "full" and not spec.target_frames and spec.target_seconds is None:
        refuse("target_frames or target_seconds is needed for videos, such as target_frames = [25, 49].")
    if spec.target_frames and spec.target_seconds is not None:
        refuse("target_frames and target_seconds exclude each other; give one.")
    if spec.kind == "audio" and spec.target_frames:
        refuse("target_frames is for videos; give sound datasets target_seconds, or neither for whole files.")
    if spec.kind == "audio" and spec.frame_extraction == "slide":
        refuse("frame_extraction = 'slide' counts video frames; sound datasets take head, chunk, uniform or full.")
