"""Options of the subcommands of `ltxv2 dataset` that make media files: clips, parts of clips, references."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from musubi_tuner.config.dataset_tools import DatasetFileOptions
from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, Count, List, Positive, Share, Text, Whole, options
from musubi_tuner.runtime.errors import UserError

DETECTOR_THRESHOLDS = {"adaptive": 3.0, "content": 27.0, "none": 0.0}
"""PySceneDetect's own defaults."""
_CLOCK = re.compile(r"(?:(?:(\d{1,3}):)?([0-5]?\d):)?(\d+(?:\.\d+)?)", re.ASCII)


def seconds_of(text: str) -> float:
    """Seconds of `90.5`, `1:30.5` or `0:01:30.5`.

    Raises:
        ValueError: it is none of them.
    """
    match = _CLOCK.fullmatch(text.strip())
    if match is None or match[2] is not None and float(match[3]) >= 60:
        raise ValueError("must be a time in seconds, as 90.5, or in minutes and hours, as 1:30.5 or 0:01:30.5")
    return int(match[1] or 0) * 3600 + int(match[2] or 0) * 60 + float(match[3])


def _checked_time(text: str) -> str:
    seconds_of(text)
    return text


def ratio_of(text: str) -> float:
    """Width over height of `16:9`.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)[:/x](\d+(?:\.\d+)?)", text.strip(), re.ASCII)
    if match is None or not 1 / 64 <= float(match[1]) / (float(match[2]) or 1e9) <= 64:
        raise ValueError("must be width:height, such as 16:9 or 1:1")
    return float(match[1]) / float(match[2])


def _checked_ratio(text: str) -> str:
    ratio_of(text)
    return text


Time = Annotated[Text, AfterValidator(_checked_time)]
Aspect = Annotated[Text, AfterValidator(_checked_ratio)]


@options
class SplitOptions:
    """Films to clips."""

    input: AnyPath = flag("a film, or a folder of films; the flag's name may be left out")
    output_dir: AnyPath = flag("folder of the clips and of the lists of scenes (<film>_scenes.jsonl)")
    detector: Literal["adaptive", "content", "none"] = flag(
        "finds hard cuts: adaptive compares each change with those around it, which fast motion does not deceive; content has one limit "
        "for all; none: fades alone",
        default="adaptive",
    )
    threshold: Positive | None = flag("of the detector; lower finds more cuts; default: 3 for adaptive, 27 for content", default=None)
    fades: bool = flag("cut in the middle of the black between a fade out and a fade in", default=True)
    min_seconds: Positive = flag("shorter scenes are left out", default=2.0)
    max_seconds: Positive = flag("longer scenes are divided evenly", default=20.0)
    keyframes_only: bool = flag(
        "copy from key frame to key frame, without loss: clips begin later and end earlier than their scenes", default=False
    )

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.min_seconds > self.max_seconds / 2:
            raise UserError(
                f"--min_seconds {self.min_seconds:g} with --max_seconds {self.max_seconds:g}: must be at most half of it, so that the "
                "parts of a divided scene are long enough."
            )
        if self.detector == "none" and (not self.fades or self.threshold is not None):
            raise UserError("--detector none: looks for fades alone; leave --no-fades and --threshold out.")
        return self


@options
class TrimOptions:
    """A part of a clip."""

    input: AnyPath = flag("the clip; the flag's name may be left out")
    start: Time = flag("where it begins: seconds, or minutes and hours as 1:30.5", default="0")
    end: Time | None = flag("where it ends; default: at the end of the clip", default=None)
    output: AnyPath = flag("file of the part, .mp4")


@options
class CropOptions:
    """A part of the picture."""

    input: AnyPath = flag("a clip or picture, or a folder of them; the flag's name may be left out")
    output_dir: AnyPath = flag("folder of the cropped files, which keep their names")
    aspect: Aspect | None = flag("width:height of the largest part that is kept, such as 16:9", default=None)
    rectangle: Annotated[tuple[Whole, ...], List] = flag("left, top, width and height in pixels, in place of --aspect", default=())
    at: Annotated[tuple[Share, ...], List] = flag(
        "where the part of --aspect lies: 0 is left and top, 1 is right and bottom", default=(0.5, 0.5)
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.aspect is None) == (not self.rectangle):
            raise UserError("--aspect, --rectangle: exactly one of them is needed, such as --aspect 16:9 or --rectangle 0 40 1280 640.")
        if self.rectangle and (len(self.rectangle) != 4 or min(self.rectangle[2:]) < 2):
            raise UserError(f"--rectangle {' '.join(map(str, self.rectangle))}: must be left, top, width and height, each side 2 at least.")
        if len(self.at) != 2:
            raise UserError(f"--at {' '.join(map(str, self.at))}: must be two shares, such as 0.5 0.")
        return self


@options
class ReferenceOptions:
    """References."""

    kind: Literal["edges", "blur", "gray", "downscale"] | None = flag("what is made of each frame", default=None)
    function: Text | None = flag(
        "FILE.py:NAME of a function of your own in place of --kind, for depth or pose: all frames of a clip in, as many out", default=None
    )
    edges: Annotated[tuple[Annotated[float, Field(ge=0, le=2000)], ...], List] = flag(
        "the two thresholds of OpenCV's Canny", default=(100.0, 200.0)
    )
    radius: Positive = flag("of the blur, in pixels of a picture whose shorter side has 512", default=8.0)
    factor: Annotated[int, Field(ge=2, le=64)] = flag("of downscale: how many times fewer pixels a side has", default=4)
    most: Count | None = flag("clips of each dataset, at most", default=None)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.kind is None) == (self.function is None):
            raise UserError("--kind, --function: exactly one of them is needed, such as --kind edges.")
        if self.function is not None and not re.fullmatch(r".+\.py:[^\W\d]\w*", self.function):
            raise UserError(f"--function {self.function}: must be FILE.py:NAME, such as depth.py:depth.")
        if len(self.edges) != 2 or self.edges[0] > self.edges[1]:
            raise UserError(f"--edges {' '.join(f'{one:g}' for one in self.edges)}: must be two thresholds, the lower one first.")
        return self


@options
class SplitConfig:
    """All sections."""

    split: SplitOptions


@options
class TrimConfig:
    """All sections."""

    trim: TrimOptions


@options
class CropConfig:
    """All sections."""

    crop: CropOptions


@options
class ReferencesConfig:
    """All sections."""

    dataset: DatasetFileOptions
    references: ReferenceOptions
