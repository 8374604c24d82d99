"""The training loop."""

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor
from tqdm import tqdm

from musubi_tuner.cache.store import DiskFullError
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.loader import iterate_batches
from musubi_tuner.training import checkpoint, state
from musubi_tuner.training.balance import at_bound
from musubi_tuner.training.finite import FiniteCheck
from musubi_tuner.training.gradients import average_gradients, clip
from musubi_tuner.training.interrupt import Interrupt
from musubi_tuner.training.loss import ItemLosses, total_loss
from musubi_tuner.training.metrics import LossFile, LossMeter, NoiseLevelMeter, loss_path
from musubi_tuner.training.pace import Pace
from musubi_tuner.training.run import TrainingRun
from musubi_tuner.training.step import drawn_levels, item_losses

log = logging.getLogger(__name__)

_BALANCE_TOLD_EVERY = 100

Meters = tuple[LossMeter, NoiseLevelMeter]


@dataclass(slots=True)
class Outcome:
    """What a run did, for its last table."""

    step: int
    seconds: float = 0.0
    stepping: float = 0.0
    """Seconds of the steps alone, without what lies between them."""
    losses: dict[str, float] = field(default_factory=dict)
    first_validation: dict[str, float] = field(default_factory=dict)
    last_validation: dict[str, float] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    interrupted: bool = False


def train(run: TrainingRun) -> Outcome:
    """Run from `run.start_step` to the end, or to the first Ctrl-C."""
    outcome = Outcome(step=run.start_step)
    meter, levels = LossMeter(run.device), NoiseLevelMeter(run.device)
    loss_file = LossFile(loss_path(run.output_dir, run.name), run.start_step) if run.processes.is_main else None
    batches = _batches(run)
    bar = tqdm(
        total=run.schedule.total, initial=run.start_step, unit="step", desc="training", disable=not run.processes.is_main, file=sys.stderr
    )
    finite, pace = FiniteCheck(), Pace()
    started = time.monotonic()
    with Interrupt() as interrupt, bar:
        if run.start_step == 0:
            _validate(run, outcome, loss_file, 0)
            _preview(run, 0, run.schedule.preview_first)
        for step in range(run.start_step + 1, run.schedule.total + 1):
            begun = time.monotonic()
            norm = _optimize(run, batches, (meter, levels), finite, step)
            outcome.step = step
            if step % run.schedule.log_every == 0 or step == run.schedule.total:
                outcome.losses = _log(run, (meter, levels), loss_file, bar, step, norm)
            bar.update()
            seconds = time.monotonic() - begun
            outcome.stepping += seconds
            if (warning := pace.add(seconds)) and run.processes.is_main:
                log.warning("WARNING: step %d: %s", step, warning)
            outcome.interrupted = _agree(run, interrupt.requested) and step < run.schedule.total  # the last step ends the run anyway
            if (warning := run.supervision.check(step, run.device, run.processes.count)) and run.processes.is_main:
                log.warning("WARNING: %s", warning)
            if _saves(run, step, outcome.interrupted):
                finite.settle()
            _after_step(run, outcome, loss_file, step)
            if outcome.interrupted:
                break
    outcome.seconds = time.monotonic() - started
    return outcome


def _batches(run: TrainingRun) -> Iterator[Batch]:
    per_step = run.config.optimization.gradient_accumulation_steps * run.processes.count
    numbers = range(run.start_step * per_step + run.processes.index, run.schedule.total * per_step, run.processes.count)
    return iterate_batches(
        run.items,
        mode=run.config.ltx_mode,
        rules=run.rules,
        numbers=numbers,
        workers=run.config.optimization.max_data_loader_n_workers,
        device=run.device,
    )


def _optimize(run: TrainingRun, batches: Iterator[Batch], meters: Meters, finite: FiniteCheck, step: int) -> Tensor:
    """One optimizer step: accumulate, average over processes, clip, check, update. Returns the gradient norm."""
    accumulation = run.config.optimization.gradient_accumulation_steps
    seen = []
    for _ in range(accumulation):
        batch = next(batches)
        with run.network.dropout(batch.dropout_seeds):  # backward too: blocks are computed again
            batch = run.base.with_imagined_sound(batch)
            losses = _losses(run, batch)
            _learn(total_loss(losses, batch.video_weight, _audio_weight(run, batch)) / accumulation)
            held = _hold_to_prompt(run, batch, accumulation)
        meters[0].add(losses, batch.size, batch.audio_supervised, held)
        meters[1].add(losses, batch.video_sigma, batch.audio_sigma)
        run.supervision.add(batch.audio_expected, batch.audio_supervised)
        if run.balance is not None:
            run.balance.add(losses, batch.video_weight, batch.audio_weight)
        seen.append((batch.names, losses))
    parameters = run.network.parameters()
    average_gradients(parameters, run.processes.count)
    norm = clip(parameters, run.config.optimization.max_grad_norm)
    finite.add(step, norm, seen)
    if run.balance is not None:
        run.balance.step(run.processes.count)
    run.optimizer.step()
    run.scheduler.step()
    if run.average is not None:
        run.average.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def _losses(run: TrainingRun, batch: Batch) -> ItemLosses:
    return item_losses(run.wrapper, batch, drawn_levels(batch), run.error, run.base)


