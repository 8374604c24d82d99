"""What a media file holds: frame times, size as displayed, sound. Read from packets; one frame is decoded, to see that it can be."""

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from musubi_tuner.media.colors import Colors, colors_of, is_transparent
from musubi_tuner.media.container import open_media
from musubi_tuner.runtime.errors import UserError

_JITTER_SECONDS = 0.0011
"""Containers that count in milliseconds round frame times by as much."""
_LONGEST_GAP_SECONDS = 600.0
"""Without any packet of a sound file; more is a broken clock, and would be read as so much silence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioInfo:
    """An audio stream, its times in seconds of the container's clock."""

    start: float
    end: float
    rate: int
    """samples per second; 0: the stream holds nothing that can be read"""
    pictures_start: float | None = None
    """First frame of the pictures that a sound file has as well, as a film has them; None: it has none, or they are of a `VideoInfo`."""

    @property
    def origin(self) -> float:
        """Where the time of a sound file begins that is played beside pictures: players count from the first frame of its own."""
        return self.start if self.pictures_start is None else self.pictures_start


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """A video file."""

    path: Path
    stamps: tuple[int, ...]
    """Presentation stamps of the frames, ascending, in ticks of the stream."""
    is_counted: bool
    """The container stores no presentation stamps (avi): they are the frames' numbers instead."""
    start: float
    """Seconds of the first frame on the container's clock: where the clip's own time begins."""
    tick: Fraction
    """seconds"""
    times: tuple[float, ...]
    """Seconds of the frames since the first one; evenly spaced where the rate is constant."""
    fps: float
    """True frame rate; the mean where the rate varies."""
    is_variable: bool
    width: int
    """As displayed: after rotation and the pixels' aspect ratio."""
    height: int
    rotation: int
    """Degrees counterclockwise that turn stored frames upright."""
    audio: AudioInfo | None
    """None: the file has no audio stream."""
    colors: Colors = Colors()
    is_interlaced: bool = False
    """By the mark of its first frame: two halves of each were seen at different times, so what moves is combed."""
    is_transparent: bool = False
    """By its first frame; its pictures are the colors that are stored, without transparency."""
    stored_frames: int = 0
    """Frames that the file's own table lists, where fewer of them are in it: it is cut off. 0: it is whole, or has no such table."""
    lost_frames: int = 0
    """Frames before the first key frame, which cannot be decoded; they do not count."""

    @property
    def rule(self) -> str:
        """What a cache has to say of how its pictures are read: nothing where frames are read by their tags alone, as they always were."""
        dropped = ("dropped frames of avi stand still",) if self.is_counted and self.is_variable else ()
        return ", ".join(filter(None, (self.colors.rule, *dropped)))


def probe_video(path: Path) -> VideoInfo:
    """Look into a video file.

    Raises:
        UserError: no media file, no video stream, no frame or a stream that does not decode.
    """
    with open_media(path) as container:
        if not container.streams.video:
            raise UserError(f"{path}: holds no video stream.")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UserError(f"{path}: its video is of a kind that is not known here. Convert it to H.264.")
        audio = container.streams.audio[0] if container.streams.audio else None
        packets = _packets(container, stream) if audio is None else _packets(container, stream, audio)
        decodable, is_mp4 = _decodable(packets[stream.index]), "mp4" in container.format.name
        stored = [packet.pts for packet in decodable]
        lost = sum(not packet.is_hidden for packet in packets[stream.index]) - len(stored)
        listed = stream.frames if is_mp4 and len(packets[stream.index]) < stream.frames else 0
        stamps, tick, counted = sorted({stamp for stamp in stored if stamp is not None}), stream.time_base, False
        shown = stamps
        if container.format.name == "avi" or None in stored or tick is None:
            stamps, tick, counted = list(range(len(stored))), 1 / (stream.average_rate or Fraction(24)), True
            shown = _slots(decodable) if container.format.name == "avi" else stamps
        elif listed:
            shown = stamps = _up_to_the_first_hole(stamps, tick, stream.average_rate)
        pixel_aspect, average_rate = stream.sample_aspect_ratio, stream.average_rate
        sound = None if audio is None else _audio_info(audio, packets[audio.index])
    with open_media(path) as container:  # anew, as not every file can be sought in
        first = next(container.decode(container.streams.video[0]), None)
        if first is None or not stamps:
            raise UserError(f"{path}: not one frame can be decoded. The file is damaged or empty; replace or remove it.")
        rotation = round(first.rotation / 90) * 90 % 360
        width, height = _displayed_size(first.width, first.height, pixel_aspect, rotation)
        times, fps, variable = _frame_times(shown, tick, average_rate)
        return VideoInfo(
            path=path,
            stamps=tuple(stamps),
            is_counted=counted,
            start=float(shown[0] * tick),
            tick=tick,
            times=times,
            fps=fps,
            is_variable=variable,
            width=width,
            height=height,
            rotation=rotation,
            audio=sound,
            colors=colors_of(first),
            is_interlaced=first.interlaced_frame,
            is_transparent=is_transparent(first),
            stored_frames=listed,
            lost_frames=lost,
        )


def container_comment(path: Path) -> str | None:
    """The `comment` of a file's metadata; None where it has none.

    Raises:
        UserError: a file that cannot be read.
    """
    with open_media(path) as container:
        return container.metadata.get("comment")


