"""Tensors to media files that play everywhere: mp4 (H.264 and AAC), png, wav. Whole or not at all."""

import contextlib
import io
import itertools
import os
import wave
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.media.audio import Waveform
from musubi_tuner.runtime.disk import not_written
from musubi_tuner.runtime.errors import UserError

_H264 = {"crf": "18", "preset": "medium", "mbtree": "0"}
"""Without mbtree, which in x264's assembly code makes the same small pictures another file from one time to the next."""
_VARIABLE_TICK = Fraction(1, 90000)
"""Of files whose frames have times of their own."""
_AUDIO_BIT_RATE = 192_000
_MATRIX_709, _LIMITED, _PRIMARIES_709, _TRANSFER_709 = 1, 1, 1, 1
"""Numbers of ITU-T H.273 (the range: of libav)."""


def fit_audio(audio: Waveform, seconds: float) -> Waveform:
    """The audio cut, or padded with silence at its end, to `seconds`."""
    wanted = round(seconds * audio.rate)
    kept = audio.samples[:, :wanted]
    padding = kept.new_zeros(kept.shape[0], wanted - kept.shape[1])
    return Waveform(samples=torch.cat([kept, padding], dim=1), rate=audio.rate)


def write_video(path: Path, frames: Tensor, fps: float, audio: Waveform | None = None, *, comment: str = "") -> None:
    """An mp4 of H.264 (yuv420p, BT.709 and tagged as that), with AAC where there is `audio`, which is first fitted to the video's length.

    Args:
        frames: (F, H, W, 3) uint8 with even H and W.
        fps: frames per second; 23.976 and its kin become the exact fraction.
        comment: kept in the file's metadata.

    Raises:
        TemporaryFailure: a disk that is full.
        UserError: odd sizes, or a folder that cannot be written.
    """
    count, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UserError(f"{path}: {width}x{height} frames: H.264 in yuv420p takes even sizes.")
    fitted = None if audio is None else fit_audio(audio, count / fps)
    write_in_place(path, lambda temporary: _mux(temporary, frames, exact_rate(fps), fitted, comment))


def write_frames(path: Path, frames: Iterable[Tensor], fps: float, *, times: Sequence[float] | None = None) -> None:
    """As `write_video`, without sound, of frames that come one at a time.

    Args:
        frames: (H, W, 3) uint8 of one even size; one at least.
        times: seconds of each frame since the first one, where the rate varies.

    Raises:
        TemporaryFailure: a disk that is full.
        UserError: a folder that cannot be written, or what `frames` raises.
    """
    write_in_place(path, lambda temporary: _mux(temporary, frames, exact_rate(fps), None, "", times))


def write_image(path: Path, frame: Tensor, texts: Mapping[str, str] | None = None) -> None:
    """A png of one (H, W, 3) uint8 frame.

    Args:
        texts: kept in the file's metadata, by keyword.
    """
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_itxt(keyword, text)
    write_in_place(path, lambda temporary: Image.fromarray(frame.cpu().numpy()).save(temporary, format="png", pnginfo=info))


def write_wav(path: Path, audio: Waveform) -> None:
    """A wav of 16 bits."""
    write_in_place(path, lambda temporary: _save_wav(str(temporary), audio))


def wav_bytes(audio: Waveform) -> bytes:
    """The same, as the bytes of the file."""
    held = io.BytesIO()
    _save_wav(held, audio)
    return held.getvalue()


def _save_wav(place: str | io.BytesIO, audio: Waveform) -> None:
    with wave.open(place, "wb") as file:
        file.setnchannels(audio.samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(audio.rate)
        samples = (audio.samples.float().clamp(-1, 1) * 32767).round().to(torch.int16).cpu()
        file.writeframes(samples.T.contiguous().numpy().tobytes())


def exact_rate(fps: float) -> Fraction:
    """The frame rate as players know it: whole, or a multiple of 1000/1001, where it is within a thousandth of one."""
    for exact in (Fraction(round(fps)), Fraction(round(fps * 1.001) * 1000, 1001)):
        if exact > 0 and abs(float(exact) - fps) < 1e-3:
            return exact
    return Fraction(fps).limit_denominator(10000)


def _mux(
    path: Path, frames: Iterable[Tensor], rate: Fraction, audio: Waveform | None, comment: str, times: Sequence[float] | None = None
) -> None:
    import av

    coming = iter(frames)
    first = next(coming)

    with av.open(str(path), mode="w", format="mp4") as container:
        if comment:
            container.metadata["comment"] = comment
        video = container.add_stream("libx264", rate=rate, options=_H264)
        video.width, video.height, video.pix_fmt = first.shape[1], first.shape[0], "yuv420p"
        if times is not None:
            video.codec_context.time_base = _VARIABLE_TICK
        colors = video.codec_context
        colors.colorspace, colors.color_range, colors.color_primaries, colors.color_trc = (
            _MATRIX_709,
            _LIMITED,
            _PRIMARIES_709,
            _TRANSFER_709,
        )
        stream = None if audio is None else add_audio_stream(container, audio)
        for place, frame in enumerate(itertools.chain([first], coming)):
            picture = _as_yuv(frame)
            if times is not None:
                picture.time_base, picture.pts = _VARIABLE_TICK, round(times[place] / _VARIABLE_TICK)
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        if stream is not None and audio is not None:
            mux_audio(container, stream, audio)
            end_audio(container, stream)


def add_audio_stream(container: Any, audio: Waveform) -> Any:
    """A stream of AAC for it, in an opened container; `mux_audio` fills it."""
    stream = container.add_stream("aac", rate=audio.rate, layout="stereo" if audio.samples.shape[0] == 2 else "mono")
    stream.bit_rate = _AUDIO_BIT_RATE
    return stream


def mux_audio(container: Any, stream: Any, audio: Waveform, *, place: int = 0) -> None:
    """Encode it into a stream that `add_audio_stream` made; `end_audio` ends what may come in several parts.

    Args:
        place: of its first sample.
    """
    import av

    block = av.AudioFrame.from_ndarray(audio.samples.float().clamp(-1, 1).cpu().numpy(), format="fltp", layout=stream.layout.name)
    block.sample_rate, block.time_base, block.pts = audio.rate, Fraction(1, audio.rate), place
    container.mux(stream.encode(block))


def end_audio(container: Any, stream: Any) -> None:
    """Write what the encoder still holds."""
    container.mux(stream.encode(None))


def _as_yuv(frame: Tensor) -> Any:
    """A frame of yuv420p by the matrix and range of BT.709."""
    import av

    picture = av.VideoFrame.from_ndarray(frame.cpu().numpy(), format="rgb24")
    return picture.reformat(
        format="yuv420p", dst_colorspace=_MATRIX_709, dst_color_range=_LIMITED, dst_color_trc=None, dst_color_primaries=None
    )


def write_in_place(path: Path, save: Callable[[Path], None]) -> None:
    """A file whole or not at all: let `save` write a temporary file beside `path`, and put it in place when it is whole.

    Raises:
        TemporaryFailure: the disk is full.
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        temporary.replace(path)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # where its folder cannot be made, the error that says so is the one to be seen
            temporary.unlink(missing_ok=True)
