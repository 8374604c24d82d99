"""Which memory layout the video VAE encodes in: on a GPU the faster one on the largest clips, where enough are to be encoded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from musubi_tuner.ltxv2.autoencoders.causal import LAYOUTS
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.memory.card import seconds_of

_WARM_UPS, _REPEATS = 1, 2
_MOST_OF_THE_WORK = 0.1
"""Measuring may take this part of all encoding; a layout that is faster by more wins it back within the run."""


@dataclass(frozen=True, slots=True)
class ClipSize:
    """What is to be encoded."""

    frames: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True, slots=True)
class LayoutTimes:
    """What was measured."""

    size: ClipSize
    clips: int
    """Encoded together."""
    seconds: dict[str, float]
    """Of these clips in each layout; infinite where the memory did not suffice."""

    @property
    def fastest(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__)

    def describe(self) -> str:
        """One line."""
        size = f"{self.size.width}x{self.size.height}x{self.size.frames}"
        parts = [
            f"{name} {value / self.clips:.3f} s" if math.isfinite(value) else f"{name} out of memory"
            for name, value in self.seconds.items()
        ]
        return f"memory layout of the video VAE: {self.fastest} ({', '.join(parts)} for a clip of {size})"


def use_fastest_layout(vae: VideoVAE, sizes: Sequence[ClipSize], batch_size: int) -> LayoutTimes | None:
    """Have the encoder in the layout that is faster on the largest clips; None, and nothing is changed, where measuring would not pay.

    Args:
        sizes: of all clips that this process is to encode.
        batch_size: clips of one size that are encoded together.
    """
    if vae.device.type != "cuda":
        return None
    largest = max(sizes, key=lambda size: size.pixels)
    clips = min(batch_size, sizes.count(largest))
    if not pays(sizes, largest, clips):
        return None
    times = measure_layouts(vae, largest, clips)
    vae.use_layout(times.fastest)
    return times


def pays(sizes: Sequence[ClipSize], largest: ClipSize, clips: int) -> bool:
    """Whether measuring takes a small part of the work."""
    runs = len(LAYOUTS) * (_WARM_UPS + _REPEATS)
    return runs * clips * largest.pixels <= _MOST_OF_THE_WORK * sum(size.pixels for size in sizes)


def measure_layouts(vae: VideoVAE, size: ClipSize, clips: int) -> LayoutTimes:
    """Encode random frames in each layout; the encoder is left in the last one."""
    frames = torch.randint(256, (clips, size.frames, size.height, size.width, 3), dtype=torch.uint8, device=vae.device)
    seconds = {}
    for name in LAYOUTS:
        vae.use_layout(name)
        try:
            seconds[name] = seconds_of(lambda: vae.encode_frames(frames), vae.device, _REPEATS, warm_ups=_WARM_UPS)
        except torch.OutOfMemoryError:  # the other one may do; where neither does, the first clip says so
            seconds[name] = math.inf
    return LayoutTimes(size, clips, seconds)
