"""Steps of sampling that draw what comes next from a distribution, so that it has a probability: what policy-gradient learning needs.

Two kinds, both of the same one-step marginals as the straight path:

CPS (coefficients-preserving sampling): mean (1 - s') x0 + sqrt(s'^2 - std^2) x1, std s' sin(pi a / 2); with a = 1 it is ancestral sampling.
Flow-SDE (Flow-GRPO): g = a sqrt(s / (1 - s)), dt = s' - s,
    mean x (1 + g^2 dt / (2 s)) + v (1 + g^2 (1 - s) / (2 s)) dt, std g sqrt(-dt).

x0 and x1 are the clean and the noise end that the prediction at level s names: x0 = x - s v, x1 = x + (1 - s) v. a is the noise level.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from musubi_tuner.flow.path import x0_to_velocity

StepKind = Literal["cps", "flow_sde"]
STEP_KINDS: tuple[str, ...] = get_args(StepKind)


@dataclass(frozen=True, slots=True)
class NextStep:
    """Normal distribution of a stream's values after a step."""

    mean: Tensor
    """(B, N, C) float32"""
    std: Tensor
    """Broadcasts against it; the same for all values of a clip."""

    def draw(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def log_density(self, kind: StepKind, values: Tensor) -> Tensor:
        """(B, N, C) of each value, up to what does not depend on the mean: CPS leaves out the factor 1 / (2 std^2), as its authors do, so
        that steps of all levels weigh alike."""
        error = (values - self.mean).square()
        if kind == "cps":
            return -error
        return -error / (2 * self.std.square()) - self.std.log() - 0.5 * math.log(2 * math.pi)


def next_step(kind: StepKind, x: Tensor, x0: Tensor, sigma: Tensor, following: Tensor, level: float, second: Tensor) -> NextStep:
    """The distribution at `following` of what is `x` at `sigma`, by its prediction `x0`.

    Args:
        sigma, following: noise levels, 0 < following < sigma; they broadcast against `x`.
        level: a, from 0 (no noise) to 1.
        second: the schedule's second level, which stands for `sigma` in the denominator of Flow-SDE's g where that is 1.
    """
    velocity = x0_to_velocity(x, x0, sigma)
    if kind == "cps":
        std = following * math.sin(math.pi * level / 2)
        x1 = x + (1 - sigma) * velocity
        return NextStep((1 - following) * x0 + (following.square() - std.square()).clamp(min=0).sqrt() * x1, std)
    bounded = torch.where(sigma < 1, sigma, second)
    drift, dt = (level * (sigma / (1 - bounded)).sqrt()).square(), following - sigma
    mean = x * (1 + drift * dt / (2 * sigma)) + velocity * (1 + drift * (1 - sigma) / (2 * sigma)) * dt
    return NextStep(mean, (drift * -dt).sqrt())
