"""Reference videos (IC-LoRA) of a dataset's own clips: as many frames at the same times, written where the dataset looks for them.

Edges, blur, gray and downscale are made frame by frame; a function of the user's own gets all frames of a clip, as depth and pose models
that look at several frames want them. References carry no sound: they are cached as pictures.
"""

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musubi_tuner.config.dataset import DatasetConfig
from musubi_tuner.config.dataset_media import ReferenceOptions
from musubi_tuner.media.colors import picture_of
from musubi_tuner.media.picture import cover_and_crop, picture_size, read_picture
from musubi_tuner.media.probe import VideoInfo, probe_video
from musubi_tuner.media.video import frames_between
from musubi_tuner.media.write import write_frames, write_image
from musubi_tuner.runtime.disk import not_written, write_whole
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.files import read_json, real_path
from musubi_tuner.sources.listing import EXTENSIONS, Source, list_alone

log = logging.getLogger(__name__)

FrameMaker = Callable[[Iterator[Tensor]], Iterator[Tensor]]
"""(H, W, 3) uint8 frames in, as many of the same size out."""
_ENDINGS = EXTENSIONS["video"] + EXTENSIONS["image"]
NOTE = "ltxv2_references.json"
"""Beside references that were made here: how."""
_RADIUS_SIDE = 512
"""Shorter side of the picture that `radius` is meant for."""
_INSTALL = 'pip install "musubi-tuner-ltxv2[scenes]", or pip install -c constraints.txt opencv-python-headless'


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A reference that is to be made."""

    label: str
    """Of the dataset."""
    source: Source
    output: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What became of one."""

    wanted: Wanted
    outcome: str
    """`made`, `kept` (there was one) or `failed`."""
    note: str = ""


def wanted_references(datasets: DatasetConfig, most: int | None) -> list[Wanted]:
    """A reference for each source of each dataset that has a `reference_directory`, validation among them.

    Raises:
        UserError: no dataset has one, one that is the folder of the clips, or what listing sources raises.
    """
    found = []
    for spec in datasets.all:
        if spec.reference_directory is None:
            continue
        if spec.directory is not None and real_path(spec.reference_directory) == real_path(spec.directory):
            raise UserError(f"{datasets.path}: {spec.label}: reference_directory is the folder of the clips. Give another one.")
        for source in list_alone(spec)[:most]:
            ending = ".png" if spec.kind == "image" else ".mp4"
            found.append(Wanted(label=spec.label, source=source, output=spec.reference_directory / f"{source.path.stem}{ending}"))
    if not found:
        raise UserError(
            f"{datasets.path}: no dataset has a reference_directory to write into. Add one to [[datasets]], "
            'such as reference_directory = "edges".'
        )
    return found


def frame_maker(options: ReferenceOptions) -> FrameMaker:
    """What is made of frames.

    Raises:
        UserError: OpenCV is not installed, or the function of `--function` cannot be loaded.
    """
    if options.function is not None:
        return _own_function(options.function)
    if options.kind == "edges":
        return _edges(*options.edges)
    one = {"blur": lambda frame: _blurred(frame, options.radius), "gray": _gray, "downscale": lambda frame: _coarse(frame, options.factor)}
    return lambda frames: map(one[options.kind or ""], frames)


def claim_folders(wanted: Sequence[Wanted], options: ReferenceOptions) -> None:
    """Note in each folder how its references are made, before the first one is: a folder holds references of one kind.

    Raises:
        UserError: a folder that holds references of another kind, or one that cannot be written into.
    """
    asked = _how(options)
    folders: dict[Path, list[Wanted]] = {}
    for one in wanted:
        folders.setdefault(one.output.parent, []).append(one)
    new = []
    for folder, ones in folders.items():
        note = folder / NOTE
        there = [path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS] if folder.is_dir() else []
        if not there:
            new.append(note)
        elif not note.is_file():
            if missing := sum(not _is_there(one) for one in ones):
                log.warning("WARNING: %s: nothing says how the %d references there were made (no %s); %d more are made by %s",
                            folder, len(there), NOTE, missing, _words(asked))  # fmt: skip
        elif (found := read_json(note)) != asked:
            made = _words(found) if isinstance(found, dict) else "something else"
            raise UserError(
                f"{folder}: its references were made by {made} (as {NOTE} in it says), and {_words(asked)} is asked for. A folder holds "
                "references of one kind: give the dataset another reference_directory, or remove this folder to make all of them anew."
            )
    for note in new:
        try:
            write_whole(note, json.dumps(asked, indent=1, ensure_ascii=False).encode(), note.with_name(f".{NOTE}.tmp"))
        except OSError as error:
            raise not_written(note, error) from error


def _how(options: ReferenceOptions) -> dict[str, Any]:
    """The flags that shape a reference, and their values."""
    if options.function is not None:
        file, _, name = options.function.rpartition(":")
        return {"function": f"{Path(file).name}:{name}"}
    shaping = {"edges": {"edges": [*options.edges]}, "blur": {"radius": options.radius}, "downscale": {"factor": options.factor}}
    return {"kind": options.kind, **shaping.get(options.kind or "", {})}


