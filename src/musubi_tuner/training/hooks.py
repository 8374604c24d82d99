"""What happens around the steps of a run: logging, warnings, saving, validation, previews."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.cache.store import DiskFullError
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.draws import DrawRules
from musubi_tuner.dataset.items import Draw, Item
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.training import checkpoint, state
from musubi_tuner.training.balance import at_bound
from musubi_tuner.training.metrics import LossFile, LossMeter, NoiseLevelMeter, loss_path
from musubi_tuner.training.objective import FlowMatching, ItemLosses
from musubi_tuner.training.run import Outcome, TrainingRun
from musubi_tuner.training.watch import Pace

log = logging.getLogger(__name__)

_BALANCE_WARNED_EVERY = 100
VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)

Preview = Callable[[OfficialLTXV2Wrapper, int, int], None]
"""(wrapper, step, epoch): make the preview clips of this moment."""


class StepLog:
    """Losses of the steps since the last line, on their way to the progress bar, the loss file and the trackers."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._losses, self._levels = LossMeter(run.device), NoiseLevelMeter(run.device)
        self._file = LossFile(loss_path(run.output_dir, run.name), run.start_step) if run.processes.is_main else None

    def add(self, batch: Batch, losses: ItemLosses) -> None:
        """Take in a micro-batch, without waiting for the device."""
        self._losses.add(losses, batch.size, batch.audio_supervised)
        self._levels.add(losses, batch.video_sigma, batch.audio_sigma)

    def write(self, step: int, norm: Tensor, bar: Any) -> dict[str, float]:
        """Read what was added, write a line of it everywhere, and return it."""
        run = self._run
        values = self._losses.read(run.config.ltx_mode, run.processes.count)
        if run.balance is not None:
            values["audio_balance"] = float(run.balance.multiplier())
            if (message := at_bound(values["audio_balance"])) and step % _BALANCE_WARNED_EVERY == 0:
                log.warning("WARNING: step %d: %s", step, message)
        values |= {"lr": run.optimizer.param_groups[0]["lr"], "grad_norm": float(norm)}
        bar.set_postfix({key: f"{value:.4g}" for key, value in values.items()}, refresh=False)
        values |= self._levels.read(run.processes.count) | self._scaled_audio(values)
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
            self._file.write(step, values)
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


class Saving(Hook):
    """The LoRA, and the state where one is wanted. The last step and an interrupt always save."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def after_step(self, outcome: Outcome, seconds: float) -> None:
        run, step, schedule = self._run, outcome.step, self._run.schedule
        by_step = outcome.interrupted or schedule.is_due(step, schedule.save_every, None)
        if not (step == schedule.total or by_step or schedule.is_due(step, None, schedule.save_every_epochs)):
            return
        run.finite.settle()
        if not run.processes.is_main:
            return
        if step == schedule.total:
            path = checkpoint.lora_path(run.output_dir, run.name)
        elif by_step:
            path = checkpoint.lora_path(run.output_dir, run.name, step=step)
        else:
            path = checkpoint.lora_path(run.output_dir, run.name, epoch=schedule.epoch(step))
        self.save(outcome, path)

    def save(self, outcome: Outcome, path: Path) -> None:
        """On a full disk training goes on, as a later save may find room; the last LoRA must be written."""
        run, step, saving = self._run, outcome.step, self._run.config.saving
        epoch = run.schedule.epoch(step)
        try:
            with run.evaluating():
                metadata = checkpoint.lora_metadata(run.facts, step=step, epoch=epoch)
                checkpoint.save_lora(run.network, path, metadata, checkpoint.SAVE_DTYPES[saving.save_precision])
            outcome.files.append(path)
            if saving.save_state or outcome.interrupted:
                outcome.files.append(self._save_state(step))
        except (DiskFullError, state.StateNotSaved) as error:
            if step == run.schedule.total and path not in outcome.files:
                raise
            log.warning("WARNING: step %d: not saved, and training goes on: %s", step, error)
        if saving.save_last_n is not None:
            checkpoint.remove_old_loras(run.output_dir, run.name, saving.save_last_n, step=step, epoch=epoch)
        outcome.files = [file for file in outcome.files if file.exists()]

    def _save_state(self, step: int) -> Path:
        run = self._run
        folder = state.state_path(run.output_dir, run.name, step)
        state.save_state(
            folder,
            network=run.network,
            optimizer=run.optimizer,
            scheduler=run.scheduler,
            step=step,
            settings=run.settings,
            watched=run.watched,
        )
        state.remove_old_states(run.output_dir, run.name, run.config.saving.save_last_n_states, step)
        return folder


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
                meter.add(objective.loss(objective.predict(at_level)), 1, batch.audio_supervised)
        readings = {sigma: meter.read(mode, run.processes.count) for sigma, meter in meters.items()}
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

    def before_training(self, outcome: Outcome) -> None:
        if self.run.schedule.preview_first:
            self._make(0)

    def after_step(self, outcome: Outcome, seconds: float) -> None:
        schedule = self.run.schedule
        at_end = outcome.step == schedule.total and self.run.config.preview.wanted is None
        if not outcome.interrupted and (at_end or schedule.is_due(outcome.step, schedule.preview_every, schedule.preview_every_epochs)):
            self._make(outcome.step)

    def _make(self, step: int) -> None:
        with self.run.evaluating():
            self.preview(self.run.wrapper, step, self.run.schedule.epoch(step))
