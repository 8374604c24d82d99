"""Changing the sample rate of sound.

Band-limited interpolation: every output sample is the input weighted by a sinc of the lower rate's band edge (rolloff 0.99 of it),
under a Hann window of six zero crossings to each side (architecture sheet 4.3). With t the distance in zero crossings, |t| < 6:

    h(t) = sin(pi t) / (pi t) * cos(pi t / 12)^2 * edge / from_rate,    edge = 0.99 min(from_rate, to_rate)
"""

import math

import torch
from torch import Tensor

_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99
_CHUNK = 65536


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """(..., n) samples at `from_rate` -> (..., ceil(n * to_rate / from_rate)) float32 at `to_rate`. Beyond its ends the sound is silent."""
    if from_rate == to_rate:
        return waveform.float()
    divisor = math.gcd(from_rate, to_rate)
    source, target = from_rate // divisor, to_rate // divisor
    edge = _ROLLOFF * min(source, target)
    reach = math.ceil(_ZERO_CROSSINGS * source / edge)
    padded = torch.nn.functional.pad(waveform.float(), (reach, reach + 1))
    length = math.ceil(waveform.shape[-1] * target / source)
    taps = torch.arange(-reach, reach + 2)
    chunks = []
    for start in range(0, length, _CHUNK):
        ticks = torch.arange(start, min(start + _CHUNK, length)) * source
        base = ticks // target
        fraction = (ticks % target).double() / target
        distance = (taps[None] - fraction[:, None]) * (edge / source)
        window = torch.cos(distance.clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS) * (math.pi / 2 / _ZERO_CROSSINGS)).square()
        weights = (torch.sinc(distance) * window * (edge / source)).float()
        places = (base[:, None] + taps[None] + reach).clamp(max=padded.shape[-1] - 1)
        chunks.append((padded[..., places] * weights).sum(dim=-1))
    return torch.cat(chunks, dim=-1) if chunks else waveform.new_zeros(*waveform.shape[:-1], 0)
