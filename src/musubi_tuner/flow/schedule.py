"""The noise levels that sampling passes through, from 1 (noise) to 0 (clean), their shift by sequence length, and one step between them."""

import math
from typing import Literal

import torch
from torch import Tensor

from musubi_tuner.flow.path import x0_to_velocity
from musubi_tuner.runtime.errors import UserError

BASE_TOKENS, BASE_MU = 1024, 0.95
MAX_TOKENS, MAX_MU = 4096, 2.05


def mu_for_tokens(tokens: int) -> float:
    """mu(N) = 0.95 + 1.10 (N - 1024) / 3072, linear and not clamped (docs/explanation/model.md, "Noise levels")."""
    return BASE_MU + (MAX_MU - BASE_MU) * (tokens - BASE_TOKENS) / (MAX_TOKENS - BASE_TOKENS)


TERMINAL = 0.1
"""The last noise level above zero of the official schedule."""

_DISTILLED = {
    1: (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0),
    2: (0.909375, 0.725, 0.421875, 0.0),
}


def ltx2_sigmas(steps: int, tokens: int = MAX_TOKENS) -> Tensor:
    """The official schedule: evenly spaced levels, shifted by length, stretched so that the last one above zero is `TERMINAL`.

    s = e^mu / (e^mu + 1/t - 1), then 1 - (1 - s) (1 - TERMINAL) / (1 - s_last). The official pipelines always take mu of
    4096 tokens, whatever the size of the clip.

    Returns:
        (steps + 1,) float32, falling, ends with 0. A single step is [1, 0]: there is nothing to stretch.
    """
    levels = _even_levels(steps)
    shift = math.exp(mu_for_tokens(tokens))
    shifted = shift / (shift + 1 / levels - 1)
    rest = 1 - shifted
    if steps > 1:
        shifted = 1 - rest * (1 - TERMINAL) / rest[-1]
    return _with_zero(shifted)


def distilled_sigmas(stage: Literal[1, 2] = 1) -> Tensor:
    """The fixed levels of distilled checkpoints: (9,) for the first stage, (4,) for the refining one."""
    return torch.tensor(_DISTILLED[stage], dtype=torch.float32)


def flowmatch_discrete_sigmas(steps: int, shift: float) -> Tensor:
    """Evenly spaced levels t, shifted: s t / (1 + (s - 1) t), as musubi-tuner samples its other models. (steps + 1,) float32."""
    levels = _even_levels(steps)
    return _with_zero(shift * levels / (1 + (shift - 1) * levels))


def shift_of_ltx2(tokens: int = MAX_TOKENS) -> float:
    """The shift e^mu of the official schedule: 7.77 at 4096 tokens. Without the stretch both schedules then agree."""
    return math.exp(mu_for_tokens(tokens))


def _even_levels(steps: int) -> Tensor:
    if steps < 1:
        raise UserError(f"{steps} sampling steps: 1 at least.")
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]


def _with_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)]).float()


STOCHASTIC_SEED_OFFSET = 10000
"""The noise of ancestral steps is drawn separately from the initial noise, from the prompt's seed plus this."""


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
