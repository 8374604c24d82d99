"""A run as `setup` builds it: everything that the loop and its hooks need, and nothing that changes after."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.dataset.draws import DrawRules
from musubi_tuner.dataset.items import BatchPlan, Item
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.networks.whole import TrainedNetwork
from musubi_tuner.placement.planning import Placement
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.training.balance import AudioBalance
from musubi_tuner.training.metrics import Trackers
from musubi_tuner.training.objective import BatchObjective
from musubi_tuner.training.optimizer import WeightAverage, evaluating
from musubi_tuner.training.state import LAST_STEP, Watched
from musubi_tuner.training.watch import AudioSupervision
from musubi_tuner.training.weight_steps import WeightSteps

_VALIDATIONS_PER_RUN = 10

WriteWhole = Callable[[Path, Mapping[str, Tensor], torch.dtype, Mapping[str, str]], None]
"""(path, {official name: trained weight}, dtype, metadata): write a whole checkpoint, the rest of which is the one that was started from.
Raises OSError where it cannot be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When things happen, in optimizer steps."""

    total: int
    steps_per_epoch: float
    save_every: int | None
    save_every_epochs: int | None
    validate_every: int | None
    preview_every: int | None
    preview_every_epochs: int | None
    preview_first: bool
    log_every: int

    def epoch(self, step: int) -> int:
        """Whole passes over the data after `step` steps."""
        return int((step + 1e-9) / self.steps_per_epoch)

    def is_due(self, step: int, every: int | None, every_epochs: int | None) -> bool:
        """Whether `step` is a multiple of `every`, or the first one that completes a multiple of `every_epochs` epochs."""
        by_step = bool(every) and step % every == 0
        return by_step or (bool(every_epochs) and self.epoch(step) // every_epochs > self.epoch(step - 1) // every_epochs)

    def is_looked_at(self, step: int) -> bool:
        """Whether anything reads the weights after `step`: it saves, validates or previews."""
        due = [(self.save_every, self.save_every_epochs), (self.validate_every, None), (self.preview_every, self.preview_every_epochs)]
        return step == self.total or any(self.is_due(step, every, every_epochs) for every, every_epochs in due)

    @property
    def unsaved(self) -> int:
        """Steps before the first that is saved."""
        every, epochs = self.save_every, self.save_every_epochs
        return next(step for step in itertools.count(1) if step >= self.total or self.is_due(step, every, epochs)) - 1


def make_schedule(config: TrainingConfig, items: Sequence[Item], processes: int, *, has_validation: bool) -> Schedule:
    """When the run ends, saves, validates and previews."""
    optimization, saving, preview = config.optimization, config.saving, config.preview
    batches = BatchPlan(items, optimization.seed).batches_per_epoch
    batches_per_step = optimization.gradient_accumulation_steps * processes
    total = optimization.max_train_steps
    if optimization.max_train_epochs is not None:
        total = max(1, -(-optimization.max_train_epochs * batches // batches_per_step))
        if total > LAST_STEP:
            raise UserError(f"--max_train_epochs {optimization.max_train_epochs}: makes {total} steps; there may be {LAST_STEP}.")
    every = config.logging.validate_every_n_steps or max(1, total // _VALIDATIONS_PER_RUN)
    return Schedule(
        total=total,
        steps_per_epoch=batches / batches_per_step,
        save_every=saving.save_every_n_steps,
        save_every_epochs=saving.save_every_n_epochs,
        validate_every=every if has_validation else None,
        preview_every=preview.sample_every_n_steps,
        preview_every_epochs=preview.sample_every_n_epochs,
        preview_first=preview.sample_at_first,
        log_every=config.logging.log_every_n_steps,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where a run is trained."""

    processes: Processes
    device: torch.device
    dtype: torch.dtype
    """Of the frozen weights and of the arithmetic."""
    trackers: Trackers


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """One run."""

    config: TrainingConfig
    processes: Processes
    device: torch.device
    dtype: torch.dtype
    """As of `Machine`."""
    wrapper: OfficialLTXV2Wrapper
    network: TrainedNetwork
    objective: BatchObjective
    optimizer: Optimizer
    weight_steps: WeightSteps | None
    """Takes the optimizer's steps where the model's own weights are trained; None where the optimizer does so itself."""
    scheduler: LRScheduler
    items: Sequence[Item]
    rules: DrawRules
    schedule: Schedule
    start_step: int
    turn: int
    """How often it has gone back behind steps that were saved."""
    settings: Mapping[str, Any]
    """What the state remembers, to list what differs on resume."""
    facts: Mapping[str, object]
    """Entries of the file's metadata."""
    write_whole: WriteWhole | None
    """Writes the file where the model's own weights are trained; None where a network is."""
    trackers: Trackers
    balance: AudioBalance | None
    """None where the audio loss has a fixed weight."""
    supervision: AudioSupervision
    average: WeightAverage | None
    """None where the weights count as they are."""
    watched: Mapping[str, Watched]
    """What has a state of its own beside network and optimizer."""
    shards: int
    """Processes that hold a part each of the model that they train; 1 = each holds all of what it trains."""
    placement: Placement
    """How the model is held and run."""
    notes: Sequence[tuple[str, str]]
    """What was measured of it: rows for the banner."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Weights as they are to be saved and looked at; the model is in eval mode, so that nothing is compiled for it (`BlockEngine`)."""
        with evaluating(self.optimizer), nullcontext() if self.average is None else self.average.applied():
            self.wrapper.eval()
            try:
                yield
            finally:
                self.wrapper.train()

    @property
    def updates_within_backward(self) -> bool:
        """`--fused_backward_pass`"""
        return self.config.optimization.fused_backward_pass

    @property
    def output_dir(self) -> Path:
        return self.config.saving.output_dir

    @property
    def name(self) -> str:
        return self.config.saving.output_name


@dataclass(slots=True)
class Outcome:
    """What a run did, for its last table."""

    step: int
    """The last one that is whole."""
    torn: bool = False
    """Whether the step after it has ended in the middle of its update, so that the weights lie between the two."""
    random_state: Tensor = field(default_factory=torch.get_rng_state)
    """torch's, at the end of that step."""
    seconds: float = 0.0
    stepping: float = 0.0
    """Seconds of the steps alone, without what lies between them."""
    losses: dict[str, float] = field(default_factory=dict)
    first_validation: dict[str, float] = field(default_factory=dict)
    last_validation: dict[str, float] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    interrupted: bool = False
