"""Sampling steps against exact velocity fields."""

import pytest
import torch

from musubi_tuner.flow.path import add_noise
from musubi_tuner.flow.schedule import ancestral_euler_step, euler_step, flowmatch_discrete_sigmas, ltx2_sigmas


@pytest.mark.parametrize("sigmas", [ltx2_sigmas(7), flowmatch_discrete_sigmas(9, 3.0)], ids=["ltx2", "flowmatch_discrete"])
def test_euler_lands_on_the_clean_sample_of_an_exact_field(sigmas: torch.Tensor, global_seed: None) -> None:
    clean, x = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = euler_step(x, clean, sigma, following)
    assert torch.allclose(x, clean, atol=1e-5)


def test_euler_stays_on_the_line_between_noise_and_clean(global_seed: None) -> None:
    clean, noise = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    sigma, following = torch.tensor(0.8), torch.tensor(0.3)
    moved = euler_step(add_noise(clean, noise, sigma), clean, sigma, following)
    assert torch.allclose(moved, add_noise(clean, noise, following), atol=1e-6)


def test_ancestral_step_keeps_the_noise_level(global_seed: None) -> None:
    """With nothing but noise in x (clean = 0), the spread after the step is the next level."""
    sigma, following = torch.tensor(0.9), torch.tensor(0.6)
    x = sigma * torch.randn(1, 200_000)
    moved = ancestral_euler_step(x, torch.zeros_like(x), sigma, following, torch.randn_like(x))
    assert moved.std().item() == pytest.approx(0.6, abs=5e-3)


def test_ancestral_step_without_eta_is_euler(global_seed: None) -> None:
    x, clean, noise = torch.randn(3, 1, 4, 8).unbind(0)
    sigma, following = torch.tensor(0.9), torch.tensor(0.6)
    assert torch.allclose(
        ancestral_euler_step(x, clean, sigma, following, noise, eta=0.0), euler_step(x, clean, sigma, following), atol=2e-4
    )


def test_ancestral_step_to_zero_is_the_prediction(global_seed: None) -> None:
    x, clean, noise = torch.randn(3, 1, 4, 8).unbind(0)
    assert torch.equal(ancestral_euler_step(x, clean, torch.tensor(0.4), torch.tensor(0.0), noise), clean)
