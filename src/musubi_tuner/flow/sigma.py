"""Noise levels for training: how they are drawn, and how the loss is weighted by them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch

from musubi_tuner.flow.schedule import mu_for_tokens

_HIGH_PERCENTILE = 3.0902  # standard normal quantile at 99.9 %
_LOW_PERCENTILE = -2.5758  # at 0.5 %
STRATA = 8
_GRID = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class SigmaSettings:
    """How noise levels are drawn."""

    kind: str = "shifted_logit_normal"
    shift: float | None = None
    """mu of the shifted sampler; None = from the stream's own length."""
    std: float = 1.0
    mean: float = 0.0
    """Of `logit_normal`."""
    uniform_prob: float = 0.1
    """Share of even draws of the shifted sampler."""
    eps: float = 1e-3
    """Below this the shifted sampler is reflected."""
    low: float = 0.0
    high: float = 1.0
    """All draws are scaled into low..high."""


def draw_sigma(settings: SigmaSettings, tokens: int, generator: torch.Generator, stratum: int | None = None) -> float:
    """One noise level.

    Args:
        tokens: of the stream.
        stratum: from 0, of `STRATA` equal shares of what is drawn, from low levels on; None = of all. `stratified` alone reads it.
    """
    value = SAMPLERS[settings.kind](settings, tokens, generator, stratum)
    return settings.low + (settings.high - settings.low) * value


def shifted_logit_normal(settings: SigmaSettings, tokens: int, generator: torch.Generator, stratum: int | None) -> float:
    """The official sampler: logit-normal shifted by length, stretched between two percentiles, one draw in ten uniform.

    u = sigmoid(mu + n); r = (u - lo) / (hi - lo) with lo, hi the percentiles; r < eps is reflected to 2 eps - r.
    """
    normal = torch.randn((), generator=generator, dtype=torch.float64).item()
    lot = torch.rand((), generator=generator, dtype=torch.float64).item()
    even = torch.rand((), generator=generator, dtype=torch.float64).item()
    if lot < settings.uniform_prob:
        return settings.eps + (1 - settings.eps) * even
    return stretched(normal, _mu(settings, tokens), std=settings.std, eps=settings.eps)


def stretched(normal: float, mu: float, *, std: float = 1.0, eps: float = 1e-3) -> float:
    """Sigma of one standard normal draw: also the quantile function of the sampler without its uniform share."""
    low, high = _sigmoid(mu + std * _LOW_PERCENTILE), _sigmoid(mu + std * _HIGH_PERCENTILE)
    ratio = (_sigmoid(mu + std * normal) - low) / (high - low)
    if ratio < eps:
        ratio = 2 * eps - ratio
    return min(max(ratio, 0.0), 1.0)


def uniform(settings: SigmaSettings, tokens: int, generator: torch.Generator, stratum: int | None) -> float:
    """Uniform in [0, 1)."""
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def logit_normal(settings: SigmaSettings, tokens: int, generator: torch.Generator, stratum: int | None) -> float:
    """sigmoid(mean + std n), the same for every length (Esser et al. 2024, arXiv 2403.03206)."""
    return _sigmoid(settings.mean + settings.std * torch.randn((), generator=generator, dtype=torch.float64).item())


def stratified(settings: SigmaSettings, tokens: int, generator: torch.Generator, stratum: int | None) -> float:
    """The shifted sampler's quantile of an even draw within one of eight strata."""
    share = torch.rand((), generator=generator, dtype=torch.float64).item()
    return _quantile(settings, tokens, share if stratum is None else (stratum + share) / STRATA)


SigmaSampler = Callable[[SigmaSettings, int, torch.Generator, int | None], float]
SAMPLERS: dict[str, SigmaSampler] = {
    "shifted_logit_normal": shifted_logit_normal,
    "uniform": uniform,
    "logit_normal": logit_normal,
    "stratified": stratified,
}
SAMPLER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "shifted_logit_normal": ("eps", "shift", "std", "uniform_prob"),
    "uniform": (),
    "logit_normal": ("mean", "std"),
    "stratified": ("eps", "shift", "std"),
}
"""Settings that each of them reads."""


def expected(settings: SigmaSettings, tokens: int, function: Callable[[float], float]) -> float:
    """Mean of `function(sigma)` over the distribution that is drawn from, by its quantiles."""

    def scaled(value: float) -> float:
        return function(settings.low + (settings.high - settings.low) * value)

    shares = [(place + 0.5) / _GRID for place in range(_GRID)]
    even = sum(map(scaled, shares)) / _GRID
    if settings.kind == "uniform":
        return even
    if settings.kind == "logit_normal":
        return sum(scaled(_sigmoid(settings.mean + settings.std * _normal(share))) for share in shares) / _GRID
    shifted = sum(scaled(_quantile(settings, tokens, share)) for share in shares) / _GRID
    share_even = settings.uniform_prob if settings.kind == "shifted_logit_normal" else 0.0
    return share_even * even + (1 - share_even) * shifted


def _quantile(settings: SigmaSettings, tokens: int, share: float) -> float:
    return stretched(_normal(share), _mu(settings, tokens), std=settings.std, eps=settings.eps)


def _normal(share: float) -> float:
    return NormalDist().inv_cdf(min(max(share, 1e-9), 1 - 1e-9))


def _mu(settings: SigmaSettings, tokens: int) -> float:
    return mu_for_tokens(tokens) if settings.shift is None else settings.shift


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


_LEAST = 0.05


def sigma_sqrt(sigma: float) -> float:
    """1 / sigma^2, not above that of 0.05 (Esser et al. 2024, arXiv 2403.03206, where it is called rf/edm-like)."""
    return 1 / max(sigma, _LEAST) ** 2


def cosmap(sigma: float) -> float:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)), the same paper's equation 20."""
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma * sigma))


SCHEMES: dict[str, Callable[[float], float]] = {"sigma_sqrt": sigma_sqrt, "cosmap": cosmap}


def loss_weight(scheme: str, sigma: float, settings: SigmaSettings, tokens: int) -> float:
    """Of one stream at noise level `sigma`; `none` weighs all alike."""
    if scheme == "none":
        return 1.0
    return SCHEMES[scheme](sigma) / _mean(scheme, settings, tokens)


@lru_cache(maxsize=256)
def _mean(scheme: str, settings: SigmaSettings, tokens: int) -> float:
    return expected(settings, tokens, SCHEMES[scheme])
