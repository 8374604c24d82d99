"""What is watched during a run: finite gradients, and the pace."""

import signal

import pytest
import torch

from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.signals import Interrupt
from musubi_tuner.training.objective import ItemLosses
from musubi_tuner.training.watch import Pace, check_finite


def losses(value: float) -> ItemLosses:
    return ItemLosses(video=torch.tensor([0.5, value]), audio=None, audio_present=None, video_present=None)


class OnCard(torch.Tensor):
    """A number that says that it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("place", [torch.Tensor, OnCard])
def test_gradients_that_are_not_finite_end_the_run_before_their_update_and_name_the_items(place):
    def check(step: int, norm: float, loss: float) -> None:
        check_finite(step, torch.tensor(norm).as_subclass(place), [(("a", "b"), losses(loss))])

    check(1, 1.0, 0.1)
    with pytest.raises(UserError, match="step 2: not finite: video loss nan of b.*resume"):
        check(2, float("nan"), float("nan"))
    with pytest.raises(UserError, match="step 3.*a gradient is not; items a, b"):
        check(3, float("inf"), 0.1)


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
