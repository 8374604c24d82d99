"""Noise levels: formats, samplers, draws."""

import math

import pytest
import torch

from musubi_tuner.flow.path import (
    TIMESTEP_FORMATS,
    add_noise,
    model_sigma,
    to_sigma,
    to_timestep,
    velocity_target,
    velocity_to_x0,
    x0_to_velocity,
)
from musubi_tuner.flow.schedule import mu_for_tokens
from musubi_tuner.flow.sigma import SigmaSettings, draw_sigma, loss_weight, stretched
from musubi_tuner.runtime.draws import generator_for


@pytest.mark.parametrize("name", TIMESTEP_FORMATS)
def test_every_format_comes_back_to_the_same_sigma(name):
    sigma = torch.linspace(0, 1, 1001)
    assert float((to_sigma(to_timestep(sigma, name), name) - sigma).abs().max()) < 1e-6
    assert torch.equal(model_sigma(sigma, name), to_sigma(to_timestep(sigma, name), name))


def test_formats_mean_what_the_documents_say():
    half = torch.tensor(0.5)
    assert [float(to_timestep(half, name)) for name in TIMESTEP_FORMATS] == [500.5, 500.0, 0.5]
    with pytest.raises(ValueError, match="flowmatch_1_1000"):
        to_timestep(half, "other")


def test_noising_and_velocity_are_one_line():
    clean, noise, sigma = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([[0.2], [0.5], [0.9]])
    x = add_noise(clean, noise, sigma)
    velocity = velocity_target(clean, noise)
    assert torch.allclose(velocity_to_x0(x, velocity, sigma), clean, atol=1e-6)
    assert torch.allclose(x0_to_velocity(x, clean, sigma), velocity, atol=1e-5)


@pytest.mark.parametrize("tokens", [576, 1024, 4096, 6144])
def test_shifted_logit_normal_has_the_quantiles_of_its_formula(tokens):
    generator = torch.Generator().manual_seed(1)
    draws = torch.tensor([draw_sigma(SigmaSettings(), tokens, generator) for _ in range(20000)], dtype=torch.float64)
    grid = torch.erfinv(2 * torch.linspace(0.0005, 0.9995, 4000, dtype=torch.float64) - 1) * 2**0.5
    normal = torch.tensor([stretched(float(value), mu_for_tokens(tokens)) for value in grid], dtype=torch.float64)
    for level in (0.05, 0.2, 0.5, 0.8, 0.95):
        value = float(draws.quantile(level))
        mixed = 0.9 * float((normal <= value).double().mean()) + 0.1 * value
        assert abs(mixed - level) < 0.015
    assert float(draws.min()) >= 0 and float(draws.max()) <= 1


def test_uniform_covers_the_range_evenly():
    generator = torch.Generator().manual_seed(2)
    draws = torch.tensor([draw_sigma(SigmaSettings(kind="uniform"), 1000, generator) for _ in range(20000)]).sort().values
    assert float((draws - torch.linspace(0, 1, 20000)).abs().max()) < 0.015


def test_draws_depend_on_names_alone():
    one = torch.randn(4, generator=generator_for(1, "train", 0, "a"))
    assert torch.equal(one, torch.randn(4, generator=generator_for(1, "train", 0, "a")))
    assert not torch.equal(one, torch.randn(4, generator=generator_for(1, "train", 1, "a")))
    assert not torch.equal(one, torch.randn(4, generator=generator_for(2, "train", 0, "a")))


@pytest.mark.parametrize("normal", [-2.58, -2.6, -3.5, -8.0])
def test_draws_below_eps_are_reflected(normal):
    """Below the low percentile the ratio is negative or nearly 0; reflected, it is above eps, so no step learns at a level of 0."""
    low, high = (1 / (1 + math.exp(-(1.5 + edge))) for edge in (-2.5758, 3.0902))
    ratio = (1 / (1 + math.exp(-(1.5 + normal))) - low) / (high - low)
    assert ratio < 1e-3
    assert stretched(normal, 1.5) == pytest.approx(2e-3 - ratio, rel=1e-12) and stretched(normal, 1.5) > 1e-3


def test_the_deviation_of_the_sampler_stretches_draws_and_percentiles_alike():
    edges = [1 / (1 + math.exp(-(0.7 + 2.5 * edge))) for edge in (-2.5758, 3.0902)]
    for normal in (-1.2, 0.0, 0.9):
        ratio = (1 / (1 + math.exp(-(0.7 + 2.5 * normal))) - edges[0]) / (edges[1] - edges[0])
        assert stretched(normal, 0.7, std=2.5) == pytest.approx(ratio, rel=1e-9)


@pytest.mark.parametrize(("scheme", "wanted"), [("sigma_sqrt", 0.4**2 / 0.2**2), ("cosmap", (1 - 0.8 + 0.32) / (1 - 0.4 + 0.08))])
def test_weights_by_noise_level_have_the_ratios_of_their_formulas(scheme, wanted):
    first, second = (loss_weight(scheme, sigma, SigmaSettings(), 1000) for sigma in (0.2, 0.4))
    assert first / second == pytest.approx(wanted, rel=1e-9)
    least, below = (loss_weight("sigma_sqrt", sigma, SigmaSettings(), 1000) for sigma in (0.05, 0.01))
    assert least == below, "no weight is above that of 0.05"
