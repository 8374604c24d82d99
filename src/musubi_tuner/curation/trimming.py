"""Parts of clips: of their time, with the sound of the same seconds, and of their picture."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.config.dataset_media import CropOptions, ratio_of, seconds_of
from musubi_tuner.media.cut import Rectangle, encode_part, seconds_at
from musubi_tuner.media.picture import picture_size, read_picture
from musubi_tuner.media.probe import probe_video
from musubi_tuner.media.video import place_at
from musubi_tuner.media.write import write_image
from musubi_tuner.runtime.disk import check_folder, not_written
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.files import real_path
from musubi_tuner.sources.listing import EXTENSIONS

_CAPTION = ".txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trimmed:
    """What a trimmed clip holds: frames of the source, `end` not among them, and seconds of it."""

    first: int
    end: int
    start_seconds: float
    end_seconds: float
    has_sound: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Cropped:
    """What became of a file of a folder."""

    name: str
    outcome: str
    """`made`, `kept` (it was there) or `failed`."""
    note: str


def trim(path: Path, start: str, end: str | None, output: Path) -> Trimmed:
    """The frames that begin at `start` or later and before `end`, as an mp4.

    Raises:
        UserError: no such seconds in the clip, `output` is there already or no mp4, or what does not decode.
    """
    if output.suffix.lower() != ".mp4":
        raise UserError(f"--output {output}: must end in .mp4.")
    if output.exists():
        raise UserError(f"--output {output}: is there already. Give another name, or remove it.")
    info = probe_video(path)
    begin, total = seconds_of(start), seconds_at(info, len(info.stamps))
    stop = total if end is None else seconds_of(end)
    first, behind = place_at(info, begin), place_at(info, stop)
    if first >= behind:
        why = f"the clip has {total:.2f} s" if begin >= total else "no frame begins between them"
        raise UserError(f"{path}: --start {start} --end {end or f'{total:.2f}'}: {why}.")
    if end is not None and stop > total + 1 / info.fps:
        raise UserError(f"{path}: --end {end}: the clip has {total:.2f} s. Leave --end out to keep the rest.")
    has_sound = encode_part(info, first, behind, output)
    return Trimmed(
        first=first, end=behind, start_seconds=seconds_at(info, first), end_seconds=seconds_at(info, behind), has_sound=has_sound
    )


def files_to_crop(source: Path, folder: Path) -> list[Path]:
    """
    Raises:
        UserError: none, or an output folder in which they lie themselves.
    """
    check_folder(folder, f"--output_dir {folder}")
    if not source.exists():
        raise UserError(f"--input {source}: no such file or folder.")
    known = EXTENSIONS["video"] + EXTENSIONS["image"]
    paths = sorted(path for path in source.iterdir() if path.suffix.lower() in known) if source.is_dir() else [source]
    paths = [path for path in paths if not path.name.startswith("._")]
    if not paths:
        raise UserError(f"--input {source}: holds no clip and no picture ({', '.join(known)}).")
    if real_path(paths[0].parent) == real_path(folder):
        raise UserError(f"--output_dir {folder}: the files that are cropped lie in it. Give another one.")
    outputs: dict[str, Path] = {}
    for path in paths:
        if (other := outputs.setdefault(_cropped_name(path).casefold(), path)) != path:
            raise UserError(f"{other} and {path} would both become {_cropped_name(path)}. Rename one.")
    return paths


def crop_all(paths: list[Path], options: CropOptions) -> Iterator[Cropped]:
    """Crop one after the other, and copy captions (.txt) that lie beside them; files of that size that are there are kept.

    Raises:
        TemporaryFailure: a full disk.
    """
    for path in paths:
        output = options.output_dir / _cropped_name(path)
        try:
            note = _check_kept(path, output, options) if output.exists() else _crop(path, output, options)
            _copy_caption(path, output)
            yield Cropped(name=path.name, outcome="made" if note else "kept", note=note)
        except TemporaryFailure:
            raise
        except UserError as error:
            yield Cropped(name=path.name, outcome="failed", note=str(error))


def rectangle_for(width: int, height: int, options: CropOptions) -> Rectangle:
    """The part of a picture of that size, its sides even and its corner on even pixels, as H.264 takes them.

    Raises:
        UserError: a rectangle that does not lie within, or nothing that is left.
    """
    if options.rectangle:
        left, top, wide, high = options.rectangle
        if left + wide > width or top + high > height:
            raise UserError(f"--rectangle {left} {top} {wide} {high}: reaches beyond {width}x{height}.")
    else:
        assert options.aspect is not None
        ratio = ratio_of(options.aspect)
        wide, high = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = round((width - wide) * options.at[0]), round((height - high) * options.at[1])
    if min(wide, high) < 2:
        raise UserError(f"{width}x{height}: nothing is left of it.")
    return Rectangle(left=left // 2 * 2, top=top // 2 * 2, width=wide // 2 * 2, height=high // 2 * 2)


def _check_kept(path: Path, output: Path, options: CropOptions) -> str:
    """Nothing to say of a file that is there and of the size that is asked for.

    Raises:
        UserError: it has another size, as after other settings.
    """
    (width, height), there = _size_of(path), _size_of(output)
    part = _named(path, width, height, options)
    if there != (part.width, part.height):
        raise UserError(
            f"{output}: is there already with {there[0]}x{there[1]}, and {part.width}x{part.height} is asked for. "
            "Give another --output_dir, or remove the file."
        )
    return ""


def _size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture or clip."""
    if path.suffix.lower() in EXTENSIONS["image"]:
        return picture_size(path)
    info = probe_video(path)
    return info.width, info.height


def _crop(path: Path, output: Path, options: CropOptions) -> str:
    """What it has become, in words."""
    if path.suffix.lower() in EXTENSIONS["image"]:
        width, height = picture_size(path)
        part = _named(path, width, height, options)
        picture = read_picture(path)
        write_image(output, picture[part.top : part.top + part.height, part.left : part.left + part.width].contiguous())
    else:
        info = probe_video(path)
        width, height = info.width, info.height
        part = _named(path, width, height, options)
        encode_part(info, 0, len(info.stamps), output, part)
    return f"{width}x{height} -> {part.width}x{part.height} at {part.left},{part.top}"


def _named(path: Path, width: int, height: int, options: CropOptions) -> Rectangle:
    try:
        return rectangle_for(width, height, options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _cropped_name(path: Path) -> str:
    return f"{path.stem}.png" if path.suffix.lower() in EXTENSIONS["image"] else f"{path.stem}.mp4"


def _copy_caption(path: Path, output: Path) -> None:
    source, target = path.with_suffix(_CAPTION), output.with_suffix(_CAPTION)
    if source.is_file() and not target.exists():
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise not_written(target, error) from error