def _learn(total: Tensor) -> None:
    """Gradients of a loss, where it has any; where all of a batch was given, nothing is learned from it."""
    if total.requires_grad:
        total.backward()


def _hold_to_prompt(run: TrainingRun, batch: Batch, accumulation: int) -> Tensor | None:
    """`--dop_prompt`: learn to predict under the prompt what the base model predicts. Returns the raw losses (B,)."""
    preservation = run.prompt_preservation
    if preservation is None:
        return None
    held = _losses(run, preservation.batch(batch)).preserved
    _learn(preservation.weight * held.mean() / accumulation)
    return held.detach()


def _audio_weight(run: TrainingRun, batch: Batch) -> Tensor:
    """Of each item; with the balance on, its multiplier stands in for `--audio_loss_weight`, and datasets that weigh 0 stay out."""
    if run.balance is None:
        return batch.audio_weight
    return (batch.audio_weight > 0) * run.balance.multiplier()


def _log(run: TrainingRun, meters: Meters, loss_file: LossFile | None, bar: tqdm, step: int, norm: Tensor) -> dict[str, float]:
    values = meters[0].read(run.config.ltx_mode, run.processes.count)
    if run.balance is not None:
        values["audio_balance"] = float(run.balance.multiplier())
        if (message := at_bound(values["audio_balance"])) and step % _BALANCE_TOLD_EVERY == 0:
            log.warning("WARNING: step %d: %s", step, message)
    values |= {"lr": run.optimizer.param_groups[0]["lr"], "grad_norm": float(norm)}
    bar.set_postfix({key: f"{value:.4g}" for key, value in values.items()}, refresh=False)
    values |= meters[1].read(run.processes.count)
    if loss_file is not None:
        loss_file.write(step, values)
    run.trackers.log(values, step)
    return values


def _agree(run: TrainingRun, requested: bool) -> bool:
    """Whether any process was asked to stop."""
    if run.processes.count == 1:
        return requested
    flag = torch.tensor(float(requested), device=run.device)
    torch.distributed.all_reduce(flag)
    return bool(flag)


def _saves(run: TrainingRun, step: int, interrupted: bool) -> bool:
    schedule = run.schedule
    by_step = bool(schedule.save_every) and step % schedule.save_every == 0
    return interrupted or step == schedule.total or by_step or schedule.ends_epoch(step, schedule.save_every_epochs)


def _after_step(run: TrainingRun, outcome: Outcome, loss_file: LossFile | None, step: int) -> None:
    """Save, validate and preview where the schedule says so; the last step and an interrupt always save."""
    schedule = run.schedule
    last = step == schedule.total
    by_step = bool(schedule.save_every) and step % schedule.save_every == 0
    by_epoch = schedule.ends_epoch(step, schedule.save_every_epochs)
    if last:
        _save(run, outcome, step, checkpoint.lora_path(run.output_dir, run.name))
    elif by_step or outcome.interrupted:
        _save(run, outcome, step, checkpoint.lora_path(run.output_dir, run.name, step=step), state_too=outcome.interrupted)
    elif by_epoch:
        _save(run, outcome, step, checkpoint.lora_path(run.output_dir, run.name, epoch=schedule.epoch(step)))
    if outcome.interrupted:
        return
    if schedule.validate_every and (step % schedule.validate_every == 0 or last):
        _validate(run, outcome, loss_file, step)
    by_step = bool(schedule.preview_every) and step % schedule.preview_every == 0
    _preview(run, step, by_step or schedule.ends_epoch(step, schedule.preview_every_epochs))


def _save(run: TrainingRun, outcome: Outcome, step: int, path: Path, *, state_too: bool = False) -> None:
    """The LoRA, and the state where one is wanted. On a full disk training goes on: a later save may find room; the last LoRA must be."""
    if not run.processes.is_main:
        return
    saving = run.config.saving
    metadata = checkpoint.lora_metadata(run.facts, step=step, epoch=run.schedule.epoch(step))
    try:
        with run.evaluating():
            checkpoint.save_lora(run.network, path, metadata, checkpoint.SAVE_DTYPES[saving.save_precision])
        outcome.files.append(path)
        if saving.save_state or state_too:
            outcome.files.append(_save_state(run, step))
    except (DiskFullError, state.StateNotSaved) as error:
        if step == run.schedule.total and path not in outcome.files:
            raise
        log.warning("WARNING: step %d: not saved, and training goes on: %s", step, error)
    if saving.save_last_n is not None:
        checkpoint.remove_old_loras(run.output_dir, run.name, saving.save_last_n, step=step, epoch=run.schedule.epoch(step))
    outcome.files = [file for file in outcome.files if file.exists()]


def _save_state(run: TrainingRun, step: int) -> Path:
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


def _validate(run: TrainingRun, outcome: Outcome, loss_file: LossFile | None, step: int) -> None:
    if run.validator is None:
        return
    with run.evaluating():
        values = run.validator.run(run.wrapper)
    outcome.first_validation = outcome.first_validation or values
    outcome.last_validation = values
    if loss_file is not None:
        loss_file.write(step, values)
    run.trackers.log(values, step)


def _preview(run: TrainingRun, step: int, wanted: bool) -> None:
    if run.preview is None or not wanted:
        return
    with run.evaluating():
        run.preview(run.wrapper, step, run.schedule.epoch(step))
