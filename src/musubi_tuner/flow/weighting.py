"""Weights of the loss by noise level, scaled so that they are 1 in the mean over the noise levels that are drawn."""

import math
from collections.abc import Callable
from functools import lru_cache

from musubi_tuner.flow.sigma import SigmaSettings, expected

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
