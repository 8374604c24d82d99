"""The states that a run has left in its folder: which is the newest whole one, which are too old, what a killed run had begun."""

import logging
import re
import shutil
from pathlib import Path

from musubi_tuner.runtime.disk import remove_folder
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import quoted
from musubi_tuner.training.state import SUFFIX, TEMPORARY, DamagedState, read_state, state_path, turn_of

log = logging.getLogger(__name__)


def check_resumable(path: Path) -> None:
    """
    Raises:
        UserError: no whole state; names the newest one beside it that is.
    """
    try:
        read_state(path)
    except DamagedState as error:
        raise UserError(f"--resume {path}: {error}{other_state(path)}") from error


def other_state(path: Path) -> str:
    """What to resume from in place of `path`, in words."""
    for other in reversed(states(path.parent, run_of(path))):
        if other.name == path.name:
            continue
        try:
            read_state(other)
        except DamagedState:
            continue
        return f" A whole one is beside it: --resume {quoted(other)}"
    return f" Give a folder that ends in '{SUFFIX}' and is whole, or start from a saved LoRA with --network_weights."


def remove_old_states(folder: Path, name: str, keep: int, step: int) -> None:
    """Keep the newest `keep` of the states up to `step`; those beyond it are an earlier run's, and not for this one to judge.

    One that cannot be removed is told of and costs no run.
    """
    newest = state_path(folder, name, step).name
    for path in [path for path in states(folder, name) if path.name <= newest][:-keep]:
        try:
            remove_folder(path)
        except OSError as error:
            log.warning("WARNING: %s: an old state that could not be removed (%s)", path, error.strerror)


def newest_state(folder: Path, name: str) -> Path | None:
    """What `--autoresume` goes on from, with a warning for each newer one that is damaged; None where this run has left no state.

    Later steps that a run has gone back behind are not the newer ones.

    Raises:
        UserError: there are states, and none is whole.
    """
    found = states(folder, name)
    for path in sorted(reversed(found), key=turn_of, reverse=True):
        try:
            read_state(path)
        except DamagedState as error:
            log.warning("WARNING: --autoresume: not from %s, which is damaged: %s", path, error)
        else:
            return path
    if found:
        raise UserError(
            f"--autoresume: no state of '{name}' in {folder} is whole. Start from a saved LoRA with --network_weights FILE, another "
            "--output_name and without --autoresume, or anew with --overwrite in place of --autoresume."
        )
    return None


def later_states(folder: Path, name: str, step: int) -> list[Path]:
    """Those of the run `name` that were saved beyond `step`, oldest first."""
    return [path for path in states(folder, name) if path.name > state_path(folder, name, step).name]


def run_of(path: Path) -> str:
    """The name of the run that a state folder is of; empty where it is called otherwise."""
    return path.name.rpartition("-step")[0]


def remove_states(folder: Path, name: str) -> None:
    """All of the run `name`.

    Raises:
        OSError: one could not be removed.
    """
    for path in states(folder, name):
        remove_folder(path)


def remove_leftovers(folder: Path, name: str) -> None:
    """What killed runs of this name have begun to write; call it while the run's lock is held."""
    pattern = re.compile(rf"\.{re.escape(name)}-step\d{{8}}{SUFFIX}\.\d+(\.old|\.part)?{re.escape(TEMPORARY)}")
    for path in [path for path in folder.iterdir() if pattern.fullmatch(path.name)]:
        shutil.rmtree(path, ignore_errors=True)


def states(folder: Path, name: str) -> list[Path]:
    """State folders of the run `name`, oldest first."""
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"{re.escape(name)}-step\d{{8}}{SUFFIX}")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.is_dir())