def probe_audio(path: Path) -> AudioInfo:
    """The first audio stream of a sound file.

    Raises:
        UserError: no media file, no audio stream, or one with an impossible clock.
    """
    from av.stream import Disposition

    with open_media(path) as container:
        if not container.streams.audio:
            raise UserError(f"{path}: holds no audio stream. Remove it from the audio dataset.")
        stream = container.streams.audio[0]
        pictures = next((video for video in container.streams.video if not video.disposition & Disposition.attached_pic), None)
        found = _packets(container, stream) if pictures is None else _packets(container, stream, pictures)
        packets = found[stream.index]
        stamps = sorted(float(packet.pts * stream.time_base) for packet in packets if packet.pts is not None and not packet.is_hidden)
        gap = max((later - earlier for earlier, later in pairwise(stamps)), default=0.0)
        if gap > _LONGEST_GAP_SECONDS:
            raise UserError(f"{path}: its sound stops for {gap:.0f} s, by its time stamps. Repair it by converting the file, or remove it.")
        shown = None if pictures is None else _first_stamp(container, pictures, found[pictures.index])
        return dataclasses.replace(_audio_info(stream, packets), pictures_start=shown)


@dataclass(frozen=True, slots=True)
class _Packet:
    """What counts of a packet, so that its data can go."""

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool
    is_hidden: bool
    """By an edit list."""


def _packets(container: Any, *streams: Any) -> dict[int, list[_Packet]]:
    """By stream, in the order of decoding, in one pass over the file."""
    found: dict[int, list[_Packet]] = {stream.index: [] for stream in streams}
    for packet in container.demux(*streams):
        if packet.size and not packet.is_corrupt:
            found[packet.stream_index].append(_Packet(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
    return found


def _decodable(packets: list[_Packet]) -> list[_Packet]:
    """Those of frames, without those before the first key frame, which lean on what was cut away.

    A stream without any mark of key frames is taken whole.
    """
    first = next((place for place, packet in enumerate(packets) if packet.is_key), 0)
    key = packets[first].pts if first else None
    return [packet for packet in packets[first:] if not packet.is_hidden and (key is None or packet.pts is None or packet.pts >= key)]


def _slots(packets: list[_Packet]) -> list[int]:
    """Avi gives each frame the next of its slots of time; one that was dropped is an empty slot, in which the frame before stands still.

    Frames that are stored in another order than they are shown in take the slots in the order of showing.
    """
    slots = sorted({packet.dts for packet in packets if packet.dts is not None})
    return slots if len(slots) == len(packets) else list(range(len(packets)))


def _first_stamp(container: Any, stream: Any, packets: list[_Packet]) -> float | None:
    """Seconds of the first frame on the container's clock, as `VideoInfo.start` has them; None: there is none."""
    decodable = _decodable(packets)
    stamps = [packet.pts for packet in decodable]
    if container.format.name == "avi" and decodable:
        return float(_slots(decodable)[0] / (stream.average_rate or Fraction(24)))
    if None in stamps:
        return 0.0
    return min((float(stamp * stream.time_base) for stamp in stamps if stamp is not None), default=None)


def _up_to_the_first_hole(stamps: list[int], tick: Fraction, average_rate: Fraction | None) -> list[int]:
    """The frames of a file that is cut off: near its end frames lack others that were to be decoded after them."""
    if not average_rate:
        return stamps
    longest = 1.5 / (average_rate * tick)
    last = next((place for place in range(1, len(stamps)) if stamps[place] - stamps[place - 1] > longest), len(stamps))
    return stamps[:last]


def _audio_info(stream: Any, packets: list[_Packet]) -> AudioInfo:
    heard = [(packet.pts, packet.duration) for packet in packets if packet.pts is not None and not packet.is_hidden]
    if stream.codec_context is None or not stream.rate or not heard:
        return AudioInfo(start=0.0, end=0.0, rate=0)
    start = min(pts for pts, _ in heard)
    if stream.start_time is not None:  # without the encoder's delay, which is in the packets and which decoding skips
        start = max(start, stream.start_time)
    end = max(pts + duration for pts, duration in heard)
    return AudioInfo(start=float(start * stream.time_base), end=float(end * stream.time_base), rate=stream.rate)


def _displayed_size(width: int, height: int, pixel_aspect: Fraction | None, rotation: int) -> tuple[int, int]:
    if pixel_aspect:
        width = max(1, round(width * pixel_aspect))
    return (height, width) if rotation % 180 else (width, height)


def _frame_times(stamps: list[int], tick: Fraction, average_rate: Fraction | None) -> tuple[tuple[float, ...], float, bool]:
    """Seconds since the first frame, the rate, and whether it varies."""
    if len(stamps) == 1:
        return (0.0,), float(average_rate or 24), False
    seconds = [float((stamp - stamps[0]) * tick) for stamp in stamps]
    measured = (len(stamps) - 1) / seconds[-1]
    tolerance = _JITTER_SECONDS + 0.02 / measured
    if any(abs(time - i / measured) > tolerance for i, time in enumerate(seconds)):
        return tuple(seconds), measured, True
    fps = _nominal_rate(measured, average_rate, seconds[-1])
    return tuple(i / fps for i in range(len(stamps))), fps, False


def _nominal_rate(measured: float, average_rate: Fraction | None, seconds: float) -> float:
    """The exact rate that the stamps approximate: the container's, a whole one, or a multiple of 1000/1001."""
    slack = measured * 2 * _JITTER_SECONDS / seconds + 1e-6
    candidates = [average_rate] if average_rate else []
    candidates += [Fraction(round(measured)), Fraction(round(measured * 1.001) * 1000, 1001)]
    near = [rate for rate in candidates if rate and abs(float(rate) - measured) <= slack]
    return float(min(near, key=lambda rate: (abs(float(rate) - measured), rate.denominator))) if near else measured
