"""Small clips with sound, made by real codecs: for the quickstart and for tests.

A disc travels over a colored ground, and a tone rises and falls with its height; `numbered_frames` can be identified after any codec.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musubi_tuner.media.audio import Waveform
from musubi_tuner.media.write import write_image, write_wav

SOUND_RATE = 48000
_TICKS = 90000
_COLORS = {"red": (220, 50, 40), "green": (60, 190, 80), "blue": (50, 90, 220), "yellow": (230, 210, 60), "white": (240, 240, 240)}
_GROUNDS = {"dark": (25, 25, 30), "gray": (120, 120, 125), "violet": (90, 50, 110)}
_BITS = (2, 4)
"""Rows and columns of the blocks that spell a frame's number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipAudio:
    """Waveform of a clip to be written."""

    samples: Tensor
    """(channels, n) float32 in -1..1"""
    rate: int = SOUND_RATE
    layout: str = "stereo"
    start: float = 0.0
    """Seconds of its first sample on the container's clock."""
    codec: str | None = None
    """None: aac in mp4, pcm elsewhere."""


def write_clips(
    folder: Path, *, count: int = 4, frames: int = 33, fps: int = 24, width: int = 96, height: int = 64, seed: int = 0
) -> tuple[Path, ...]:
    """`count` mp4 files with sound and captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        color = list(_COLORS)[(number + seed) % len(_COLORS)]
        ground = list(_GROUNDS)[(number // len(_COLORS) + number + seed) % len(_GROUNDS)]
        path = folder / f"clip_{number:03d}.mp4"
        heights = disc_heights(frames, fps, number + seed)
        write_clip(path, disc_frames(heights, width, height, color, ground), fps=fps, audio=ClipAudio(samples=tone_of(heights, fps)))
        caption = f"A {color} disc moves over a {ground} ground while a tone rises and falls with it."
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        paths.append(path)
    return tuple(paths)


def write_stills(folder: Path, *, count: int = 3, width: int = 96, height: int = 64) -> tuple[Path, ...]:
    """`count` png files with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        color = list(_COLORS)[number % len(_COLORS)]
        path = folder / f"still_{number:03d}.png"
        write_image(path, disc_frames([0.2 + 0.2 * (number % 4)], width, height, color, "gray")[0])
        path.with_suffix(".txt").write_text(f"A {color} disc over a gray ground, a still picture.\n", encoding="utf-8")
        paths.append(path)
    return tuple(paths)


def write_audio_files(folder: Path, *, count: int = 3, seconds: float = 1.5) -> tuple[Path, ...]:
    """`count` wav files with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"sound_{number:03d}.wav"
        heights = disc_heights(round(seconds * 24), 24, number)
        write_wav(path, Waveform(samples=tone_of(heights, 24), rate=SOUND_RATE))
        path.with_suffix(".txt").write_text(f"A tone that rises and falls, number {number}.\n", encoding="utf-8")
        paths.append(path)
    return tuple(paths)


def write_clip(
    path: Path,
    frames: Tensor,
    *,
    fps: float = 24,
    times: Sequence[float] | None = None,
    audio: ClipAudio | None = None,
    rotation: int = 0,
    pixel_format: str = "yuv420p",
    pixel_aspect: Fraction | None = None,
) -> None:
    """A clip in the container that the file's ending names (.mp4, .mov, .mkv, .avi).

    Args:
        frames: (F, H, W, 3) uint8; odd sizes need `pixel_format` yuv444p.
        times: seconds of each frame, for a variable rate; None spaces them evenly.
        rotation: degrees counterclockwise that players turn the picture.
    """
    import av

    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), mode="w") as container:
        video = container.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "veryfast", "g": "12"})
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], pixel_format
        tick = Fraction(1, _TICKS) if times is not None else 1 / rate
        video.codec_context.time_base = tick
        if pixel_aspect is not None:
            video.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            video.set_display_rotation(rotation)
        stream = None
        if audio is not None:
            codec = audio.codec or ("aac" if path.suffix == ".mp4" else "pcm_s16le")
            stream = container.add_stream(codec, rate=audio.rate, layout=audio.layout)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            frame.time_base = tick
            frame.pts = number if times is None else round(times[number] * _TICKS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            _write_audio(container, stream, audio)


def _write_audio(container: Any, stream: Any, audio: ClipAudio) -> None:
    import av

    data = audio.samples.numpy()
    block = 1024
    for start in range(0, data.shape[1], block):
        part = np.ascontiguousarray(data[:, start : start + block])
        if stream.codec_context.format.name == "s16":
            part = np.ascontiguousarray((part.clip(-1, 1) * 32767).round().astype(np.int16).T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(part, format=stream.codec_context.format.name, layout=audio.layout)
        frame.sample_rate, frame.time_base = audio.rate, Fraction(1, audio.rate)
        frame.pts = round(audio.start * audio.rate) + start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def break_audio(path: Path) -> None:
    """Overwrite the data of a file's audio packets, so that its audio stream is there and does not decode."""
    import av

    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(container.streams.audio[0]) if packet.pos is not None]
    noise = np.random.default_rng(0)
    with path.open("r+b") as file:
        for position, size in places:
            file.seek(position)
            file.write(noise.integers(0, 256, size, dtype=np.uint8).tobytes())


