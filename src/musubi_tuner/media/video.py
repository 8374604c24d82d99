"""Frames of a video, chosen by time."""

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.media.colors import picture_of
from musubi_tuner.media.container import open_media
from musubi_tuner.media.picture import cover_and_crop
from musubi_tuner.media.probe import VideoInfo
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
    origins = [0] if info.is_counted else sorted({info.stamps[min(places)], info.stamps[0]}, reverse=True)
    found: dict[int, Tensor] = {}
    can_seek = True
    with open_media(info.path) as container:
        for origin in origins:  # from the start only where seeking lands too late
            if can_seek and len(found) < len(set(places)):
                can_seek = _seek(container, origin)
                found |= _decode(info, container, set(places) - found.keys(), (width, height)) if can_seek else {}
    if not can_seek:
        with open_media(info.path) as container:
            found |= _decode(info, container, set(places) - found.keys(), (width, height))
    missing = sorted(set(places) - found.keys())
    if missing:
        raise UserError(
            f"{info.path}: frame {missing[0]} of {len(info.stamps)} does not decode ({len(missing)} such frames). "
            "The file is damaged or truncated; replace or remove it."
        )
    return torch.stack([found[place] for place in places])


def _seek(container: Any, origin: int) -> bool:
    """Whether the video could be sought in: a file that begins between key frames has none before `origin`."""
    import av

    try:
        container.seek(origin, stream=container.streams.video[0])
    except av.FFmpegError:
        return False
    return True


def _decode(info: VideoInfo, container: Any, places: set[int], size: tuple[int, int]) -> dict[int, Tensor]:
    """Frames by place, from where the container stands."""
    wanted = {info.stamps[place]: place for place in places}
    last = max(wanted)
    found = {}
    frames = container.decode(container.streams.video[0]) if not info.stored_frames else _frames_of_a_part(container)
    for number, frame in enumerate(frames):
        stamp = number if info.is_counted else frame.pts
        if stamp in wanted and not frame.is_corrupt:
            picture = torch.rot90(picture_of(frame, info.colors), info.rotation // 90)
            found[wanted[stamp]] = cover_and_crop(picture, *size, info.width / info.height)
        if stamp >= last:
            break
    return found


def _frames_of_a_part(container: Any) -> Iterator[Any]:
    """Frames of a file that is cut off: its last packet is one in part, and does not decode."""
    import av

    for packet in container.demux(container.streams.video[0]):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue
