"""Schedules against their closed forms."""

import math

import pytest
import torch

from musubi_tuner.flow.schedule import distilled_sigmas, flowmatch_discrete_sigmas, ltx2_sigmas, shift_of_ltx2
from musubi_tuner.runtime.errors import UserError


@pytest.mark.parametrize(("steps", "tokens"), [(40, 4096), (30, 4096), (8, 1024), (2, 6144)])
def test_ltx2_schedule_is_the_formula_of_the_sheet(steps: int, tokens: int) -> None:
    mu = 0.95 + 1.10 * (tokens - 1024) / 3072
    shifted = [math.exp(mu) / (math.exp(mu) + 1 / (1 - i / steps) - 1) for i in range(steps)]
    expected = [1 - (1 - s) * 0.9 / (1 - shifted[-1]) for s in shifted] + [0.0]
    assert torch.allclose(ltx2_sigmas(steps, tokens), torch.tensor(expected), atol=1e-7, rtol=0)


def test_ltx2_schedule_falls_from_one_to_a_tenth_and_zero() -> None:
    sigmas = ltx2_sigmas(30)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (31,)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and sigmas[-2] == pytest.approx(0.1)
    assert bool((sigmas.diff() < 0).all())


def test_one_step_goes_from_noise_to_clean() -> None:
    assert ltx2_sigmas(1).tolist() == [1, 0]
    assert flowmatch_discrete_sigmas(1, 5.0).tolist() == [1, 0]


def test_distilled_levels_are_the_published_ones() -> None:
    first = [1, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0]
    assert distilled_sigmas().tolist() == torch.tensor(first).tolist()
    assert distilled_sigmas(2).tolist() == torch.tensor(first[5:]).tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0, 14.5])
def test_flowmatch_discrete_is_musubis_shift(shift: float) -> None:
    t = torch.tensor([1 - i / 10 for i in range(10)] + [0.0], dtype=torch.float64)
    assert torch.allclose(flowmatch_discrete_sigmas(10, shift).double(), shift * t / (1 + (shift - 1) * t), atol=1e-7)


def test_the_schedules_differ_by_the_stretch_alone() -> None:
    plain = flowmatch_discrete_sigmas(20, shift_of_ltx2())
    rest = 1 - plain[:-1]
    assert torch.allclose(1 - rest * 0.9 / rest[-1], ltx2_sigmas(20)[:-1], atol=1e-6)


def test_zero_steps_are_refused() -> None:
    with pytest.raises(UserError, match="0 sampling steps"):
        ltx2_sigmas(0)
