"""Everything that the loop needs, built by `setup` and not changed after."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.dataset.collate import DrawRules
from musubi_tuner.dataset.items import Item
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, OfficialLTXV2Wrapper
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.training.averaging import WeightAverage
from musubi_tuner.training.balance import AudioBalance
from musubi_tuner.training.loss import ErrorFunction
from musubi_tuner.training.optimizer import evaluating
from musubi_tuner.training.preservation import BaseModel, PromptPreservation
from musubi_tuner.training.state import Watched
from musubi_tuner.training.supervision import AudioSupervision
from musubi_tuner.training.trackers import Trackers
from musubi_tuner.training.validation import Validator

Preview = Callable[[OfficialLTXV2Wrapper, int, int], None]
"""(wrapper, step, epoch): make the preview clips of this moment."""


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

    def ends_epoch(self, step: int, every: int | None) -> bool:
        """Whether `step` is the first one that completes a multiple of `every` epochs."""
        return bool(every) and self.epoch(step) // every > self.epoch(step - 1) // every


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """One run."""

    config: TrainingConfig
    processes: Processes
    device: torch.device
    wrapper: OfficialLTXV2Wrapper
    network: LoRANetwork
    optimizer: Optimizer
    scheduler: LRScheduler
    items: Sequence[Item]
    rules: DrawRules
    schedule: Schedule
    start_step: int
    settings: Mapping[str, Any]
    """What the state remembers, to list what differs on resume."""
    facts: Mapping[str, object]
    """Entries of the LoRA file's metadata."""
    trackers: Trackers
    error: ErrorFunction
    balance: AudioBalance | None
    """None where the audio loss has a fixed weight."""
    supervision: AudioSupervision
    watched: Mapping[str, Watched]
    """What has a state of its own beside network and optimizer."""
    average: WeightAverage | None
    """None where the weights count as they are."""
    base: BaseModel
    prompt_preservation: PromptPreservation | None
    preview: Preview | None
    validator: Validator | None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Weights as they are to be saved and looked at; the model evaluates (`BlockEngine`)."""
        with evaluating(self.optimizer), nullcontext() if self.average is None else self.average.applied():
            self.wrapper.eval()
            try:
                yield
            finally:
                self.wrapper.train()

    @property
    def output_dir(self) -> Path:
        return self.config.saving.output_dir

    @property
    def name(self) -> str:
        return self.config.saving.output_name
