"""A reward of picture and sound together: whether what starts to be heard starts to be seen."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from musubi_tuner.media.audio import Waveform
from musubi_tuner.reinforcement.rewards.base import Reward, RewardSample
from musubi_tuner.reinforcement.rewards.picture import changes
from musubi_tuner.runtime.errors import UserError

_WINDOW = 0.02
"""Seconds of sound whose spectrum is taken."""
_LEAST = 1e-3
"""Onsets that are weaker than this (of luma; of the loudest level, in shares) are none."""


class Onsets(Reward):
    """Agreement of onsets, 0 to 1.

    Seen: how much more the picture changes from frame to frame than it did before, relu(m[t] - m[t - 1]), with m as in `motion`. Heard: how
    much louder any band becomes within a frame, the mean over bands of relu of the rise of log(1 + 100 magnitude / largest). Both are
    smoothed by (1/4, 1/2, 1/4); the score is the highest correlation of the two over shifts of up to `shift` seconds to either side,
    and 0 where it is negative or where one of them has no onset.
    """

    name, route, needs, has_model = "onsets", "sync", ("video", "audio"), False

    def setup(self, device: torch.device, shift: float = 0.05) -> None:
        if not 0 <= shift <= 1:
            raise UserError(f"--reward_args onsets.shift={shift:g}: must be from 0 to 1 second.")
        self._shift = shift

    def score(self, samples: Sequence[RewardSample]) -> list[float]:
        return [agreement(one.frames, one.sound, one.fps, self._shift) for one in samples]


def agreement(frames: Tensor, sound: Waveform, fps: float, shift: float) -> float:
    """As in `Onsets`."""
    if len(frames) < 4:
        return 0.0
    seen, heard = _smoothed(onsets_seen(frames)), _smoothed(onsets_heard(sound, fps, len(frames)))
    most = min(math.floor(shift * fps + 1e-6), len(frames) // 4)  # what is left must be worth comparing
    best = 0.0
    for lag in range(-most, most + 1):
        first, second = (seen[lag:], heard[: len(heard) - lag]) if lag >= 0 else (seen[:lag], heard[-lag:])
        best = max(best, _correlation(first, second))
    return best


def onsets_seen(frames: Tensor) -> Tensor:
    """(F, H, W, 3) uint8 -> (F,), the first two of which are 0."""
    moved = changes(frames).double()
    rise = moved.diff().clamp(min=0)
    return torch.cat([rise.new_zeros(2), torch.where(rise < _LEAST, 0.0, rise)])


def onsets_heard(sound: Waveform, fps: float, frames: int) -> Tensor:
    """-> (frames,), by the frame within which each onset begins."""
    samples = sound.samples.double().mean(0)
    hop, window = max(1, round(sound.rate / fps / 4)), round(_WINDOW * sound.rate)
    pieces = torch.nn.functional.pad(samples, (window, window)).unfold(0, window, hop)
    spectrum = torch.fft.rfft(pieces * torch.hann_window(window, dtype=torch.float64)).abs()
    level = torch.log1p(100 * spectrum / spectrum.max().clamp(min=1e-9)) if float(samples.abs().max()) > _LEAST else spectrum * 0
    rise = level.diff(dim=0).clamp(min=0).mean(1)
    middles = (torch.arange(len(rise), dtype=torch.float64) + 1) * hop - window / 2
    places = (middles / sound.rate * fps).floor().long().clamp(0, frames - 1)
    found = torch.zeros(frames, dtype=torch.float64).index_add_(0, places, rise)
    found[:2] = 0  # as nothing that is seen begins there
    return torch.where(found < _LEAST, 0.0, found)


def _smoothed(values: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(values, (1, 1))
    return padded[:-2] / 4 + padded[1:-1] / 2 + padded[2:] / 4


def _correlation(first: Tensor, second: Tensor) -> float:
    first, second = first - first.mean(), second - second.mean()
    size = float(first.norm() * second.norm())
    return float(first @ second) / size if size > 1e-9 else 0.0
