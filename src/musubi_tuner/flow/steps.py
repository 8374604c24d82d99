"""One step of sampling: from one noise level to the next, given the clean prediction. Architecture sheet 7."""

import torch
from torch import Tensor

from musubi_tuner.flow.noising import x0_to_velocity

STOCHASTIC_SEED_OFFSET = 10000
"""The noise of ancestral steps is drawn apart from the initial noise: from the prompt's seed plus this."""


def euler_step(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Along the straight line from `x` (at `sigma` > 0) towards `x0`, in float32.

    x + (x - x0) / sigma * (sigma_next - sigma), which is x0 + (x - x0) sigma_next / sigma.
    """
    return x + x0_to_velocity(x, x0, sigma) * (sigma_next - sigma)


def ancestral_euler_step(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor, eta: float = 1.0) -> Tensor:
    """A longer Euler step and fresh noise on top, so that the level after it is `sigma_next` all the same.

    r = 1 + (s'/s - 1) eta and down = s' r; x goes to level `down`, is scaled by a = (1 - s') / (1 - down), and gets
    noise of strength sqrt(s'^2 - (a down)^2). The last step, to 0, returns `x0`. Distilled 2.5 checkpoints are sampled so.
    """
    if float(sigma_next) == 0:
        return x0
    down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    x = euler_step(x, x0, sigma, down)
    signal = (1 - sigma_next) / (1 - down)
    strength = torch.sqrt((sigma_next**2 - (signal * down) ** 2).clamp(min=0))
    return signal * x + strength * noise
