"""A part of a video as a file of its own, with the sound of the same seconds.

`encode_part` encodes anew (H.264 and AAC in mp4) and is exact to the frame; `copy_part` copies packets, from key frame to key frame. Of
several streams the first of each kind is taken, as everywhere here; subtitles and data are left out.

Frames that are encoded anew are upright and have square pixels. Their chroma, bit depth and range stay where H.264 has them, and what an
untagged source is read as (`media.colors`) is written down as a tag, since a crop may change which rule would apply.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.media.audio import Waveform, resample, stream_audio
from musubi_tuner.media.container import open_media
from musubi_tuner.media.probe import VideoInfo
from musubi_tuner.media.video import frames_between
from musubi_tuner.media.write import add_audio_stream, end_audio, exact_rate, mux_audio, write_in_place
from musubi_tuner.runtime.errors import UserError

H264_FINE = {"crf": "12", "preset": "veryfast", "mbtree": "0"}
"""For files that will be encoded again by a VAE: what is lost here is lost to training."""
COPIED_INTO = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
"""Containers that take copied packets with time stamps, by a file's ending."""
_INTERLEAVED_SECONDS = 10.0
"""By which sound may lie behind its pictures in a file."""
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_USUAL_RATE = 48000
_KEPT_FORMATS = tuple(f"yuv{chroma}p{depth}" for chroma in (420, 422, 444) for depth in ("", "10le"))
_FULL_RANGE_FORMATS = ("yuvj420p", "yuvj422p", "yuvj444p")
_UNTAGGED, _BT709 = 2, 1
_MATRICES = {"": 6, "ITU709": _BT709, "BT2020": 9}
"""`Colors.matrix` -> its number in ITU-T H.273; untagged frames of standard definition are read as BT.601."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A part of a picture as displayed, in pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """What `copy_part` has taken: places of frames, `end` not among them."""

    first: int
    end: int


def seconds_at(info: VideoInfo, place: int) -> float:
    """Seconds from the first frame to the frame at `place`; behind the last one, to where it ends."""
    return info.times[place] if place < len(info.times) else info.times[-1] + 1 / info.fps


def encode_part(info: VideoInfo, first: int, end: int, path: Path, rectangle: Rectangle | None = None) -> bool:
    """The frames from `first` up to `end`, with their times, as an mp4; whole or not at all.

    Args:
        rectangle: with even sides; None: all of the picture.

    Returns:
        Whether it has sound: not where the source has none, or none in these seconds.

    Raises:
        UserError: a frame or sound that does not decode, or a file that cannot be written.
    """
    has_sound: list[bool] = []
    write_in_place(path, lambda temporary: has_sound.append(_encode(temporary, info, first, end, rectangle)))
    return has_sound[0]


def key_frames(info: VideoInfo) -> tuple[int, ...]:
    """Places of the key frames.

    Raises:
        UserError: a container without time stamps.
    """
    if info.is_counted:
        raise UserError(f"{info.path}: its container keeps no time stamps, so nothing can be copied from it. Leave --keyframes_only out.")
    places = {stamp: place for place, stamp in enumerate(info.stamps)}
    with open_media(info.path) as container:
        stamps = {packet.pts for packet in container.demux(container.streams.video[0]) if packet.size and packet.is_keyframe}
    return tuple(sorted(places[stamp] for stamp in stamps if stamp in places))


def copy_part(info: VideoInfo, first: int, end: int, path: Path) -> Copied:
    """The packets of the frames from the key frame `first` up to the key frame `end`, which is not among them; whole or not at all.

    Frames that are stored behind the key frame `end`, though shown before it (an open group of pictures), are left out.

    Returns:
        What was taken.

    Raises:
        UserError: a file that cannot be read or written, or a container that does not take its streams.
    """
    taken: list[int] = []
    write_in_place(path, lambda temporary: taken.extend(_copy(temporary, info, first, end, COPIED_INTO[path.suffix.lower()])))
    places = {stamp: place for place, stamp in enumerate(info.stamps)}
    return Copied(first=first, end=max(places[stamp] for stamp in taken if stamp in places) + 1)


def _sound(info: VideoInfo, first: int, end: int) -> Iterator[Waveform]:
    """In parts, so that a film's does not have to fit into memory, at a rate that AAC has; none where there is no sound."""
    if info.audio is None:
        return
    parts = stream_audio(info.path, info.audio, info.start + seconds_at(info, first), info.start + seconds_at(info, end))
    if info.audio.rate in _AAC_RATES:
        yield from parts
    elif whole := [part.samples for part in parts]:
        yield Waveform(resample(torch.cat(whole, dim=1), info.audio.rate, _USUAL_RATE), _USUAL_RATE)


def _encode(path: Path, info: VideoInfo, first: int, end: int, rectangle: Rectangle | None) -> bool:
    """Whether there is sound."""
    import av

    rate = exact_rate(info.fps)
    tick = info.tick if info.is_variable else 1 / rate
    with av.open(str(path), mode="w", format="mp4") as container:
        video = container.add_stream("libx264", rate=rate, options=H264_FINE)
        video.codec_context.time_base = tick
        sound = _sound(info, first, end)
        stream, part, written = None, next(sound, None), 0
        if part is not None:
            stream = add_audio_stream(container, part)
        is_set = False
        for place, frame in _shaped(info, first, end, rectangle):
            if not is_set:
                _describe(video, frame, info)
                is_set = True
            while part is not None and seconds_at(info, place) - seconds_at(info, first) >= written / part.rate:
                mux_audio(container, stream, part, place=written)
                written += part.samples.shape[1]
                part = next(sound, None)
            frame.time_base = tick
            frame.pts = round((info.times[place] - info.times[first]) / tick) if info.is_variable else place - first
            frame.pict_type = 0  # the encoder's own choice, not the source's
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for rest in (*((part,) if part is not None else ()), *sound):
            mux_audio(container, stream, rest, place=written)
            written += rest.samples.shape[1]
        if stream is not None:
            end_audio(container, stream)
        return stream is not None


