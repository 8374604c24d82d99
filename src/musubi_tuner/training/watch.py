"""What is watched while a run trains: gradients that are not finite, the pace, and whether audio is really supervised."""

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
import torch.distributed
from torch import Tensor

from musubi_tuner.config.losses import AudioOptions
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.objective import ItemLosses

SeenItems = Sequence[tuple[tuple[str, ...], ItemLosses]]
"""Names and losses of the items of each micro-batch."""


def check_finite(step: int, norm: Tensor, seen: SeenItems) -> None:
    """Look at a step before its update, so that the weights of the step before are there to be saved. The host waits for the device here.

    Args:
        norm: () gradient norm of the step.

    Raises:
        UserError: it is not finite.
    """
    if not bool(torch.isfinite(norm)):
        raise not_finite(step, seen)


def not_finite(step: int, seen: SeenItems) -> UserError:
    """The error of a step whose gradient norm is not finite; names the items whose losses are not."""
    rows = []
    for names, losses in seen:
        for stream, values in (("video", losses.video), ("audio", losses.audio)):
            found = [] if values is None else values.tolist()
            rows += [f"{stream} loss {value} of {name}" for value, name in zip(found, names) if not math.isfinite(value)]
    items = ", ".join(name for names, _ in seen for name in names)
    where = "; ".join(rows) or f"the losses are finite, a gradient is not; items {items}"
    return UserError(
        f"step {step}: not finite: {where}. Nothing of this step is saved. "
        "Check these items' caches, or lower --learning_rate, and resume from the last state."
    )


def not_finite_within(step: int, weight: str, names: Sequence[str]) -> UserError:
    """The error of a step whose weights are updated within its backward pass."""
    return UserError(
        f"step {step}: not finite: the gradient of {weight}; items {', '.join(names)}. Check these items' caches, or lower "
        "--learning_rate, and resume from the last state."
    )


class Pace:
    """Compares the median of the last steps with that of the first: memory that is short, or a card that gets hot, slows a run down."""

    FIRST = 5
    """Steps that are not counted: kernels are chosen and compiled in them."""
    WINDOW = 20
    DRIFT = 1.3

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._usual: float | None = None
        self._reported = 1.0

    def add(self, seconds: float) -> str | None:
        """Take in one step; returns a warning the first time that steps have become slower by a third, and each time by a third more.

        Args:
            seconds: of the step alone, without saving and previews.
        """
        self._seconds.append(seconds)
        if len(self._seconds) == self.FIRST + self.WINDOW and self._usual is None:
            self._usual = statistics.median(self._seconds[self.FIRST :])
        if self._usual is None:
            return None
        self._seconds = self._seconds[-self.WINDOW :]
        ratio = statistics.median(self._seconds) / self._usual if len(self._seconds) == self.WINDOW else 1.0
        if ratio < self.DRIFT * self._reported:
            return None
        self._reported = ratio
        return (
            f"steps have become slower: {self._usual:.3f} s in the beginning, {self._usual * ratio:.3f} s now ({ratio:.1f} times). "
            "Another program on the card or in memory, a hot card, or a full disk under the caches are usual causes."
        )


class AudioSupervision:
    """Strict audio: counts on the host, from what batches know of themselves, whether the items that should have audio really have it."""

    def __init__(self, options: AudioOptions) -> None:
        self._options = options
        self.expected = 0
        self.supervised = 0
        self._warned = False

    def add(self, expected: int, supervised: int) -> None:
        """
        Args:
            expected: items of a batch that should have audio: clips, whose audio is not conditioning.
            supervised: those of them that have it.
        """
        self.expected += expected
        self.supervised += supervised

    def check(self, step: int, device: torch.device, processes: int) -> str | None:
        """Look at the share after a step, over all processes; returns a warning where the mode is `warn`, once.

        Raises:
            UserError: the share is too small, and the mode is `error`.
        """
        options = self._options
        if options.audio_supervision_mode == "off" or step <= options.audio_supervision_warmup_steps:
            return None
        expected, supervised = self.expected, self.supervised
        if processes > 1:
            totals = torch.tensor([expected, supervised], device=device)
            torch.distributed.all_reduce(totals)
            expected, supervised = totals.tolist()
        if not expected or supervised >= options.audio_supervision_min_ratio * expected:
            return None
        text = (
            f"step {step}: {supervised} of {expected} items that should have sound had it ({supervised / expected:.0%}); "
            f"--audio_supervision_min_ratio is {options.audio_supervision_min_ratio:g}. Clips without an audio stream "
            "are listed by ltxv2_cache_audio_latents.py; give them sound, take them out of the dataset file, or lower the ratio."
        )
        if options.audio_supervision_mode == "error":
            raise UserError(text)
        warned, self._warned = self._warned, True
        return None if warned else text

    def state_dict(self) -> dict[str, int]:
        return {"expected": self.expected, "supervised": self.supervised}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.expected, self.supervised = int(state["expected"]), int(state["supervised"])
