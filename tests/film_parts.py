"""A small film of known scenes for the tests of dataset tools: bars of colors with tones, hard cuts, a fade."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.tiny.clips import SOUND_RATE, ClipAudio, write_clip

FPS = 24
WIDTH, HEIGHT = 96, 64


def bars(count: int, seed: int) -> Tensor:
    """(count, H, W, 3) uint8: bars of colors that stand still, under a small square that travels."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(40, 256, (6, 3), generator=generator, dtype=torch.uint8).repeat_interleave(WIDTH // 6, 0)
    frames = colors.expand(count, HEIGHT, WIDTH, 3).clone()
    for place, frame in enumerate(frames):
        left = place % (WIDTH - 12)
        frame[24:36, left : left + 12] = 255 - frame[24:36, left : left + 12]
    return frames


def fade_out(count: int, seed: int) -> Tensor:
    """Gray bars to black."""
    level = torch.linspace(1, 0, count)[:, None, None, None]
    return (bars(count, seed).float().mean(-1, keepdim=True).expand(-1, -1, -1, 3) * level).to(torch.uint8)


def tones(lengths: Sequence[int]) -> Tensor:
    """(2, n): a tone of its own for each scene, 300 Hz for the first, 200 Hz more for each further one."""
    parts = []
    for number, length in enumerate(lengths):
        time = torch.arange(round(length / FPS * SOUND_RATE)) / SOUND_RATE
        parts.append(0.4 * torch.sin(2 * math.pi * (300 + 200 * number) * time))
    return torch.cat(parts).expand(2, -1).contiguous()


def pitch(samples: Tensor, rate: int) -> float:
    """Hz of the strongest tone of (channels, n) samples."""
    spectrum = torch.fft.rfft(samples.mean(0)).abs()
    return float(spectrum.argmax()) * rate / samples.shape[1]


def write_film(path: Path, lengths: Sequence[int], *, sound: bool = True, times: Sequence[float] | None = None) -> None:
    """Scenes of so many frames, cut hard."""
    frames = torch.cat([bars(length, seed) for seed, length in enumerate(lengths, start=1)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, frames, fps=FPS, times=times, audio=ClipAudio(samples=tones(lengths)) if sound else None)
