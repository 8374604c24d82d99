"""What a prompt gives besides text: pictures, a clip, sound, references; the flags for them, found and checked before training."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.ltxv2.geometry import SPATIAL_SCALE
from musubi_tuner.runtime.errors import UserError

GIVEN_FLAGS = {
    "i": "image_path",
    "ei": "end_image_path",
    "k": "keyframes",
    "iv": "input_video_path",
    "vt": "generate_seconds",
    "box": "inpaint_box",
    "crop": "outpaint_crop",
    "a": "input_audio_path",
    "at": "generate_sound_seconds",
    "v": "reference_video_path",
    "ra": "reference_audio_path",
}
"""Flags of a line of text, and the keys of .toml and .json that mean the same; all are text."""

_SPAN = re.compile(r"(\d+\.?\d*|\.\d+)?\s*-\s*(\d+\.?\d*|\.\d+)?")


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds [start, end) of the sample."""

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Pixels of the sample, multiples of 32."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenFiles:
    """Files of one prompt."""

    image: Path | None = None
    """First frame."""
    end_image: Path | None = None
    """Last frame."""
    keyframes: tuple[tuple[int, Path], ...] = ()
    """(frame, picture)"""
    video: Path | None = None
    """A clip that is kept but for what `video_span`, `box` and `crop` leave to be generated; all of it where there are none."""
    video_span: Span | None = None
    box: Rectangle | None = None
    """What is generated."""
    crop: Rectangle | None = None
    """What is kept; the clip fills it."""
    sound: Path | None = None
    """Sound that is kept but for `sound_span`."""
    sound_span: Span | None = None
    reference: Path | None = None
    """Clip or picture that is shown beside the sample (IC-LoRA)."""
    reference_sound: Path | None = None


def read_given_files(where: str, values: Mapping[str, Any], folder: Path) -> GivenFiles:
    """From a prompt's values by their long names; a path counts from here, else from the prompt file's folder.

    Raises:
        UserError: a file that is not there, or a value that cannot be read.
    """

    def path(key: str) -> Path | None:
        flag = next(flag for flag, name in GIVEN_FLAGS.items() if name == key)
        return _find(where, f"--{flag}", values[key], folder) if key in values else None

    return GivenFiles(
        image=path("image_path"),
        end_image=path("end_image_path"),
        keyframes=_keyframes(where, values.get("keyframes"), folder),
        video=path("input_video_path"),
        video_span=_span(where, "--vt", values.get("generate_seconds")),
        box=_rectangle(where, "--box", values.get("inpaint_box")),
        crop=_rectangle(where, "--crop", values.get("outpaint_crop")),
        sound=path("input_audio_path"),
        sound_span=_span(where, "--at", values.get("generate_sound_seconds")),
        reference=path("reference_video_path"),
        reference_sound=path("reference_audio_path"),
    )


def check_given(where: str, given: GivenFiles, *, width: int, height: int, frames: int) -> None:
    """What belongs together, and what lies within the sample.

    Raises:
        UserError: names the flags.
    """
    for flag, value in (("--vt", given.video_span), ("--box", given.box), ("--crop", given.crop)):
        if value is not None and given.video is None:
            raise UserError(f"{where}: {flag} says what of a clip is generated; give the clip by --iv.")
    if given.sound_span is not None and given.sound is None:
        raise UserError(f"{where}: --at says which seconds of a sound are generated; give the sound by --a.")
    if given.box is not None and given.crop is not None:
        raise UserError(f"{where}: --box (what is generated) and --crop (what is kept) exclude each other.")
    for flag, area in (("--box", given.box), ("--crop", given.crop)):
        if area is not None and (area.left + area.width > width or area.top + area.height > height):
            raise UserError(f"{where}: {flag} {area.left},{area.top},{area.width},{area.height}: not within {width}x{height}.")
    for frame, _ in given.keyframes:
        if not 0 <= frame < frames:
            raise UserError(f"{where}: --k {frame}=...: the sample's frames are 0 to {frames - 1}.")


def _find(where: str, flag: str, text: str, folder: Path) -> Path:
    for candidate in (Path(text), folder / text):
        if candidate.is_file():
            return candidate
    raise UserError(f"{where}: {flag} {text!r}: no such file, neither here nor in {folder}.")


def _keyframes(where: str, text: str | None, folder: Path) -> tuple[tuple[int, Path], ...]:
    if text is None:
        return ()
    found = []
    for part in text.split(";"):
        number, sign, name = part.strip().partition("=")
        if not sign or not number.strip().isdigit():
            raise UserError(f"{where}: --k {text!r}: must be FRAME=PICTURE, several parted by ';', such as 24=door.png;48=street.png.")
        found.append((int(number), _find(where, f"--k {number}=", name.strip(), folder)))
    return tuple(found)


def _span(where: str, flag: str, text: str | None) -> Span | None:
    if text is None:
        return None
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{where}: {flag} {text!r}: must be START-END in seconds; either may be left out, such as 1.5- or -2.")
    span = Span(float(match[1] or 0), float(match[2] or "inf"))
    if span.start >= span.end:
        raise UserError(f"{where}: {flag} {text!r}: ends before it starts.")
    return span


def _rectangle(where: str, flag: str, text: str | None) -> Rectangle | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise UserError(f"{where}: {flag} {text!r}: must be LEFT,TOP,WIDTH,HEIGHT in pixels, such as 64,0,128,96.")
    area = Rectangle(*map(int, parts))
    if any(int(part) % SPATIAL_SCALE for part in parts) or not area.width or not area.height:
        raise UserError(f"{where}: {flag} {text!r}: all four are multiples of 32, and width and height are not 0.")
    return area