def _words(how: Mapping[str, Any]) -> str:
    """As they are typed."""
    return " ".join(
        f"--{key} {' '.join(f'{one:g}' if isinstance(one, float) else str(one) for one in (value if isinstance(value, list) else [value]))}"
        for key, value in how.items()
    )


def _is_there(one: Wanted) -> bool:
    """Whether a reference is there, of whatever ending."""
    return any(one.output.with_suffix(ending).exists() for ending in _ENDINGS)


def make_references(wanted: Sequence[Wanted], maker: FrameMaker) -> Iterator[Made]:
    """One after the other; a source that has a reference already, of whatever ending, keeps it.

    Raises:
        TemporaryFailure: a full disk.
        UserError: a function of the user's own that gives something else than as many frames.
    """
    for one in wanted:
        if _is_there(one):
            yield Made(wanted=one, outcome="kept")
            continue
        try:
            yield Made(wanted=one, outcome="made", note=_make(one, maker))
        except (TemporaryFailure, FunctionError):
            raise
        except UserError as error:
            yield Made(wanted=one, outcome="failed", note=str(error))


class FunctionError(UserError):
    """What is wrong with the user's own function is wrong for every clip."""


def _make(one: Wanted, maker: FrameMaker) -> str:
    path = one.source.path
    if path.suffix.lower() in EXTENSIONS["image"]:
        picture = read_picture(path)
        width, height = picture_size(path)
        (made,) = maker(iter([picture]))
        write_image(one.output, made)
        return f"still, {width}x{height}"
    info = probe_video(path)
    made = maker(_pictures(info))
    write_frames(one.output, made, info.fps, times=info.times if info.is_variable else None)
    return f"{len(info.stamps)} frames, {info.width // 2 * 2}x{info.height // 2 * 2}"


def _pictures(info: VideoInfo) -> Iterator[Tensor]:
    """(H, W, 3) uint8 of each frame, as displayed, of even sizes."""
    size = info.width // 2 * 2, info.height // 2 * 2
    for _, frame in frames_between(info, 0, len(info.stamps)):
        yield cover_and_crop(torch.rot90(picture_of(frame, info.colors), info.rotation // 90), *size, info.width / info.height)


def _edges(low: float, high: float) -> FrameMaker:
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"edges are found by OpenCV, which is not installed ({error}). Run: {_INSTALL}") from error

    def edges(frame: Tensor) -> Tensor:
        found = cv2.Canny(cv2.cvtColor(frame.numpy(), cv2.COLOR_RGB2GRAY), low, high)
        return torch.from_numpy(found)[..., None].expand(*found.shape, 3).contiguous()

    return lambda frames: map(edges, frames)


def _blurred(frame: Tensor, radius: float) -> Tensor:
    from PIL import Image, ImageFilter

    scaled = radius * min(frame.shape[:2]) / _RADIUS_SIDE
    return torch.from_numpy(np.array(Image.fromarray(frame.numpy()).filter(ImageFilter.GaussianBlur(scaled))))


def _gray(frame: Tensor) -> Tensor:
    from PIL import Image

    return torch.from_numpy(np.array(Image.fromarray(frame.numpy()).convert("L").convert("RGB")))


def _coarse(frame: Tensor, factor: int) -> Tensor:
    """Of the same size with the detail of a smaller picture, so that it lies exactly over its clip."""
    from PIL import Image

    image = Image.fromarray(frame.numpy())
    small = image.resize([max(1, round(side / factor)) for side in image.size], Image.Resampling.BOX)
    return torch.from_numpy(np.array(small.resize(image.size, Image.Resampling.BICUBIC)))


def _own_function(named: str) -> FrameMaker:
    """`FILE.py:NAME`, run as it is, because the user asks for it."""
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--function {named}: {path}: no such file.")
    spec = importlib.util.spec_from_file_location(f"_function_of_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--function {named}: {path} does not load: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--function {named}: {path} has no function {name}.")

    def made(frames: Iterator[Tensor]) -> Iterator[Tensor]:
        given = torch.stack(list(frames))
        try:
            found = function(given)
        except Exception as error:
            raise FunctionError(f"--function {named}: {type(error).__name__}: {error}") from error
        yield from _checked(found, given, named)

    return made


def _checked(found: Any, given: Tensor, named: str) -> Tensor:
    """(F, H, W, 3) uint8.

    Raises:
        FunctionError: it is no such thing.
    """
    tensor = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    what = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(found).__name__
    if isinstance(tensor, Tensor) and tensor.shape == given.shape[:3]:
        tensor = tensor[..., None].expand(given.shape)
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.shape != given.shape:
        raise FunctionError(
            f"--function {named}: must give back uint8 of {tuple(given.shape)} or {tuple(given.shape[:3])}, as it was given, not {what}."
        )
    return tensor.cpu().contiguous()
