"""Frames of a video, chosen by time."""

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.media.picture import cover_and_crop
from musubi_tuner.media.probe import VideoInfo, reading
from musubi_tuner.runtime.errors import UserError

_SLACK_SECONDS = 6e-4
"""Stamps in milliseconds are half of one off."""


def sampled_length(info: VideoInfo, fps: float) -> int:
    """Number of frames that the whole video has when it is sampled at `fps`; the last frame stands as long as a mean one."""
    return int((info.times[-1] + 1 / info.fps + _SLACK_SECONDS) * fps)


def choose_frames(info: VideoInfo, fps: float, start: float, count: int) -> tuple[int, ...]:
    """Places of the frames that are on screen at the times `start / fps`, `(start + 1) / fps`, ... since the first frame."""
    return tuple(bisect.bisect_right(info.times, (start + i) / fps + _SLACK_SECONDS) - 1 for i in range(count))


def read_frames(info: VideoInfo, places: Sequence[int], width: int, height: int) -> Tensor:
    """Decode the frames at `places` (ascending, repeats allowed), upright, each resized to cover and cropped to `width` x `height`.

    Returns:
        (F, height, width, 3) uint8

    Raises:
        UserError: a frame that does not decode, by number.
    """
    import av

    origins = [0] if info.is_counted else sorted({info.stamps[min(places)], info.stamps[0]}, reverse=True)
    found: dict[int, Tensor] = {}
    with reading(info.path), av.open(str(info.path)) as container:
        for origin in origins:  # from the start only where seeking lands too late
            if len(found) < len(set(places)):
                container.seek(origin, stream=container.streams.video[0])
                found |= _decode(info, container, set(places) - found.keys(), (width, height))
    missing = sorted(set(places) - found.keys())
    if missing:
        raise UserError(
            f"{info.path}: frame {missing[0]} of {len(info.stamps)} does not decode ({len(missing)} such frames). "
            "The file is damaged or truncated; replace or remove the file."
        )
    return torch.stack([found[place] for place in places])


def _decode(info: VideoInfo, container: Any, places: set[int], size: tuple[int, int]) -> dict[int, Tensor]:
    """Frames by place, from where the container stands."""
    wanted = {info.stamps[place]: place for place in places}
    last = max(wanted)
    found = {}
    for number, frame in enumerate(container.decode(container.streams.video[0])):
        stamp = number if info.is_counted else frame.pts
        if stamp in wanted and not frame.is_corrupt:
            picture = torch.rot90(torch.from_numpy(frame.to_ndarray(format="rgb24")), info.rotation // 90)
            found[wanted[stamp]] = cover_and_crop(picture, *size, info.width / info.height)
        if stamp >= last:
            break
    return found
