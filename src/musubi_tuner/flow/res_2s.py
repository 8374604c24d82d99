"""The second-order sampler of the official HQ pipeline: an exponential Runge-Kutta step of two evaluations, with fresh noise after each.

With h = ln(s / s') and x0 the clean prediction, one step from `x` at level s to s' goes through the geometric middle m = sqrt(s s'):

    a = phi1(-h/2) / 2,  b2 = 2 phi2(-h),  b1 = phi1(-h) - b2,  phi1(z) = (e^z - 1) / z,  phi2(z) = (e^z - 1 - z) / z^2
    middle = x + h a (x0(x) - x), end = x + h (b1 (x0(x) - x) + b2 (x0(middle) - x))

(Hochbruck and Ostermann 2010, "Exponential integrators", section 2.3; after each of both, `with_fresh_noise`.) Where the step is short, the
start that the noised middle belongs to takes the place of x (`anchor`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LAST_LEVEL = 0.0011
"""In place of 0, of which there is no logarithm; one evaluation at this level ends the sampling."""
_LONGEST_ANCHORED, _LEAST_ANCHORED_LEVEL = 0.5, 0.03
_FRESH = 0.5
"""Share of the next level that is fresh noise."""


@dataclass(frozen=True, slots=True)
class Res2Step:
    """The numbers of one step."""

    sigma: float
    following: float
    middle: float
    """Level of the second evaluation."""
    h: float
    a: float
    b1: float
    b2: float

    @staticmethod
    def between(sigma: float, following: float) -> "Res2Step":
        """Both above zero."""
        h = math.log(sigma / following)
        b2 = 2 * _phi2(-h)
        return Res2Step(sigma, following, math.sqrt(sigma * following), h, _phi1(-h / 2) / 2, _phi1(-h) - b2, b2)

    def to_middle(self, x: Tensor, x0: Tensor) -> Tensor:
        return x + self.h * self.a * (x0 - x)

    def anchor(self, x: Tensor, middle: Tensor, x0: Tensor) -> Tensor:
        """The start from which the step without noise ends in `middle`: middle = start + c (x0 - start), c = h a. Of long steps, and near
        the end, it is `x` itself. (The official code finds it by a hundred rounds of start = middle - c (x0 - start).)"""
        if self.h >= _LONGEST_ANCHORED or self.sigma <= _LEAST_ANCHORED_LEVEL:
            return x
        c = self.h * self.a
        return (middle - c * x0) / (1 - c)

    def to_end(self, start: Tensor, x0: Tensor, x0_of_middle: Tensor) -> Tensor:
        return start + self.h * (self.b1 * (x0 - start) + self.b2 * (x0_of_middle - start))


def with_fresh_noise(x: Tensor, moved: Tensor, sigma: float, following: float, noise: Tensor) -> Tensor:
    """`moved`, which a step from `x` at `sigma` reached at `following`, with a part of its noise replaced by fresh noise.

    Along the line through both, n = (x - moved) / (sigma - following) is the noise and x - sigma n the clean end. Half of the level is
    fresh: u = following / 2, r = sqrt(following^2 - u^2), and (1 - following + r) (clean + r / (1 - following + r) n) + u noise.

    Args:
        noise: of mean 0 and spread 1 (`normal_noise`).
    """
    slope = (x - moved) / (sigma - following)
    fresh = _FRESH * following
    rest = math.sqrt(following**2 - fresh**2)
    ratio = 1 - following + rest
    return ratio * (x - sigma * slope + rest / ratio * slope) + fresh * noise


def normal_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """float64 noise whose own mean is 0 and whose own spread is 1, drawn on the CPU."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (noise - noise.mean()) / noise.std()


def _phi1(z: float) -> float:
    return math.expm1(z) / z if abs(z) > 1e-10 else 1.0


def _phi2(z: float) -> float:
    return (math.expm1(z) - z) / z**2 if abs(z) > 1e-10 else 0.5
