"""Drawing noise levels for training (architecture sheet 6)."""

import math
from collections.abc import Callable

import torch

from musubi_tuner.flow.shift import mu_for_tokens

_HIGH_PERCENTILE = 3.0902  # standard normal quantile at 99.9 %
_LOW_PERCENTILE = -2.5758  # at 0.5 %
_EPS = 1e-3
_UNIFORM_SHARE = 0.1

SigmaSampler = Callable[[int, torch.Generator], float]
"""(tokens of the stream, generator) -> sigma in 0..1."""


def shifted_logit_normal(tokens: int, generator: torch.Generator) -> float:
    """The official sampler: logit-normal shifted by length, stretched between two percentiles, one draw in ten uniform.

    u = sigmoid(mu + n); r = (u - lo) / (hi - lo) with lo, hi the percentiles; r < 1e-3 is reflected to 2e-3 - r.
    """
    normal = torch.randn((), generator=generator, dtype=torch.float64).item()
    lot = torch.rand((), generator=generator, dtype=torch.float64).item()
    even = torch.rand((), generator=generator, dtype=torch.float64).item()
    if lot < _UNIFORM_SHARE:
        return _EPS + (1 - _EPS) * even
    return stretched(normal, mu_for_tokens(tokens))


def stretched(normal: float, mu: float) -> float:
    """Sigma of one standard normal draw: also the quantile function of the sampler without its uniform share."""
    low, high = _sigmoid(mu + _LOW_PERCENTILE), _sigmoid(mu + _HIGH_PERCENTILE)
    ratio = (_sigmoid(mu + normal) - low) / (high - low)
    if ratio < _EPS:
        ratio = 2 * _EPS - ratio
    return min(max(ratio, 0.0), 1.0)


def uniform(tokens: int, generator: torch.Generator) -> float:
    """Uniform in [0, 1)."""
    return torch.rand((), generator=generator, dtype=torch.float64).item()


SAMPLERS: dict[str, SigmaSampler] = {"shifted_logit_normal": shifted_logit_normal, "uniform": uniform}


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
