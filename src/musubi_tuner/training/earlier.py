"""What an earlier run of the same name has left: who owns the folder, what is gone on from, what must not be overwritten."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

from musubi_tuner.config.training import SavingOptions, TrainingConfig
from musubi_tuner.networks.reading import newest_file
from musubi_tuner.runtime import lock
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import real_path
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.runtime.program import quoted
from musubi_tuner.training import checkpoint, state, state_folders
from musubi_tuner.training.metrics import loss_path
from musubi_tuner.training.page.record import record_path
from musubi_tuner.training.page.runs import preview_files
from musubi_tuner.training.preflight import RunInputs, check_output_folder
from musubi_tuner.training.run import make_schedule

log = logging.getLogger(__name__)


@contextlib.contextmanager
def owned_output(saving: SavingOptions, group: Processes) -> Iterator[None]:
    """Own `--output_name` in `--output_dir` to the end of the run, and remove what killed runs have begun to write there. Folders that
    were made for it and are empty in the end, as of a run that was refused, are removed too.

    Raises:
        UserError: the folder cannot be written into, or another process trains under this name.
    """
    if not group.is_main:
        yield
        return
    folder, name = saving.output_dir, saving.output_name
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    own = lock.held(
        folder / f"{name}.lock", what=f"'{name}' in {folder}", remedy="Give another --output_name or --output_dir, or wait for its end."
    )
    try:
        check_output_folder(folder)
        with own:
            state_folders.remove_leftovers(folder, name)
            checkpoint.remove_leftovers(folder, name)
            yield
    finally:
        with contextlib.suppress(OSError):  # the first that holds something
            for one in new:
                one.rmdir()


def resolve_newest(config: TrainingConfig) -> TrainingConfig:
    """`--autoresume` and `--network_weights FOLDER` as the newest state and the newest file that they name.

    Raises:
        UserError: nothing to go on from that is whole, a folder without LoRA files, a new run under the name of an earlier one, or a run
            that would remove what it starts from.
    """
    saving, network = config.saving, config.network
    if saving.autoresume:
        if saving.resume is not None:
            raise UserError(f"--autoresume with --resume {saving.resume}: the first one chooses the state by itself; give one of them.")
        newest = state_folders.newest_state(saving.output_dir, saving.output_name)
        if newest is None:
            log.info("--autoresume: no state of '%s' in %s; the run starts at step 0", saving.output_name, saving.output_dir)
        saving = dataclasses.replace(saving, resume=newest)
    elif saving.resume is not None:
        state_folders.check_resumable(saving.resume)
        if state_folders.run_of(real_path(saving.resume)) != saving.output_name:
            _refuse_to_overwrite(saving)
    elif not saving.overwrite:
        _refuse_to_overwrite(saving)
    if network.network_weights is not None:
        network = dataclasses.replace(network, network_weights=newest_file(network.network_weights))
    config = dataclasses.replace(config, saving=saving, network=network)
    _refuse_own_files(config)
    return config


def nothing_left(inputs: RunInputs, group: Processes) -> bool:
    """Whether `--autoresume` has nothing to do, as an earlier run has done all that is asked for, which is said.

    Raises:
        UserError: it has done less, and left no state to go on from.
    """
    saving = inputs.config.saving
    lora = checkpoint.lora_path(saving.output_dir, saving.output_name)
    if not (saving.autoresume and lora.is_file()):
        return False
    total = make_schedule(inputs.config, inputs.items, group.count, has_validation=bool(inputs.validation_items)).total
    done = checkpoint.steps_of(lora)
    given_up = saving.resume is not None and state.turn_of(saving.resume) > checkpoint.turn_of(lora)
    if done >= total and not given_up:
        if group.is_main:
            log.info(
                "--autoresume: nothing is left to do: %s has been trained for %d of %d steps. To go on, raise --max_train_steps; to train "
                "it anew, as with other settings, give another --output_name, or --overwrite in place of --autoresume.",
                lora,
                done,
                total,
            )
        return True
    if saving.resume is None:
        raise UserError(
            f"--autoresume: {lora} has been trained for {done} of {total} steps, and there is no state to go on from. Give another "
            f"--output_name, with --network_weights {quoted(lora)} where it is to start from this file, or --overwrite in place of "
            "--autoresume."
        )
    return False


def tell_of_later(saving: SavingOptions, step: int) -> None:
    """That a run goes back behind steps that are saved under its name, and what becomes of them."""
    later = list(_later(saving, step))
    if step and later:
        log.warning(
            "WARNING: this run goes back behind what is saved in %s: %s. They are kept until it writes the same names; --autoresume goes "
            "on with this run. To keep them for good, move them away or give another --output_name.",
            saving.output_dir,
            ", ".join(path.name for path in later),
        )


def turn_after(saving: SavingOptions, step: int) -> int:
    """The turn of a run that goes on from `step` of the state `saving.resume`: a new one where later steps are saved, which it has gone
    back behind."""
    assert saving.resume is not None
    return max([state.turn_of(saving.resume), *(turn + 1 for turn in _later(saving, step).values())])


def _later(saving: SavingOptions, step: int) -> dict[Path, int]:
    """The turns of what decides where `--autoresume` goes on, states and the final LoRA, as far as they are of later steps."""
    folder, name = saving.output_dir, saving.output_name
    lora = checkpoint.lora_path(folder, name)
    later = {path: state.turn_of(path) for path in state_folders.later_states(folder, name, step)}
    return later | ({lora: checkpoint.turn_of(lora)} if checkpoint.steps_of(lora) > step else {})


def clear_earlier(saving: SavingOptions) -> None:
    """With `--overwrite`, remove LoRAs, states, previews and losses of an earlier run, so that nothing of it is taken for this one's."""
    if not saving.overwrite:
        return
    folder, name = saving.output_dir, saving.output_name
    found = [*checkpoint.lora_files(folder, name), *(preview.path for preview in preview_files(folder, name))]
    if found or state_folders.states(folder, name):
        log.warning("WARNING: --overwrite: LoRAs, states and previews of an earlier run of '%s' in %s are removed", name, folder)
    try:
        for path in found:
            path.unlink()
        state_folders.remove_states(folder, name)
        for path in (loss_path(folder, name), record_path(folder, name)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--overwrite: {error.filename}: cannot be removed ({error.strerror}). Choose another --output_name.") from error


def _refuse_own_files(config: TrainingConfig) -> None:
    """
    Raises:
        UserError: a file that is read has a name of this run, so that it is removed with an earlier run, or replaced by a save.
    """
    saving, model, network = config.saving, config.model, config.network
    read: list[tuple[str, Path | None]] = [(f"--{name}", getattr(model, name)) for name in ("ltxv2_model", "vae", "audio_vae")]
    if saving.overwrite:  # which removes what the network starts from; a run that goes on has it in its state
        read += [("--network_weights", network.network_weights), *(("--base_weights", path) for path in network.base_weights)]
    for flag, given in read:
        if given is None:
            continue
        for path in (given, real_path(given)):
            if real_path(path.parent) == real_path(saving.output_dir) and checkpoint.is_lora_name(path.name, saving.output_name):
                raise UserError(
                    f"{flag} {given}: is a file of '{saving.output_name}' in {saving.output_dir}, as this run is called, which would "
                    "remove or replace it. Give another --output_name."
                )


def _refuse_to_overwrite(saving: SavingOptions) -> None:
    folder, name = saving.output_dir, saving.output_name
    states, loras = state_folders.states(folder, name), checkpoint.lora_files(folder, name)
    if not (states or loras):
        return
    found = ", ".join(path.name for path in [*loras, *states][-3:])
    goes_on = "--autoresume goes on with it, another" if states else "Another"
    remedy = f"{goes_on} --output_name leaves it as it is, --overwrite removes it and starts anew."
    if saving.resume is not None:
        remedy = f"--resume {saving.resume} is of another run, which would overwrite it. Give another --output_name."
    raise UserError(f"{folder}: holds an earlier run of this --output_name: {found}. {remedy}")
