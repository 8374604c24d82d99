"""The training loop. What else happens in a run (saving, validation, previews, warnings) is a hook."""

import gc
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager

import torch
import torch.distributed
from torch import Tensor

from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.loader import iterate_batches
from musubi_tuner.runtime.progress import Progress
from musubi_tuner.runtime.signals import Interrupt
from musubi_tuner.training.hooks import Hook, StepLog
from musubi_tuner.training.last_step import LastStep
from musubi_tuner.training.metrics import Reading
from musubi_tuner.training.optimizer import average_gradients, clip, clip_model
from musubi_tuner.training.run import Outcome, TrainingRun
from musubi_tuner.training.watch import not_finite_within
from musubi_tuner.training.weight_steps import NotFinite


def train(run: TrainingRun, outcome: Outcome, log: StepLog, hooks: Sequence[Hook]) -> None:
    """Run from `run.start_step` to the end, or to the first signal that asks for the end.

    Args:
        outcome: of this run so far; true after each step, so that a rescue knows what there is to save.
        log: takes the losses of each step.
        hooks: called in this order before the first step of a new run, and after each step.
    """
    started, total = time.monotonic(), run.schedule.total
    bar = Progress("training", total, unit="step", done=run.start_step, shown=run.processes.is_main)
    last, asked = LastStep(run, outcome, log, bar), _EndAsked(run)
    with Interrupt() as interrupt, bar, _settled(), closing(_batches(run)) as batches, last:
        if run.start_step == 0:
            for hook in hooks:
                hook.before_training(outcome)
        for step in range(run.start_step + 1, total + 1):
            begun = time.monotonic()
            norm = _optimizer_step(run, outcome, log, batches, step, last)
            outcome.step, outcome.torn, outcome.random_state = step, False, torch.get_rng_state()
            if step % run.schedule.log_every == 0 or step == total:
                last.log(step, norm)
            if not last.device_refuses or run.schedule.is_looked_at(step):
                last.settle()
            outcome.interrupted = asked.after_step(interrupt.requested) and step < total  # the last step ends the run anyway
            if outcome.interrupted:
                last.settle()
            seconds = time.monotonic() - begun
            bar.advance(seconds=seconds)
            outcome.stepping += seconds
            for hook in hooks:
                hook.after_step(outcome, seconds)
            if outcome.interrupted:
                break
    outcome.seconds = time.monotonic() - started


@contextmanager
def _settled() -> Iterator[None]:
    """What exists by now stays for the whole loop, so Python's garbage collector need not look through it: a million objects of models and
    libraries, which take it up to half a second each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _batches(run: TrainingRun) -> Generator[Batch, None, None]:
    """This process's batches from the first step to the last."""
    per_step = run.config.optimization.gradient_accumulation_steps * run.processes.count
    numbers = range(run.start_step * per_step + run.processes.index, run.schedule.total * per_step, run.processes.count)
    workers = run.config.optimization.max_data_loader_n_workers
    return iterate_batches(run.items, mode=run.config.ltx_mode, rules=run.rules, numbers=numbers, workers=workers, device=run.device)


def _optimizer_step(run: TrainingRun, outcome: Outcome, log: StepLog, batches: Iterator[Batch], step: int, last: LastStep) -> Tensor:
    """Accumulate, average over processes, clip, guard, update. Returns the gradient norm, a scalar on the device."""
    accumulation = run.config.optimization.gradient_accumulation_steps
    seen, expected, supervised = [], 0, 0
    steps = run.weight_steps
    if steps is not None:
        steps.begin(step)
    if run.updates_within_backward:
        last.settle()
    for _ in range(accumulation):
        batch = next(batches)
        with _within_backward(run, outcome, step, batch):
            batch, losses = run.objective.backward(batch, accumulation)
        log.add(batch, losses)
        if run.balance is not None:
            run.balance.add(losses, batch.video_weight, batch.audio_weight)
        expected, supervised = expected + batch.audio_expected, supervised + batch.audio_supervised
        seen.append((batch.names, losses))
    if steps is not None and run.updates_within_backward:
        norm = steps.norm()
    else:
        norm = _averaged_and_clipped(run)
        last.guard(step, norm, seen)
    log.before_update()
    outcome.torn = True  # from here on the step counts; until here nothing that a state holds has changed
    run.supervision.add(expected, supervised)
    if run.balance is not None:
        run.balance.step(run.processes.count)
    if steps is None:
        run.optimizer.step()
    elif not run.updates_within_backward:
        steps.step()
    run.scheduler.step()
    if run.average is not None:
        run.average.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def _averaged_and_clipped(run: TrainingRun) -> Tensor:
    """The gradient norm; where the model is sharded, gradients were averaged as they were computed."""
    parameters, most = run.network.parameters(), run.config.optimization.max_grad_norm
    sharded = run.shards > 1
    if not sharded:
        average_gradients(parameters, run.processes.count)
    return clip(parameters, most) if run.weight_steps is None else clip_model(parameters, most, sharded=sharded)


@contextmanager
def _within_backward(run: TrainingRun, outcome: Outcome, step: int, batch: Batch) -> Iterator[None]:
    """Around a backward pass: with `--fused_backward_pass` the weights change in it."""
    if run.weight_steps is None or not run.updates_within_backward:
        yield
        return

    def changed() -> None:
        outcome.torn = True

    try:
        with run.weight_steps.within_backward(changed):
            yield
    except NotFinite as error:
        raise not_finite_within(step, str(error), batch.names) from error


class _EndAsked:
    """Whether a signal has reached any of the processes. On a GPU the answer of a step is read in the next one, so nobody waits for the
    device; it is the same in all processes, so all end with the same step."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._newest: Reading | None = None

    def after_step(self, requested: bool) -> bool:
        if self._run.processes.count == 1:
            return requested
        flag = torch.full((1,), float(requested), device=self._run.device)
        torch.distributed.all_reduce(flag)
        earlier, self._newest = self._newest, Reading(flag)
        answer = earlier if flag.is_cuda else self._newest
        return answer is not None and answer.values()[0] > 0
