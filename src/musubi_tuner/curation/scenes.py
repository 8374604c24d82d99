"""Where a film is cut: PySceneDetect's detectors over frames that the media room decodes, then lengths that can be trained on.

The detectors are fed frame by frame, so one decoder (PyAV) does it all, no clip is decoded by one library and cut by another, and a place
is a frame of `VideoInfo`, whose time stamps hold for variable rates too. They see small pictures, as in PySceneDetect's own programs.

Scenes that are too short are left out rather than joined with their neighbors: a clip with a cut in it teaches cuts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from musubi_tuner.config.dataset_media import DETECTOR_THRESHOLDS, SplitOptions
from musubi_tuner.media.cut import seconds_at
from musubi_tuner.media.probe import VideoInfo
from musubi_tuner.media.video import small_frames
from musubi_tuner.runtime.errors import UserError

INSTALL = 'pip install "musubi-tuner-ltxv2[scenes]", or pip install -c constraints.txt scenedetect-headless'
_LONGEST_SIDE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A part of a film that becomes one clip, or is left out."""

    number: int
    """From 1."""
    first: int
    """Place of its first frame."""
    end: int
    """Place behind its last frame."""
    why: str = ""
    """Why it is left out."""


def find_cuts(info: VideoInfo, options: SplitOptions, advance: Callable[[int], object]) -> tuple[list[int], list[int]]:
    """
    Args:
        advance: called with the number of frames, now and then.

    Returns:
        Places of frames that begin a scene, ascending, without that of the first one; and of frames that do not decode.

    Raises:
        UserError: PySceneDetect is not installed, or the file cannot be read.
    """
    detectors = _detectors(options)
    from scenedetect.common import FrameTimecode

    cuts: set[int] = set()
    holes: list[int] = []
    done = 0
    for place, picture in small_frames(info, _LONGEST_SIDE, holes):
        # numbers in place of times: the detectors reckon in frames, and a place is what is wanted
        time = FrameTimecode(place, fps=info.fps)
        cuts.update(found.frame_num for detector in detectors for found in detector.process_frame(time, picture))
        if place - done >= 100:
            advance(place - done)
            done = place
    advance(len(info.stamps) - done)
    return sorted(place for place in cuts if 0 < place < len(info.stamps)), holes


def scenes_between(info: VideoInfo, cuts: Sequence[int], shortest: float, longest: float) -> tuple[Scene, ...]:
    """The scenes of a film, long ones divided evenly.

    Args:
        shortest, longest: seconds.
    """
    found: list[tuple[int, int, str]] = []
    for first, end in zip((0, *cuts), (*cuts, len(info.stamps)), strict=True):
        seconds = seconds_at(info, end) - seconds_at(info, first)
        if seconds < shortest - 1e-6:
            found.append((first, end, f"{seconds:.2f} s, below --min_seconds {shortest:g}"))
            continue
        parts = max(1, math.ceil(seconds / longest - 1e-6))
        bounds = [first + round((end - first) * part / parts) for part in range(parts + 1)]
        found += [(begin, stop, "") for begin, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    return tuple(Scene(number=number, first=first, end=end, why=why) for number, (first, end, why) in enumerate(found, start=1))


def check_detectors() -> None:
    """
    Raises:
        UserError: PySceneDetect is not installed.
    """
    try:
        import scenedetect.detectors  # noqa: F401
    except ImportError as error:
        raise UserError(f"scenes are found by PySceneDetect, which is not installed ({error}). Run: {INSTALL}") from error


def _detectors(options: SplitOptions) -> list[Any]:
    check_detectors()
    from scenedetect.detectors import AdaptiveDetector, ContentDetector, ThresholdDetector

    threshold = options.threshold if options.threshold is not None else DETECTOR_THRESHOLDS[options.detector]
    found: list[Any] = []
    if options.detector == "adaptive":
        found.append(AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=0))
    if options.detector == "content":
        found.append(ContentDetector(threshold=threshold, min_scene_len=0))
    if options.fades:
        found.append(ThresholdDetector(min_scene_len=0))
    return found
