"""Rewards of the sound alone, measured on the waveform: loudness, silence, clipping."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from musubi_tuner.media.audio import Waveform
from musubi_tuner.reinforcement.rewards.base import Reward, RewardSample
from musubi_tuner.runtime.errors import UserError

SILENT = -70.0
"""LUFS: BS.1770's absolute gate, and the score of what is below it."""
_OFFSET = -0.691
_BLOCK, _HOP = 0.4, 0.1
_WINDOW = 0.05


class Loudness(Reward):
    """Integrated loudness by ITU-R BS.1770-4, in LUFS, or how near it is to a target.

    L = -0.691 + 10 log10(sum over channels of the mean square of the K-weighted sound), over blocks of 0.4 s, every 0.1 s, that are louder
    than -70 LUFS and than 10 LU below the mean of those. A sound shorter than a block is one block. With `target`: -|L - target|.
    """

    name, route, needs, has_model = "loudness", "audio", ("audio",), False

    def setup(self, device: torch.device, target: float | None = None) -> None:
        self._target = target

    def score(self, samples: Sequence[RewardSample]) -> list[float]:
        return [level if self._target is None else -abs(level - self._target) for level in (loudness(one.sound) for one in samples)]


class Silence(Reward):
    """How little of the sound is silent: -(share of windows of 50 ms whose RMS is below `below` dB of full scale)."""

    name, route, needs, has_model = "silence", "audio", ("audio",), False

    def setup(self, device: torch.device, below: float = -50.0) -> None:
        self._below = below

    def score(self, samples: Sequence[RewardSample]) -> list[float]:
        return [-self._share(one.sound) for one in samples]

    def _share(self, sound: Waveform) -> float:
        squares = _blocks(sound.samples.square().mean(0), round(_WINDOW * sound.rate), round(_WINDOW * sound.rate)).mean(-1)
        return float((10 * squares.clamp(min=1e-12).log10() < self._below).double().mean())


class Clipping(Reward):
    """How little is clipped: -(share of samples, of all channels, whose magnitude is `level` or more)."""

    name, route, needs, has_model = "clipping", "audio", ("audio",), False

    def setup(self, device: torch.device, level: float = 0.99) -> None:
        if not 0 < level <= 1:
            raise UserError(f"--reward_args clipping.level={level:g}: must be above 0, and at most 1, full scale.")
        self._level = level

    def score(self, samples: Sequence[RewardSample]) -> list[float]:
        return [-float((one.sound.samples.abs() >= self._level).double().mean()) for one in samples]


def loudness(sound: Waveform) -> float:
    """Integrated loudness in LUFS; -70 where it is silent."""
    weighted = k_weighted(sound.samples.double(), sound.rate)
    powers = _blocks(weighted.square(), round(_BLOCK * sound.rate), round(_HOP * sound.rate)).mean(-1).sum(0)
    heard = powers[_level(powers) > SILENT]
    if not len(heard):
        return SILENT
    heard = heard[_level(heard) > float(_level(heard.mean())) - 10]
    return max(SILENT, float(_level(heard.mean())))


def k_weighted(samples: Tensor, rate: int) -> Tensor:
    """(channels, n) through the two filters of BS.1770 (a shelf of 4 dB above 1.7 kHz, a high pass at 38 Hz), without their delay: what
    counts is power, so the spectrum is multiplied by their magnitude.

    The coefficients are those of the analog filters at any rate, which the table of the recommendation holds at 48 kHz.
    """
    length = samples.shape[-1]
    padded = 2 ** math.ceil(math.log2(max(2, length + rate // 10)))
    phase = torch.exp(-2j * math.pi * torch.arange(padded // 2 + 1, dtype=torch.float64) / padded)
    gain = _biquad(*_shelf(rate), phase).abs() * _biquad(*_high_pass(rate), phase).abs()
    return torch.fft.irfft(torch.fft.rfft(samples, padded) * gain, padded)[..., :length]


Three = tuple[float, float, float]


def _shelf(rate: int) -> tuple[Three, Three]:
    k, q, high = math.tan(math.pi * 1681.974450955533 / rate), 0.7071752369554196, 10 ** (3.999843853973347 / 20)
    middle, a0 = high**0.4996667741545416, 1 + k / q + k * k
    above = ((high + middle * k / q + k * k) / a0, 2 * (k * k - high) / a0, (high - middle * k / q + k * k) / a0)
    return above, (1.0, 2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0)


def _high_pass(rate: int) -> tuple[Three, Three]:
    k, q = math.tan(math.pi * 38.13547087602444 / rate), 0.5003270373238773
    a0 = 1 + k / q + k * k
    return (1.0, -2.0, 1.0), (1.0, 2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0)


def _biquad(above: Three, below: Three, z: Tensor) -> Tensor:
    return (above[0] + above[1] * z + above[2] * z * z) / (below[0] + below[1] * z + below[2] * z * z)


def _blocks(values: Tensor, size: int, hop: int) -> Tensor:
    """(..., n) -> (..., blocks, size); all of it where it is shorter than a block."""
    return values.unfold(-1, min(max(1, size), values.shape[-1]), max(1, hop))


def _level(powers: Tensor) -> Tensor:
    return _OFFSET + 10 * powers.clamp(min=1e-30).log10()
