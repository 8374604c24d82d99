"""Whether gradients are finite, asked without making the host wait for the device: the answer of a step is read during the next one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.transfer import HostCopy, to_host
from musubi_tuner.training.loss import ItemLosses

Seen = Sequence[tuple[tuple[str, ...], ItemLosses]]
"""Names and losses of the items of each micro-batch."""


@dataclass(frozen=True, slots=True)
class _Pending:
    step: int
    norm: HostCopy
    seen: Seen


class FiniteCheck:
    """Ends a run whose gradients are not finite. On the CPU at once; on a GPU one step later, and before anything is saved."""

    def __init__(self) -> None:
        self._pending: _Pending | None = None

    def add(self, step: int, norm: Tensor, seen: Seen) -> None:
        """
        Args:
            norm: () gradient norm of the step.

        Raises:
            UserError: the step before, or on the CPU this one, was not finite.
        """
        self.settle()
        self._pending = _Pending(step, to_host(norm.detach()), seen)
        if not norm.is_cuda:
            self.settle()

    def settle(self) -> None:
        """Look at what is still open; call it before saving.

        Raises:
            UserError: it is not finite.
        """
        pending, self._pending = self._pending, None
        if pending is not None and not bool(torch.isfinite(pending.norm.result())):
            raise UserError(_message(pending.step, pending.seen))


def _message(step: int, seen: Seen) -> str:
    rows = []
    for names, losses in seen:
        for stream, values in (("video", losses.video), ("audio", losses.audio)):
            if values is not None:
                rows += [
                    f"{stream} loss {value} of {name}"
                    for name, value in zip(names, values.tolist(), strict=True)
                    if value != value or abs(value) == float("inf")
                ]
    where = "; ".join(rows) or "the losses are finite, a gradient is not; items " + ", ".join(name for names, _ in seen for name in names)
    return (
        f"step {step}: not finite: {where}. Nothing of this step was saved; the last saved file is good. "
        "Check these items' caches, or lower --learning_rate, and resume from the last state."
    )
