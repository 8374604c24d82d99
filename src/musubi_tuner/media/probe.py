"""What a media file holds: frame times, size as displayed, sound. Read from packets; one frame is decoded, to see that it can be."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from musubi_tuner.runtime.errors import UserError

_JITTER_SECONDS = 0.0011
"""Containers that count in milliseconds round frame times by as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioInfo:
    """An audio stream, its times in seconds of the container's clock."""

    start: float
    end: float
    rate: int
    """samples per second; 0: the stream holds nothing that can be read"""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """A video file."""

    path: Path
    stamps: tuple[int, ...]
    """Presentation stamps of the frames, ascending, in ticks of the stream."""
    is_counted: bool
    """The container stores no presentation stamps (avi): they are the frames' numbers instead."""
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

    @property
    def start(self) -> float:
        """Seconds of the first frame on the container's clock: where the clip's own time begins."""
        return float(self.stamps[0] * self.tick)


def probe_video(path: Path) -> VideoInfo:
    """Look into a video file.

    Raises:
        UserError: no media file, no video stream, no frame, or a stream that does not decode.
    """
    import av

    with reading(path), av.open(str(path)) as container:
        if not container.streams.video:
            raise UserError(f"{path}: holds no video stream.")
        stream = container.streams.video[0]
        stored, sound = _demux(container, stream)
        stamps, tick, counted = sorted({stamp for stamp in stored if stamp is not None}), stream.time_base, False
        if container.format.name == "avi" or None in stored or tick is None:
            stamps, tick, counted = list(range(len(stored))), 1 / (stream.average_rate or Fraction(24)), True
        container.seek(0)
        first = next(container.decode(stream), None)
        if first is None or not stamps:
            raise UserError(f"{path}: not one frame can be decoded. The file is damaged or empty; replace or remove the file.")
        rotation = round(first.rotation / 90) * 90 % 360
        width, height = _displayed_size(first.width, first.height, stream.sample_aspect_ratio, rotation)
        times, fps, variable = _frame_times(stamps, tick, stream.average_rate)
        return VideoInfo(
            path=path,
            stamps=tuple(stamps),
            is_counted=counted,
            tick=tick,
            times=times,
            fps=fps,
            is_variable=variable,
            width=width,
            height=height,
            rotation=rotation,
            audio=sound,
        )


def probe_audio(path: Path) -> AudioInfo:
    """The first audio stream of a sound file.

    Raises:
        UserError: no media file, or no audio stream.
    """
    import av

    with reading(path), av.open(str(path)) as container:
        if not container.streams.audio:
            raise UserError(f"{path}: holds no audio stream. Remove it from the audio dataset.")
        stream = container.streams.audio[0]
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        return _audio_info(stream, packets)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what PyAV raises for a bad file into a message for the user."""
    import av

    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        yield
    except av.FFmpegError as error:
        raise UserError(
            f"{path}: cannot be read ({error}). The file is damaged, truncated or of an unknown kind; replace or remove the file."
        ) from error


def _demux(container: Any, stream: Any) -> tuple[list[int | None], AudioInfo | None]:
    """Stamps of the video's frames in the order of decoding, and the sound, in one pass over the packets."""
    audio = container.streams.audio[0] if container.streams.audio else None
    wanted = [stream] if audio is None else [stream, audio]
    packets: dict[int, list[Any]] = {one.index: [] for one in wanted}
    for packet in container.demux(*wanted):
        if packet.size and not packet.is_discard:
            packets[packet.stream_index].append(_Stamps(packet.pts, packet.duration or 0))
    stamps = [packet.pts for packet in packets[stream.index]]
    return stamps, None if audio is None else _audio_info(audio, packets[audio.index])


@dataclass(frozen=True, slots=True)
class _Stamps:
    """What counts of a packet, so that its data can go."""

    pts: int | None
    duration: int


def _audio_info(stream: Any, packets: list[Any]) -> AudioInfo:
    heard = [packet for packet in packets if packet.pts is not None]
    if not stream.rate or not heard:
        return AudioInfo(start=0.0, end=0.0, rate=0)
    start = min(packet.pts for packet in heard)
    end = max(packet.pts + (packet.duration or 0) for packet in heard)
    return AudioInfo(start=float(start * stream.time_base), end=float(end * stream.time_base), rate=stream.rate)


def _displayed_size(width: int, height: int, pixel_aspect: Fraction | None, rotation: int) -> tuple[int, int]:
    if pixel_aspect:
        width = round(width * pixel_aspect)
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