def disc_heights(frames: int, fps: float, number: int) -> list[float]:
    """Where the disc is in each frame, 0 at the bottom to 1 at the top; clips differ in speed and phase."""
    speed = 0.5 + 0.25 * (number % 3)
    return [0.5 + 0.4 * math.sin(2 * math.pi * (speed * i / fps + number / 5)) for i in range(frames)]


def disc_frames(heights: Sequence[float], width: int, height: int, color: str, ground: str) -> Tensor:
    """(F, height, width, 3) uint8: a disc that goes from left to right at the given heights."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pictures = []
    for number, place in enumerate(heights):
        center = (0.15 + 0.7 * number / max(1, len(heights) - 1)) * width
        distance = torch.sqrt((columns - center) ** 2 + (rows - (1 - place) * height) ** 2)
        inside = (distance < 0.18 * height)[..., None]
        pictures.append(torch.where(inside, torch.tensor(_COLORS[color]), torch.tensor(_GROUNDS[ground])))
    return torch.stack(pictures).to(torch.uint8)


def tone_of(heights: Sequence[float], fps: float, rate: int = SOUND_RATE) -> Tensor:
    """(2, n) a tone of 220 to 880 Hz by height, as long as the frames."""
    samples = round(len(heights) / fps * rate)
    place = torch.arange(samples, dtype=torch.float64) / rate * fps
    pitch = torch.from_numpy(np.interp(place.numpy(), np.arange(len(heights)), np.asarray(heights)))
    phase = torch.cumsum(220 * 4**pitch / rate, dim=0) * 2 * math.pi
    return (0.4 * torch.sin(phase)).float().expand(2, -1).contiguous()


def beep(seconds: float, at: float, *, length: float = 0.04, rate: int = SOUND_RATE, channels: int = 2) -> Tensor:
    """(channels, n) silence with a burst of 1 kHz that begins `at` seconds."""
    time = torch.arange(round(seconds * rate)) / rate
    burst = 0.8 * torch.sin(2 * math.pi * 1000 * time) * ((time >= at) & (time < at + length))
    return burst.expand(channels, -1).contiguous()


def numbered_frames(count: int, width: int = 96, height: int = 64) -> Tensor:
    """(count, height, width, 3) uint8: eight black or white blocks spell each frame's number, modulo 256."""
    rows, columns = _BITS
    row = torch.arange(height) * rows // height
    column = torch.arange(width) * columns // width
    bit = row[:, None] * columns + column[None]
    numbers = torch.arange(count)[:, None, None]
    levels = ((numbers >> bit) & 1) * 200 + 28
    return levels.to(torch.uint8)[..., None].expand(count, height, width, 3).contiguous()


def number_of(picture: Tensor) -> int:
    """The number that a picture of `numbered_frames` spells, after any codec or resize.

    Args:
        picture: (H, W, 3) uint8
    """
    rows, columns = _BITS
    height, width, _ = picture.shape
    number = 0
    for bit in range(rows * columns):
        y = (2 * (bit // columns) + 1) * height // (2 * rows)
        x = (2 * (bit % columns) + 1) * width // (2 * columns)
        number |= int(picture[y, x].float().mean() > 128) << bit
    return number
