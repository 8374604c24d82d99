"""Frames of a video, chosen by time."""

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
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


def place_at(info: VideoInfo, seconds: float) -> int:
    """Place of the first frame that begins `seconds` after the first one, or later; the number of frames where none does."""
    return bisect.bisect_left(info.times, seconds - _SLACK_SECONDS)


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
        raise _does_not_decode(info, missing[0], len(missing))
    return torch.stack([found[place] for place in places])


def frames_between(info: VideoInfo, first: int, end: int, holes: list[int] | None = None) -> Iterator[tuple[int, Any]]:
    """(place, decoded frame as it is stored) of the places from `first` up to `end`, which is not among them, in order, one at a time.

    Args:
        holes: takes the places of frames that do not decode, in place of an error.

    Raises:
        UserError: a frame that does not decode, by number.
    """
    places = {info.stamps[place]: place for place in range(first, end)}
    expected = first
    for from_start in (False, True):  # from the start only where seeking lands too late
        with open_media(info.path) as container:
            if not from_start and (info.is_counted or first == 0 or not _seek(container, info.stamps[first])):
                continue
            container.streams.video[0].thread_type = "AUTO"
            is_patient = bool(info.stored_frames) or holes is not None
            frames = _frames_of_a_part(container) if is_patient else container.decode(container.streams.video[0])
            for number, frame in enumerate(frames):
                stamp = number if info.is_counted else frame.pts
                place = places.get(stamp, -1)
                if place < 0 and stamp is not None and stamp > info.stamps[end - 1]:
                    break
                if place < expected or frame.is_corrupt:
                    continue
                if place > expected:
                    if holes is None or not from_start:
                        break
                    holes += range(expected, place)
                yield place, frame
                expected = place + 1
                if expected == end:
                    return
    if holes is None:
        raise _does_not_decode(info, expected, 1)
    holes += range(expected, end)


def small_frames(info: VideoInfo, longest: int, holes: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(place, picture) of every frame that decodes, to be compared and not to be looked at: as stored, without tone mapping.

    Args:
        longest: pixels of the longer side, at most.
        holes: takes the places of frames that do not decode.

    Yields:
        (h, w, 3) uint8 in the order blue, green, red, which OpenCV has.
    """
    for place, frame in frames_between(info, 0, len(info.stamps), holes):
        scale = min(1.0, longest / max(frame.width, frame.height))
        width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
        yield place, frame.reformat(width=width, height=height, format="bgr24", interpolation="AREA").to_ndarray()


def _does_not_decode(info: VideoInfo, place: int, count: int) -> UserError:
    return UserError(
        f"{info.path}: frame {place} of {len(info.stamps)} does not decode{f' ({count} such frames)' if count > 1 else ''}. "
        "The file is damaged or truncated; replace or remove it."
    )


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
