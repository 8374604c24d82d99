"""What is watched during a run: finite gradients, and the pace."""

import signal

import pytest
import torch

from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.signals import Interrupt
from musubi_tuner.training.objective import ItemLosses
from musubi_tuner.training.watch import FiniteCheck, Pace


def losses(value: float) -> ItemLosses:
    return ItemLosses(video=torch.tensor([0.5, value]), audio=None, audio_present=None, video_present=None)


def test_gradients_that_are_not_finite_end_the_run_and_name_the_items():
    check = FiniteCheck()
    check.add(1, torch.tensor(1.0), [(("a", "b"), losses(0.1))])
    check.settle()
    with pytest.raises(UserError, match="step 2: not finite: video loss nan of b.*resume"):
        check.add(2, torch.tensor(float("nan")), [(("a", "b"), losses(float("nan")))])
    with pytest.raises(UserError, match="step 3.*a gradient is not; items a, b"):
        check.add(3, torch.tensor(float("inf")), [(("a", "b"), losses(0.1))])
    check.settle()


def test_steps_that_become_slower_are_told_of_and_not_every_step():
    pace = Pace()
    told = [pace.add(9.0 if step < 5 else 0.1) for step in range(60)]
    assert not any(told), "the first steps do not count, and an even pace is no news"
    told = [message for _ in range(60) if (message := pace.add(0.2))]
    assert 1 <= len(told) <= 2 and "0.100 s in the beginning" in told[0]
    assert not any(pace.add(0.2) for _ in range(40))
    assert any(pace.add(0.6) for _ in range(40))


def test_the_first_ctrl_c_says_what_it_does_and_the_second_ends_at_once(capfd):
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested and "Ctrl-C again ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
