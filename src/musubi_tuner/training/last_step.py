"""The newest step, whose numbers may still be on their way from the device.

A step may change the weights only if its gradients are finite. To know that, and to log its losses, the host would have to wait until the
device has done the step, and the device would then have nothing to do until the next one is issued. So the device itself refuses: an
optimizer of torch that is fused leaves weights and states as they are where `found_inf` is 1 (the protocol of torch.amp.GradScaler). The
numbers of a step travel beside the next one, and are read when that one has been issued up to its own update, long after they came in.

    host     issue step 1 | issue step 2 ... read step 1, update 2 | issue step 3 ... read step 2, update 3
    device                | step 1                  | step 2                      | step 3

A step that turns out not to be finite is then taken back on the host too, and the run ends. Whatever looks at the weights between two steps
(saving, validation, previews) is preceded by a reading. Other optimizers, an average of the weights and the CPU wait before each update.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from musubi_tuner.runtime.progress import Progress
from musubi_tuner.training.hooks import Reading, StepLog
from musubi_tuner.training.run import Outcome, TrainingRun
from musubi_tuner.training.watch import SeenItems, check_finite, not_finite


@dataclass(frozen=True, slots=True)
class _Before:
    """What the host knew before a step's update."""

    step: int
    random_state: Tensor
    rates: Sequence[Any]
    scheduler: Mapping[str, Any]
    watched: Mapping[str, Mapping[str, Any]]


class LastStep:
    """Lets steps with finite gradients alone reach the weights, and logs each step; used as a context around the steps."""

    def __init__(self, run: TrainingRun, outcome: Outcome, log: StepLog, bar: Progress) -> None:
        self._run, self._outcome, self._log, self._bar = run, outcome, log, bar
        optimizer: Any = run.optimizer
        self.device_refuses = bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and run.average is None
        """Whether a step that is not finite changes nothing on the device, so that the host need not wait for each."""
        self._before: _Before | None = None
        self._seen: SeenItems = ()
        self._norm: Reading | None = None
        self._line: Callable[[], None] | None = None

    def guard(self, step: int, norm: Tensor, seen: SeenItems) -> None:
        """To be called before the update of a step.

        Args:
            norm: () gradient norm of the step.

        Raises:
            UserError: the step before it was not finite; or this one is not, where the optimizer cannot refuse it.
        """
        self.settle()
        if not self.device_refuses:
            check_finite(step, norm, seen)
            return
        run, optimizer = self._run, self._run.optimizer
        self._before = _Before(
            step=self._outcome.step,
            random_state=self._outcome.random_state,
            rates=[group["lr"] for group in optimizer.param_groups],
            scheduler=run.scheduler.state_dict(),
            watched={name: one.state_dict() for name, one in run.watched.items()},
        )
        self._seen = seen
        self._norm = Reading(norm)
        scaled: Any = optimizer
        scaled.grad_scale, scaled.found_inf = None, (~torch.isfinite(norm)).float()

    def log(self, step: int, norm: Tensor) -> None:
        """Have the line of a step written, once its numbers are here."""
        taken = self._log.take(norm)
        self._line = lambda: self._write(step, taken)

    def _write(self, step: int, taken: Reading) -> None:
        self._outcome.losses = self._log.write(step, taken, self._bar)

    def settle(self) -> None:
        """Read what is on its way.

        Raises:
            UserError: the newest step was not finite; the host is back at the step before it.
        """
        norm, line = self._norm, self._line
        self._norm = self._line = None
        if norm is not None and not math.isfinite(norm.values()[0]):
            step = self._outcome.step
            self._take_back()
            raise not_finite(step, self._seen)
        if line is not None:
            line()

    def _take_back(self) -> None:
        run, before = self._run, self._before
        assert before is not None
        self._outcome.step, self._outcome.random_state = before.step, before.random_state
        run.scheduler.load_state_dict(dict(before.scheduler))
        for group, rate in zip(run.optimizer.param_groups, before.rates, strict=True):
            group["lr"] = rate
        for name, state in before.watched.items():
            run.watched[name].load_state_dict(dict(state))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """What ended the steps is told of; so is a step before it that was not finite."""
        if error is None:
            self.settle()
            return
        try:
            self.settle()
        except Exception as second:  # the device may be what has failed
            error.add_note(str(second))
