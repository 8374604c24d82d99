"""Guidance against its closed form."""

import pytest
import torch

from musubi_tuner.flow.guidance import OFF, GuidanceScales, defaults_for, guide
from musubi_tuner.flow.path import velocity_to_x0


def test_guidance_is_the_sum_of_the_differences(global_seed: None) -> None:
    c, n, s, m = torch.randn(4, 1, 6, 8).unbind(0)
    scales = GuidanceScales(cfg=3.0, stg=0.5, modality=2.5)
    expected = c + 2 * (c - n) + 0.5 * (c - s) + 1.5 * (c - m)
    assert torch.allclose(guide(c, scales, negative=n, perturbed=s, isolated=m), expected, atol=1e-6)


def test_full_rescale_restores_the_spread(global_seed: None) -> None:
    c, n = torch.randn(2, 1, 6, 8).unbind(0)
    guided = guide(c, GuidanceScales(cfg=5.0, rescale=1.0), negative=n)
    assert guided.std().item() == pytest.approx(c.std().item(), rel=1e-6)


def test_velocity_guidance_agrees_only_without_rescale(global_seed: None) -> None:
    x, v_c, v_n = torch.randn(3, 1, 6, 8).unbind(0)
    sigma = torch.tensor(0.6)
    c, n = velocity_to_x0(x, v_c, sigma), velocity_to_x0(x, v_n, sigma)
    in_velocity = velocity_to_x0(x, v_c + 2 * (v_c - v_n), sigma)
    assert torch.allclose(guide(c, GuidanceScales(cfg=3.0), negative=n), in_velocity, atol=1e-5)
    assert not torch.allclose(guide(c, GuidanceScales(cfg=3.0, rescale=0.7), negative=n), in_velocity, atol=1e-2)


def test_nothing_to_guide_by_returns_the_prediction_itself(global_seed: None) -> None:
    c = torch.randn(1, 6, 8)
    assert guide(c, OFF) is c
    assert guide(c, GuidanceScales(rescale=0.7)) is c


@pytest.mark.parametrize(("version", "steps", "block"), [("2.0", 40, 29), ("2.3", 30, 28), ("2.5", 30, 28)])
def test_defaults_are_the_official_ones(version: str, steps: int, block: int) -> None:
    defaults = defaults_for(version)
    assert (defaults.steps, defaults.stg_blocks) == (steps, (block,))
    assert (defaults.video.cfg, defaults.audio.cfg) == (3.0, 7.0)
    assert {(s.stg, s.rescale, s.modality) for s in (defaults.video, defaults.audio)} == {(1.0, 0.7, 3.0)}
