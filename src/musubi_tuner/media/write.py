"""Tensors to media files that play everywhere: mp4 (H.264 and AAC), png, wav. Whole or not at all."""

import os
import wave
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.runtime.errors import UserError

_H264 = {"crf": "18", "preset": "medium", "mbtree": "0"}
"""Without mbtree, which in x264's assembly code makes the same small pictures another file from one time to the next."""
_AUDIO_BIT_RATE = 192_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """A waveform."""

    samples: Tensor
    """(2, n) float32 in [-1, 1]"""
    rate: int
    """samples per second"""


def fit_sound(sound: Sound, seconds: float) -> Sound:
    """The sound cut, or padded with silence at its end, to `seconds`."""
    wanted = round(seconds * sound.rate)
    kept = sound.samples[:, :wanted]
    padding = kept.new_zeros(kept.shape[0], wanted - kept.shape[1])
    return Sound(samples=torch.cat([kept, padding], dim=1), rate=sound.rate)


def write_video(path: Path, frames: Tensor, fps: float, sound: Sound | None = None) -> None:
    """An mp4 of H.264 (yuv420p), with AAC where there is `sound`, which is first fitted to the video's length.

    Args:
        frames: (F, H, W, 3) uint8 with even H and W.
        fps: frames per second; 23.976 and its kin become the exact fraction.

    Raises:
        UserError: odd sizes, or a disk that is full.
    """
    count, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UserError(f"{path}: {width}x{height} frames: H.264 in yuv420p takes even sizes.")
    fitted = None if sound is None else fit_sound(sound, count / fps)
    _replace(path, lambda temporary: _mux(temporary, frames, _rate(fps), fitted))


def write_image(path: Path, frame: Tensor) -> None:
    """A png of one (H, W, 3) uint8 frame."""
    from PIL import Image

    _replace(path, lambda temporary: Image.fromarray(frame.cpu().numpy()).save(temporary, format="png"))


def write_wav(path: Path, sound: Sound) -> None:
    """A wav of 16 bits."""

    def save(temporary: Path) -> None:
        with wave.open(str(temporary), "wb") as file:
            file.setnchannels(sound.samples.shape[0])
            file.setsampwidth(2)
            file.setframerate(sound.rate)
            file.writeframes(_to_int16(sound.samples).T.contiguous().numpy().tobytes())

    _replace(path, save)


def _rate(fps: float) -> Fraction:
    """The frame rate as players know it: whole, or a multiple of 1000/1001, where it is within a thousandth of one."""
    for exact in (Fraction(round(fps)), Fraction(round(fps * 1.001) * 1000, 1001)):
        if exact > 0 and abs(float(exact) - fps) < 1e-3:
            return exact
    return Fraction(fps).limit_denominator(10000)


def _mux(path: Path, frames: Tensor, rate: Fraction, sound: Sound | None) -> None:
    import av

    with av.open(str(path), mode="w", format="mp4") as container:
        video = container.add_stream("libx264", rate=rate, options=_H264)
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        audio = None
        if sound is not None:
            audio = container.add_stream("aac", rate=sound.rate, layout="stereo" if sound.samples.shape[0] == 2 else "mono")
            audio.bit_rate = _AUDIO_BIT_RATE
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame.cpu().numpy(), format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            _encode_sound(container, audio, sound)


def _encode_sound(container: Any, stream: Any, sound: Sound) -> None:
    import av

    samples = sound.samples.float().clamp(-1, 1).cpu().numpy()
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=stream.layout.name)
    frame.sample_rate, frame.time_base, frame.pts = sound.rate, Fraction(1, sound.rate), 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _to_int16(samples: Tensor) -> Tensor:
    return (samples.float().clamp(-1, 1) * 32767).round().to(torch.int16).cpu()


def _replace(path: Path, save: Callable[[Path], None]) -> None:
    """Let `save` write a temporary file beside `path`, and put it in place when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}). Make room, or choose another --output_dir.") from error
    finally:
        temporary.unlink(missing_ok=True)
