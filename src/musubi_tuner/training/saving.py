"""Where LoRA and state go: in between a save that fails costs that save; the last one tries every place that it may write to."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from musubi_tuner.networks.whole import WholeTransformer, settled_values
from musubi_tuner.placement.sharding import gathered
from musubi_tuner.runtime.disk import FULL, reason
from musubi_tuner.runtime.errors import TemporaryFailure
from musubi_tuner.runtime.program import quoted
from musubi_tuner.training import checkpoint, state, state_folders
from musubi_tuner.training.hooks import Hook
from musubi_tuner.training.run import Outcome, TrainingRun
from musubi_tuner.training.space import SpaceWatch

log = logging.getLogger(__name__)


class NotSaved(TemporaryFailure):
    """What had to be written could be written nowhere."""


class Saving(Hook):
    """The LoRA, and the state where one is wanted. The last step and an interrupt always save."""

    def __init__(self, run: TrainingRun, *, beside_trained: int = 0) -> None:
        """
        Args:
            beside_trained: as of `SpaceWatch`.
        """
        self._run = run
        self._gathered: dict[str, Tensor] = {}
        """Of a model that is sharded, in the main process, for one save."""
        self._problems: list[str] = []
        """What kept other processes from saving their parts."""
        self.space = SpaceWatch(run, beside_trained=beside_trained)

    def after_step(self, outcome: Outcome, seconds: float) -> None:
        run, step, schedule = self._run, outcome.step, self._run.schedule
        if run.processes.is_main:
            self.space.check(step)
        by_step = outcome.interrupted or schedule.is_due(step, schedule.save_every, None)
        if not (step == schedule.total or by_step or schedule.is_due(step, None, schedule.save_every_epochs)):
            return
        if run.shards > 1:
            self._take_part(outcome)
        if not run.processes.is_main:
            return
        if step == schedule.total:
            path = checkpoint.lora_path(run.output_dir, run.name)
        elif by_step:
            path = checkpoint.lora_path(run.output_dir, run.name, step=step)
        else:
            path = checkpoint.lora_path(run.output_dir, run.name, epoch=schedule.epoch(step))
        self.save(outcome, path)
        self._gathered = {}

    def save(self, outcome: Outcome, path: Path) -> None:
        """
        Raises:
            NotSaved: the last LoRA, or all of an interrupted run, could be written nowhere.
            UserError: the network is not finite or all zero.
        """
        run, step, saving = self._run, outcome.step, self._run.config.saving
        epoch, is_last = run.schedule.epoch(step), step == run.schedule.total
        lora, error = self._written(outcome, path.name, self._save_lora, must=is_last or outcome.interrupted)
        saved_state = None
        lost = is_last and lora is None and run.shards == 1  # a state has the weights too, and needs nothing but room
        if saving.save_state or outcome.interrupted or lost:
            name = state.state_path(run.output_dir, run.name, step).name
            write = partial(self._save_state, torn=outcome.torn)
            saved_state, failed = self._written(outcome, name, write, must=is_last or outcome.interrupted)
            error = error or failed
        if error is not None and lora is None and (is_last or (outcome.interrupted and saved_state is None)):
            again = "Make room, or make the folder writable, and run the same command again."
            if saved_state is not None:
                again = (
                    f"Its weights are in {saved_state}: once that is put right, run the same command with --resume {quoted(saved_state)} "
                    f"--max_train_steps {step + 1}."
                )
            raise NotSaved(f"step {step}: {path.name} could be written nowhere: {error}. {again}")
        if saving.save_last_n is not None:
            checkpoint.remove_old_loras(run.output_dir, run.name, saving.save_last_n, step=step, epoch=epoch)
        outcome.files = [file for file in outcome.files if file.exists()]

    def _take_part(self, outcome: Outcome) -> None:
        """What all processes do for a save, where each holds a part of the model."""
        run = self._run
        assert isinstance(run.network, WholeTransformer), "which alone is sharded"
        weights = _changed_weights(run, run.network)
        self._gathered = gathered(weights, keep=run.processes.is_main)
        if run.config.saving.save_state or outcome.interrupted:
            path = state.state_path(run.output_dir, run.name, outcome.step)
            problem = None
            if not run.processes.is_main:
                try:
                    state.save_part(
                        path,
                        run.processes.index,
                        network=run.network,
                        optimizer=run.optimizer,
                        scheduler=run.scheduler,
                        watched=run.watched,
                    )
                except OSError as error:
                    problem = f"process {run.processes.index}: {reason(error)}"
            self._problems = [one for one in run.processes.gather(problem) if one is not None]

    def _written(self, outcome: Outcome, name: str, write: Callable[[int, Path], None], *, must: bool) -> tuple[Path | None, str | None]:
        """Write `name` into the run's folder; where it `must` be, and that takes it not, into the next one that does.

        Returns:
            Where it is, and what was wrong on the way to it.
        """
        step, last = outcome.step, outcome.step == self._run.schedule.total
        wrong: dict[str, None] = {}
        for folder in self._places(must, step):
            try:
                write(step, folder / name)
            except OSError as error:
                wrong[f"{folder}: {reason(error)}"] = None
                self._full = error.errno in FULL or self.space.is_short()
                continue
            outcome.files.append(folder / name)
            if folder != self._run.output_dir:
                log.warning("WARNING: step %d: %s is in %s, as it could not be written here: %s.", step, name, folder, "; ".join(wrong))
            return folder / name, None
        goes_on = "" if last or outcome.interrupted else ", and training goes on, as a later save may find room"
        log.warning("WARNING: step %d: %s was not saved%s: %s.", step, name, goes_on, "; ".join(wrong))
        return None, "; ".join(wrong)

    def _places(self, must: bool, step: int) -> Iterator[Path]:
        """Folders to write to, in this order: the run's own; the same, once what retention would remove after this save has gone before it;
        the system's temporary folder; the current folder."""
        run = self._run
        self._full = False
        yield run.output_dir
        if not must:
            return
        if self._full and self._make_room(step):
            yield run.output_dir
        for find in (tempfile.gettempdir, os.getcwd):
            with contextlib.suppress(OSError):  # neither may be there
                folder = Path(find()) / f"{run.name}-saved-{os.getpid()}"
                yield folder
                with contextlib.suppress(OSError):
                    folder.rmdir()  # what was made for a file that found no room there either

    def _make_room(self, step: int) -> bool:
        """Whether something was removed that would have gone after this save; the newest of each kind stays, until there is a newer one."""
        run, saving = self._run, self._run.config.saving
        before = shutil.disk_usage(run.output_dir).free
        state_folders.remove_old_states(run.output_dir, run.name, max(1, saving.save_last_n_states - 1), step)
        if saving.save_last_n is not None:
            checkpoint.remove_old_loras(run.output_dir, run.name, max(1, saving.save_last_n - 1), step=step, epoch=run.schedule.epoch(step))
        return shutil.disk_usage(run.output_dir).free > before

    def _save_lora(self, step: int, path: Path) -> None:
        run, saving = self._run, self._run.config.saving
        with run.evaluating():
            metadata = checkpoint.lora_metadata(run.facts, step=step, epoch=run.schedule.epoch(step), turn=run.turn)
            dtype = checkpoint.SAVE_DTYPES[saving.save_precision]
            if isinstance(run.network, WholeTransformer):
                assert run.write_whole is not None, "given with the network"
                weights = self._gathered or _changed_weights(run, run.network)
                checkpoint.check_whole(weights, path)
                run.write_whole(path, weights, dtype, metadata)
            else:
                checkpoint.save_lora(run.network, path, metadata, dtype, name=run.name)

    def _save_state(self, step: int, path: Path, *, torn: bool) -> None:
        run = self._run
        if self._problems:
            raise OSError("; ".join(self._problems))
        state.save_state(
            path,
            network=run.network,
            optimizer=run.optimizer,
            scheduler=run.scheduler,
            step=step,
            settings=run.settings,
            watched=run.watched,
            turn=run.turn,
            torn=torn,
            parts=run.shards,
        )
        if path.parent == run.output_dir:
            state_folders.remove_old_states(run.output_dir, run.name, run.config.saving.save_last_n_states, step)


def _changed_weights(run: TrainingRun, network: WholeTransformer) -> dict[str, Tensor]:
    """What differs from the checkpoint that was started from: trained weights, and all of the model where LoRAs were merged into it."""
    weights = settled_values(network)
    if not run.config.network.base_networks:
        return weights
    return {name: network.home(weight) for name, weight in run.wrapper.transformer.named_parameters()} | weights
