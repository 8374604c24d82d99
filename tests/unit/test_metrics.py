"""Losses by range of noise level."""

import pytest
import torch

from musubi_tuner.training.metrics import NoiseLevelMeter
from musubi_tuner.training.objective import ItemLosses
from musubi_tuner.training.report import _short


def test_the_last_table_shows_no_small_loss_as_zero():
    assert [_short(value) for value in (2.7291e-7, 0.77824, -8.35, 0.0)] == ["2.73e-07", "0.7782", "-8.3500", "0.0000"]


def test_losses_are_sorted_by_their_own_streams_noise_level():
    meter = NoiseLevelMeter(torch.device("cpu"))
    losses = ItemLosses(
        video=torch.tensor([1.0, 3.0, 8.0]),
        audio=torch.tensor([2.0, 9.0, 4.0]),
        audio_present=torch.tensor([True, False, True]),
        video_present=None,
    )
    meter.add(losses, video_sigma=torch.tensor([0.0, 0.2, 1.0]), audio_sigma=torch.tensor([0.25, 0.3, 0.6]))
    meter.add(losses, video_sigma=torch.tensor([0.5, 0.5, 0.5]), audio_sigma=torch.tensor([0.49, 0.3, 0.6]))
    assert meter.means(meter.take(processes=1).tolist()) == pytest.approx(
        {
            "noise_level/loss_video_0.00-0.25": 2.0,
            "noise_level/loss_video_0.50-0.75": 4.0,
            "noise_level/loss_video_0.75-1.00": 8.0,
            "noise_level/loss_audio_0.25-0.50": 2.0,
            "noise_level/loss_audio_0.50-0.75": 4.0,
        }
    )
    assert meter.means(meter.take(processes=1).tolist()) == {}, "each look starts again"


def test_a_video_that_is_given_has_no_part():
    meter = NoiseLevelMeter(torch.device("cpu"))
    sigma = torch.tensor([0.1, 0.1])
    meter.add(
        ItemLosses(video=torch.tensor([0.0, 5.0]), audio=None, audio_present=None, video_present=torch.tensor([False, True])), sigma, sigma
    )
    assert meter.means(meter.take(processes=1).tolist()) == {"noise_level/loss_video_0.00-0.25": 5.0}
