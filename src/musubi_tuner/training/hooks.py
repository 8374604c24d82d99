"""What happens around the steps of a run: logging, warnings, validation, previews. Saving is in `training.saving`."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.draws import DrawRules
from musubi_tuner.dataset.items import Draw, Item
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.runtime.device import free_memory
from musubi_tuner.runtime.disk import reason
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.progress import Progress
from musubi_tuner.training.balance import at_bound
from musubi_tuner.training.metrics import LossFile, LossMeter, NoiseLevelMeter, Reading, loss_path
from musubi_tuner.training.objective import FlowMatching, ItemLosses
from musubi_tuner.training.run import Outcome, TrainingRun
from musubi_tuner.training.watch import Pace

log = logging.getLogger(__name__)

_BALANCE_WARNED_EVERY = 100
VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)

Preview = Callable[[OfficialLTXV2Wrapper, int, int], Sequence[Path]]
"""(wrapper, step, epoch): make the preview clips of this moment; returns their files, in the order of the prompts."""


class StepLog:
    """Losses of the steps since the last line, on their way to the progress bar, the loss file and the trackers."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._losses, self._levels = LossMeter(run.device), NoiseLevelMeter(run.device)
        self._warned = False
        self._rate: float = math.nan
        self._multiplier = torch.ones((), device=run.device)
        self._told_of_bound = 0
        again = run.schedule.unsaved if run.config.saving.autoresume else 0
        self._file = LossFile(loss_path(run.output_dir, run.name), run.start_step, again) if run.processes.is_main else None

    def add(self, batch: Batch, losses: ItemLosses) -> None:
        """Take in a micro-batch, without waiting for the device."""
        self._losses.add(losses, batch.audio_expected, batch.audio_supervised)
        self._levels.add(losses, batch.video_sigma, batch.audio_sigma)

    def before_update(self) -> None:
        """Note what the step is made with: its update moves on to the next one's."""
        self._rate = self._run.optimizer.param_groups[0]["lr"]
        if self._run.balance is not None:
            self._multiplier = self._run.balance.multiplier()

    def take(self, norm: Tensor) -> Reading:
        """What was added, with the gradient norm, on its way to the host; for `write`."""
        run = self._run
        parts = [norm.flatten(), self._losses.take(run.processes.count), self._levels.take(run.processes.count)]
        if run.balance is not None:
            parts.append(self._multiplier.flatten())
        return Reading(torch.cat([part.double() for part in parts]))

    def write(self, step: int, taken: Reading, bar: Progress) -> dict[str, float]:
        """Write a line of a step everywhere, and return it."""
        run = self._run
        norm, *sums = taken.values()
        values = LossMeter.means(sums[: LossMeter.SIZE], run.config.ltx_mode)
        if run.balance is not None:
            values["audio_balance"] = sums[-1]
            if (message := at_bound(values["audio_balance"])) and step - self._told_of_bound >= _BALANCE_WARNED_EVERY:
                log.warning("WARNING: step %d: %s", step, message)
                self._told_of_bound = step
        values |= {"lr": self._rate, "grad_norm": norm}
        bar.show(**{key: f"{value:.4g}" for key, value in values.items()})
        levels = sums[LossMeter.SIZE :][: NoiseLevelMeter.SIZE]
        values |= NoiseLevelMeter.means(levels) | self._scaled_audio(values)
        self.report(step, values)
        return values

    def _scaled_audio(self, values: dict[str, float]) -> dict[str, float]:
        """What the audio loss counts for, where a balance or `--audio_loss_weight` sets its weight; a dataset's own weight aside."""
        weight = values.get("audio_balance", self._run.config.audio.audio_loss_weight)
        known = "loss_audio" in values and ("audio_balance" in values or weight != 1)
        return {"loss_audio_scaled": weight * values["loss_audio"]} if known else {}

    def report(self, step: int, values: dict[str, float]) -> None:
        """A line of the loss file, and of the trackers."""
        if self._file is not None:
            try:
                self._file.write(step, values)
            except OSError as error:  # the disk is full, the folder has gone
                if not self._warned:
                    log.warning("WARNING: step %d: %s: no line was added (%s); training goes on", step, self._file.path, reason(error))
                self._warned = True
        self._run.trackers.log(values, step)