def _describe(video: Any, frame: Any, info: VideoInfo) -> None:
    """Size, format and colors of a stream, from its first frame."""
    video.width, video.height, video.pix_fmt = frame.width, frame.height, frame.format.name
    colors = video.codec_context
    matrix = int(frame.colorspace)
    colors.colorspace = _MATRICES[info.colors.matrix] if matrix == _UNTAGGED else matrix
    colors.color_range, colors.color_primaries, colors.color_trc = (int(one) for one in _tags(frame))


def _tags(frame: Any) -> tuple[Any, Any, Any]:
    return frame.color_range, frame.color_primaries, frame.color_trc


def _shaped(info: VideoInfo, first: int, end: int, rectangle: Rectangle | None) -> Iterator[tuple[int, Any]]:
    """Frames as they are encoded: upright, of square pixels, cropped, in a format that H.264 has."""
    graph = None
    for place, frame in frames_between(info, first, end):
        filters = _filters(info, frame, rectangle)
        if not filters:
            yield place, frame
            continue
        graph = graph or _graph(frame, filters)
        graph.vpush(frame)
        yield place, graph.vpull()


def _filters(info: VideoInfo, frame: Any, rectangle: Rectangle | None) -> list[tuple[str, str]]:
    """(name, arguments) of libavfilter's."""
    found = []
    upright = (info.height, info.width) if info.rotation % 180 else (info.width, info.height)
    if (frame.width, frame.height) != upright:  # pixels that are not square
        found.append(("scale", f"{upright[0] // 2 * 2}:{upright[1] // 2 * 2}:flags=bicubic"))
        found.append(("setsar", "1"))
    found += {90: [("transpose", "cclock")], 180: [("hflip", ""), ("vflip", "")], 270: [("transpose", "clock")]}.get(info.rotation, [])
    if rectangle is not None:
        found.append(("crop", f"{rectangle.width}:{rectangle.height}:{rectangle.left}:{rectangle.top}"))
    is_even = rectangle is not None or bool(found) or not (frame.width % 2 or frame.height % 2)
    if frame.format.is_rgb:
        found.append(("scale", "out_color_matrix=bt709:out_range=tv"))
    if (wanted := _format(frame, is_even=is_even)) != frame.format.name:
        found.append(("format", wanted))
    return found


def _format(frame: Any, *, is_even: bool) -> str:
    """The pixel format that H.264 keeps most of a frame in; odd sizes take no subsampled chroma."""
    name, parts = frame.format.name, frame.format.components
    if name in _KEPT_FORMATS + _FULL_RANGE_FORMATS and (is_even or "444" in name):
        return name
    deep = "10le" if max(part.bits for part in parts) > 8 else ""
    if not is_even or frame.format.is_rgb or len(parts) >= 3 and parts[1].width == parts[0].width:
        return f"yuv444p{deep}" if len(parts) >= 3 or not is_even else f"yuv420p{deep}"
    return f"yuv420p{deep}"


def _graph(frame: Any, filters: list[tuple[str, str]]) -> Any:
    import av

    graph = av.filter.Graph()
    last = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 90000))
    for name, arguments in (*filters, ("buffersink", "")):
        node = graph.add(name, arguments)
        last.link_to(node)
        last = node
    graph.configure()
    return graph


def _copy(path: Path, info: VideoInfo, first: int, end: int, form: str) -> list[int]:
    """Write it; stamps of the frames."""
    import av

    begins, ends = info.stamps[first], info.stamps[end] if end < len(info.stamps) else None
    start = info.start + info.times[first]
    stop = info.start + seconds_at(info, end)
    taken = []
    with open_media(info.path) as source, av.open(str(path), mode="w", format=form) as container:
        video, sound = source.streams.video[0], source.streams.audio[0] if info.audio is not None and info.audio.rate else None
        pairs = {one.index: _like(container, one, info.path) for one in (video, sound) if one is not None}
        source.seek(begins, stream=video)
        is_open = dict.fromkeys(pairs, True)
        for packet in source.demux(*(one for one in (video, sound) if one is not None)):
            if packet.pts is None or not packet.size:
                continue
            index = packet.stream.index
            if index == video.index:
                if ends is not None and packet.is_keyframe and packet.pts >= ends:
                    is_open[index] = False
                if not is_open[index] and float(packet.pts * packet.time_base) > stop + _INTERLEAVED_SECONDS:
                    break  # its sound has ended before
                wanted = is_open[index] and packet.pts >= begins
                taken += [packet.pts] if wanted else []
                shift = begins
            else:
                at = float(packet.pts * packet.time_base)
                is_open[index] = at < stop
                wanted = start <= at < stop
                shift = round(start / packet.time_base)
            if not any(is_open.values()):
                break
            if wanted:
                packet.pts -= shift
                packet.dts = None if packet.dts is None else packet.dts - shift
                packet.stream = pairs[index]
                try:
                    container.mux(packet)
                except av.FFmpegError as error:  # of the file that is written, not of the one that is read
                    raise OSError(error.errno, error.strerror) from error
    return taken


def _like(container: Any, stream: Any, path: Path) -> Any:
    import av

    try:
        return container.add_stream_from_template(stream)
    except (ValueError, av.FFmpegError) as error:
        raise UserError(
            f"{path}: its {stream.codec_context.name} cannot be copied into another file ({error}). Leave --keyframes_only out."
        ) from error
