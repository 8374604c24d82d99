"""The second-order sampler against its definition, and against the official step of noise where ltx-core is installed."""

import math

import pytest
import torch

from musubi_tuner.flow.res_2s import LAST_LEVEL, Res2Step, normal_noise, with_fresh_noise
from musubi_tuner.generation.samplers import sample


def test_a_step_without_noise_is_of_second_order():
    """x' = (x - x0(x)) / s with x0(x) = tanh(x): halving the steps quarters the error."""

    def solve(steps: int) -> float:
        levels = torch.logspace(0, -1, steps + 1, dtype=torch.float64).tolist()
        x = torch.tensor(1.5, dtype=torch.float64)
        for sigma, following in zip(levels, levels[1:], strict=False):
            step = Res2Step.between(sigma, following)
            x = step.to_end(x, torch.tanh(x), torch.tanh(step.to_middle(x, torch.tanh(x))))
        return float(x)

    exact = solve(4096)
    errors = [abs(solve(steps) - exact) for steps in (8, 16, 32)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2) and errors[1] / errors[2] == pytest.approx(4, rel=0.2)


def test_a_constant_prediction_is_reached_along_the_line():
    """With x0 constant the exact solution is x0 + (x - x0) s' / s."""
    step, x, x0 = Res2Step.between(0.8, 0.3), torch.tensor(2.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    assert float(step.to_end(x, x0, x0)) == pytest.approx(-1 + 3 * 0.3 / 0.8)
    assert float(step.to_middle(x, x0)) == pytest.approx(-1 + 3 * step.middle / 0.8) and step.middle == pytest.approx(math.sqrt(0.24))


def test_the_anchor_is_what_the_official_iteration_ends_at():
    step, middle, x0 = Res2Step.between(0.5, 0.35), torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.2, dtype=torch.float64)
    x = torch.tensor(0.9, dtype=torch.float64)
    anchor, start = step.anchor(x, middle, x0), x
    for _ in range(100):
        start = middle - step.h * step.a * (x0 - start)
    assert float(anchor) == pytest.approx(float(start), abs=1e-12)
    assert Res2Step.between(0.9, 0.4).anchor(x, middle, x0) is x, "a long step keeps its start"


def test_fresh_noise_is_the_official_step():
    steps = pytest.importorskip("ltx_core.components.diffusion_steps")
    generator = torch.Generator().manual_seed(3)
    x, moved, noise = (torch.randn(1, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    sigmas = torch.tensor([0.7, 0.4], dtype=torch.float64)
    theirs = steps.Res2sDiffusionStep().step(sample=x, denoised_sample=moved, sigmas=sigmas, step_index=0, noise=noise)
    assert torch.allclose(with_fresh_noise(x, moved, 0.7, 0.4, noise), theirs, atol=1e-12)


def test_noise_has_mean_and_spread():
    noise = normal_noise(torch.Size([1, 50, 8]), torch.Generator().manual_seed(0))
    assert float(noise.mean()) == pytest.approx(0, abs=1e-12) and float(noise.std()) == pytest.approx(1)


def test_sampling_ends_with_a_prediction_just_above_zero_and_depends_on_the_seed_alone():
    seen = []

    def predict(values, sigma, step):
        seen.append((round(float(sigma), 4), step))
        return {name: 0.5 * value for name, value in values.items()}

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 100)
        levels = torch.tensor([0.9, 0.5, 0.0])
        start = {"video": torch.ones(1, 4, 3)}
        return sample("res_2s", start, levels, predict, lambda name, value: value, seed=seed, advance=lambda: None)["video"]

    first = run(1)
    assert [step for _, step in seen] == [1, 1, 2, 2, 2] and seen[-1][0] == LAST_LEVEL and first.dtype == torch.float32
    assert torch.equal(first, run(1)) and not torch.equal(first, run(2))
