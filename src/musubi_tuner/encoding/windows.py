"""Which stretches of a source become clips, and at which size.

Stretches are counted in frames of the sampled clip; in seconds they hold for picture and sound alike. The size has about the
dataset's area, at the aspect nearest to the source's own.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from musubi_tuner.config.dataset import DatasetSpec

AUDIO_UNITS_PER_SECOND = 25
"""Windows of sound alone are counted in audio latents."""
_SIDE_STEP = 32


@dataclass(frozen=True, slots=True)
class Window:
    """`count` frames from frame `start` on."""

    start: int
    count: int


def video_windows(spec: DatasetSpec, total: int, fps: float) -> tuple[Window, ...]:
    """Windows of a clip of `total` sampled frames; none where it is shorter than every target."""
    if spec.frame_extraction == "full":
        longest = min(total, spec.max_frames)
        return (Window(0, round_down(longest)),) if longest > 0 else ()
    found: dict[Window, None] = {}
    for target in target_lengths(spec, total, fps):
        if target <= total:
            found |= dict.fromkeys(_windows_of(spec, total, target))
    return tuple(found)


def target_lengths(spec: DatasetSpec, total: int, fps: float) -> tuple[int, ...]:
    """Wanted frame counts. Seconds become the nearest 8n+1 frames; the next smaller where the clip has the seconds but not the frames."""
    if spec.target_frames:
        return spec.target_frames
    assert spec.target_seconds is not None
    wanted = spec.target_seconds * fps
    nearest = max(1, round((wanted - 1) / 8) * 8 + 1)
    if nearest > total >= int(wanted + 1e-6):
        nearest = round_down(total)
    return (nearest,)


def keyframe_places(spec: DatasetSpec, frames: int) -> tuple[int, ...]:
    """Which frames of a clip of `frames` the dataset asks for as keyframes, in order; a number may lie behind the clip's end."""
    found: set[int] = set()
    for place in spec.keyframes:
        if isinstance(place, int):
            found.add(place)
        elif place in ("first", "last"):
            found.add(0 if place == "first" else frames - 1)
        else:
            found |= set(range(0, frames, int(place.removeprefix("every "))))
    return tuple(sorted(found))


def audio_windows(spec: DatasetSpec, seconds: float) -> tuple[Window, ...]:
    """Windows of sound alone, in units of 1 / 25 second; the whole file where no length is asked for."""
    total = int(seconds * AUDIO_UNITS_PER_SECOND + 1e-6)
    if spec.target_seconds is None:
        return (Window(0, total),) if total > 0 else ()
    target = max(1, round(spec.target_seconds * AUDIO_UNITS_PER_SECOND))
    return _windows_of(spec, total, target) if target <= total else ()


def round_down(frames: int) -> int:
    """The largest 8n+1 that is not above `frames`."""
    return (frames - 1) // 8 * 8 + 1


def _windows_of(spec: DatasetSpec, total: int, target: int) -> tuple[Window, ...]:
    last = total - target
    if spec.frame_extraction == "chunk":
        starts = range(0, last + 1, target)
    elif spec.frame_extraction == "slide":
        starts = range(0, last + 1, spec.frame_stride)
    elif spec.frame_extraction == "uniform" and spec.frame_sample > 1:
        starts = [round(last * i / (spec.frame_sample - 1)) for i in range(spec.frame_sample)]
    else:  # head; full for sound alone; one uniform window
        starts = [0]
    return tuple(dict.fromkeys(Window(start, target) for start in starts))


def bucket_for(spec: DatasetSpec, width: int, height: int) -> tuple[int, int] | None:
    """(width, height), multiples of 32 (times `reference_downscale`), for a picture of the given displayed size.

    None where `bucket_no_upscale` leaves a picture of less than that on a side no size.
    """
    if not spec.enable_bucket:
        return spec.resolution
    aspect = math.log(width / height)
    step = _SIDE_STEP * spec.reference_downscale
    target = min(
        _sizes(*spec.resolution, step), key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1], size)
    )
    if spec.bucket_no_upscale and (target[0] > width or target[1] > height):
        target = (min(target[0], width // step * step), min(target[1], height // step * step))
    return target if min(target) >= step else None


@lru_cache
def _sizes(width: int, height: int, step: int) -> tuple[tuple[int, int], ...]:
    """For each width the largest height that stays within the area, and the other way round."""
    area = width * height
    longest = max(width, height, int(math.sqrt(area) * 2) // step * step)
    sizes = {(width, height)}
    for side in range(step, longest + 1, step):
        other = area // side // step * step
        if step <= other <= longest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))