class Hook:
    """Something that happens between steps, in every process."""

    def before_training(self, outcome: Outcome) -> None:
        """Before the first step of a run that starts at step 0."""

    def after_step(self, outcome: Outcome, seconds: float) -> None:
        """
        Args:
            outcome: what the run has done so far, `outcome.step` included; the hook adds to it what it has done itself.
            seconds: of the step alone.
        """


class Watching(Hook):
    """Says so where steps become slower, or too little audio is supervised."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._pace = Pace()

    def after_step(self, outcome: Outcome, seconds: float) -> None:
        run = self._run
        drifted = self._pace.add(seconds)
        unsupervised = run.supervision.check(outcome.step, run.device, run.processes.count)
        if drifted and run.processes.is_main:
            log.warning("WARNING: step %d: %s", outcome.step, drifted)
        if unsupervised and run.processes.is_main:
            log.warning("WARNING: %s", unsupervised)


@dataclass(frozen=True, slots=True)
class Validation(Hook):
    """Held-out loss on fixed noise and a fixed grid of noise levels, so that two readings differ by the model alone."""

    run: TrainingRun
    items: Sequence[Item]
    """Of this process."""
    rules: DrawRules
    report: Callable[[int, dict[str, float]], None]

    def before_training(self, outcome: Outcome) -> None:
        self._validate(outcome)

    def after_step(self, outcome: Outcome, seconds: float) -> None:
        schedule, step = self.run.schedule, outcome.step
        if not outcome.interrupted and (step == schedule.total or schedule.is_due(step, schedule.validate_every, None)):
            self._validate(outcome)

    def _validate(self, outcome: Outcome) -> None:
        with self.run.evaluating():
            values = self.losses()
        outcome.first_validation = outcome.first_validation or values
        outcome.last_validation = values
        self.report(outcome.step, values)

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean loss of each stream over items and noise levels, under `validation/...`, and of each level separately."""
        run, mode = self.run, self.run.config.ltx_mode
        objective = FlowMatching(run.wrapper)
        meters = {sigma: LossMeter(run.device) for sigma in VALIDATION_SIGMAS}
        for item in self.items:
            batch = make_batch([Draw(item, epoch=0, repeat=0)], mode, self.rules).to(run.device)
            for sigma, meter in meters.items():
                level = torch.full((1,), sigma, device=run.device)
                at_level = replace(batch, video_sigma=level, audio_sigma=level)
                meter.add(objective.loss(objective.predict(at_level)), batch.audio_expected, batch.audio_supervised)
        readings = {sigma: meter.means(meter.take(run.processes.count).tolist(), mode) for sigma, meter in meters.items()}
        values: dict[str, float] = {}
        for name in ("loss_video", "loss_audio"):
            found = {sigma: reading[name] for sigma, reading in readings.items() if name in reading}
            if found:
                values[f"validation/{name}"] = sum(found.values()) / len(found)
                values |= {f"validation/{name}_sigma{sigma}": value for sigma, value in found.items()}
        return values


@dataclass(frozen=True, slots=True)
class Previews(Hook):
    """Preview clips, made by the main process."""

    run: TrainingRun
    preview: Preview
    prompts: Sequence[str]
    """For those who see them."""
    failures: set[str] = field(default_factory=set)
    """What has been warned of."""

    def before_training(self, outcome: Outcome) -> None:
        if self.run.schedule.preview_first:
            self._make(0)

    def after_step(self, outcome: Outcome, seconds: float) -> None:
        schedule = self.run.schedule
        at_end = outcome.step == schedule.total and self.run.config.preview.wanted is None
        if not outcome.interrupted and (at_end or schedule.is_due(outcome.step, schedule.preview_every, schedule.preview_every_epochs)):
            self._make(outcome.step)

    def _make(self, step: int) -> None:
        """A preview is not worth a run: whatever hinders it costs a warning."""
        try:
            with self.run.evaluating():
                made = self.preview(self.run.wrapper, step, self.run.schedule.epoch(step))
            self.run.trackers.log_previews(made, self.prompts, step)
        except Exception as error:  # of decoders, of media libraries, of the disk
            free_memory(self.run.device)
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if text not in self.failures:
                log.warning("WARNING: step %d: no previews, and training goes on without them: %s", step, text)
            self.failures.add(text)
