"""Saving a run so that it can go on exactly: adapters, optimizer, schedule, step. Order and noise follow from the step."""

import hashlib
import io
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from musubi_tuner.ltxv2.weights import DTYPE_NAMES
from musubi_tuner.networks.whole import TrainedNetwork, set_values, settled_values
from musubi_tuner.placement.sharding import part_of
from musubi_tuner.runtime.disk import remove_folder, write_folder
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json
from musubi_tuner.runtime.program import quoted

log = logging.getLogger(__name__)

LAST_STEP = 10**8 - 1
"""Names of files have eight digits for it."""
_NETWORK, _OPTIMIZER, _PROGRESS = "network.safetensors", "optimizer.pt", "progress.json"
_MOST_IN_MEMORY = 2**30
"""Bytes of a file of a state that is read as a whole; a larger one, of a whole model, is mapped, so the host needs no room for it."""
_SUFFIX, _TEMPORARY = "-state", ".tmp"
_SCHEDULE_SETTINGS = {
    "learning_rate", "audio_learning_rate", "network_args", "lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps",
    "lr_decay_steps", "max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "items", "datasets", "processes",
}  # fmt: skip
"""What rates and their schedule follow from."""


def state_path(folder: Path, name: str, step: int) -> Path:
    return folder / f"{name}-step{step:08d}{_SUFFIX}"


class DamagedState(UserError):
    """Not a whole state; an older one may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedState:
    """What a state folder holds, read and checked as far as that goes without a run."""

    step: int
    settings: Mapping[str, Any]
    turn: int
    """How often the run had gone back behind steps that were saved (`earlier.turn_after`)."""
    torn: bool
    """Whether the weights lie in the middle of the update after `step`."""
    parts: int
    """Processes that held a part each of the weights; 1 = all is here."""
    network: Mapping[str, Tensor]
    stored: Mapping[str, Any]
    """Of optimizer, schedule and random numbers, and of what else has a state."""


class Watched(Protocol):
    """Something with a state of its own that goes on with the run."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_state(
    path: Path,
    *,
    network: TrainedNetwork,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    step: int,
    settings: Mapping[str, Any],
    watched: Mapping[str, Watched],
    turn: int = 0,
    torn: bool = False,
    parts: int = 1,
) -> None:
    """Write the state folder, whole or not at all.

    Args:
        parts: processes that hold a part each of the weights; the others have called `save_part` before.

    Raises:
        OSError: it could not be written; an older state stays as it is.
    """
    weights = settled_values(network)  # first, as it brings the states of streamed blocks home too
    stored = _stored(optimizer, scheduler, watched)
    progress = {"step": step, "settings": dict(settings)} | ({"turn": turn} if turn else {}) | ({"torn": True} if torn else {})
    progress |= {"parts": parts} if parts > 1 else {}

    def write(folder: Path) -> None:
        try:
            _write_part(folder, weights, stored, 0)
            for part in range(1, parts):
                for file in _part_folder(path, part).iterdir():
                    shutil.move(file, folder / file.name)
        except (RuntimeError, SafetensorError) as error:  # words of their own for whatever the system says
            raise OSError(f"the state could not be written ({error})") from error
        finally:
            for part in range(1, parts):
                shutil.rmtree(_part_folder(path, part), ignore_errors=True)
        sealed = {"fingerprints": {file.name: _fingerprint(file) for file in sorted(folder.iterdir())}}
        (folder / _PROGRESS).write_text(json.dumps(progress | sealed, indent=1, ensure_ascii=False), encoding="utf-8")

    write_folder(path, path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}"), write)


def save_part(
    path: Path, part: int, *, network: TrainedNetwork, optimizer: Optimizer, scheduler: LRScheduler, watched: Mapping[str, Watched]
) -> None:
    """Write a process's part beside the state folder `path`, into which `save_state` of the main process takes it.

    Raises:
        OSError: it could not be written.
    """
    folder = _part_folder(path, part)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _write_part(folder, settled_values(network), _stored(optimizer, scheduler, watched), part)
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"a part of the state could not be written ({error})") from error


def _stored(optimizer: Optimizer, scheduler: LRScheduler, watched: Mapping[str, Watched]) -> dict[str, Any]:
    stored = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "torch_rng": torch.get_rng_state()}
    return stored | {name: one.state_dict() for name, one in watched.items()}


def _part_folder(path: Path, part: int) -> Path:
    return path.with_name(f".{path.name}.{part}.part{_TEMPORARY}")


def _write_part(folder: Path, weights: Mapping[str, Tensor], stored: Mapping[str, Any], part: int) -> None:
    _write_tensors(folder / _of_part(_NETWORK, part), {name: part_of(value) for name, value in weights.items()})
    torch.save(stored, folder / _of_part(_OPTIMIZER, part))


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """As safetensors (https://huggingface.co/docs/safetensors), with one tensor at a time in host memory: a whole model may be trained."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            if tensor.numel():
                opened.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _of_part(name: str, part: int) -> str:
    """The name of a file of a process's part; of the first one the name itself."""
    stem, dot, ending = name.rpartition(".")
    return f"{stem}-{part}{dot}{ending}" if part else name


def read_state(path: Path, part: int = 0) -> SavedState:
    """
    Args:
        part: of which process; of several where the model is sharded.

    Raises:
        DamagedState: a file of it is missing, or does not hold what it should; names the file.
    """
    names = [_of_part(name, part) for name in (_NETWORK, _OPTIMIZER)]
    for name in (*names, _PROGRESS):
        if not (path / name).is_file():
            raise DamagedState(f"{path}: no training state (no {name}).")
    progress = _read_progress(path / _PROGRESS)
    file = path / names[0]
    try:
        _check_seal(file, progress)
        mapped = file.stat().st_size > _MOST_IN_MEMORY
        network = dict(sorted((load_file(file) if mapped else load(file.read_bytes())).items()))  # which come in no order
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedState(f"{file}: damaged ({error}).") from error
    if odd := [name for name, tensor in network.items() if not tensor.is_floating_point()]:
        raise DamagedState(f"{file}: '{odd[0]}' is of {network[odd[0]].dtype}, which no network is trained in.")
    if odd := [name for name, tensor in network.items() if not bool(torch.isfinite(tensor.float()).all())]:
        raise DamagedState(f"{file}: '{odd[0]}' holds NaN or infinity.")
    file = path / names[1]
    try:
        _check_seal(file, progress)
        mapped = file.stat().st_size > _MOST_IN_MEMORY
        source = file if mapped else io.BytesIO(file.read_bytes())
        stored = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except DamagedState:
        raise
    except Exception as error:  # zip, pickle and torch have each their own
        raise DamagedState(f"{file}: damaged, or no state of an optimizer ({_first_line(error)}).") from error
    if not (isinstance(stored, dict) and all(isinstance(stored.get(key), dict) for key in ("optimizer", "scheduler"))):
        raise DamagedState(f"{file}: must hold the states of an optimizer and a schedule.")
    if not all(tensor.layout == torch.strided and tensor.device.type == "cpu" for tensor in _tensors_in(stored)):
        raise DamagedState(f"{file}: holds a sparse tensor or one without values, which no optimizer leaves.")
    if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in _tensors_in(stored)):
        raise DamagedState(f"{file}: holds NaN.")
    if any(step < 0 for step in _steps_in(stored["optimizer"])):
        raise DamagedState(f"{file}: counts steps below 0.")
    rng = stored.get("torch_rng")
    if not (isinstance(rng, Tensor) and rng.dtype == torch.uint8 and rng.shape == torch.get_rng_state().shape):
        raise DamagedState(f"{file}: must hold torch's random state.")
    return SavedState(
        step=progress["step"],
        settings=progress["settings"],
        turn=progress.get("turn", 0),
        torn=bool(progress.get("torn")),
        parts=progress.get("parts", 1),
        network=network,
        stored=stored,
    )


def _fingerprint(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:32]


def _check_seal(file: Path, progress: Mapping[str, Any]) -> None:
    """Whether its bytes are those that were saved, as far as the state remembers them.

    Raises:
        DamagedState: they are others.
        OSError: it cannot be read.
    """
    known = progress.get("fingerprints")
    if isinstance(known, dict) and known.get(file.name) != _fingerprint(file):
        raise DamagedState(f"{file}: is not the file that was saved (its checksum differs): it is damaged, or of another state.")


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors anywhere in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(entry)


def _steps_in(optimizer: Mapping[str, Any]) -> Iterator[float]:
    """How many steps the optimizer has counted, for each parameter where it does so."""
    states = optimizer.get("state")
    for entry in states.values() if isinstance(states, dict) else ():
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, Tensor) and step.numel() == 1:
            step = step.item()
        if isinstance(step, int | float):
            yield step


def _read_progress(path: Path) -> dict[str, Any]:
    try:
        progress = read_json(path)
    except UserError as error:
        raise DamagedState(str(error)) from error
    if not isinstance(progress, dict) or not isinstance(progress.get("settings"), dict):
        raise DamagedState(f"{path}: must hold 'step' and 'settings'.")
    for key, value in (("step", progress.get("step")), ("turn", progress.get("turn", 0)), ("parts", progress.get("parts", 1))):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LAST_STEP:
            raise DamagedState(f"{path}: {key} = {value!r:.100}: must be a whole number of at least 0.")
    return progress


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_state(
    path: Path,
    *,
    network: TrainedNetwork,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    settings: Mapping[str, Any],
    watched: Mapping[str, Watched],
    part: int = 0,
    parts: int = 1,
) -> tuple[int, list[str]]:
    """Restore a run.

    Args:
        part, parts: which of the parts of a sharded model this process holds.

    Returns:
        The step to go on from, and what differs from the settings that the state was saved with, a line each.

    Raises:
        UserError: no whole state, or one of another network or optimizer.
    """
    saved = read_state(path, part)
    if saved.parts != parts:
        then, now = (f"sharded over {count} processes" if count > 1 else "whole in each process" for count in (saved.parts, parts))
        raise UserError(f"--resume {path}: the model was {then}, and is {now} here. Launch it as it was, or start from its checkpoint.")
    _check_optimizer(path, saved.settings, settings)
    current = {name: part_of(value) for name, value in settled_values(network).items()}
    if odd := _first_difference(saved.network, current):
        raise UserError(
            f"--resume {path}: the state is of another network ({odd}). Resume with the same --ltx_mode, --network_dim and --network_args."
        )
    set_values(network, saved.network, part_of)
    rates = [{key: group[key] for key in ("lr", "initial_lr")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(_computed_as_here(saved.stored["optimizer"], optimizer))
        if _changed(saved.settings, settings) & _SCHEDULE_SETTINGS:
            _replay(optimizer, scheduler, rates, saved.step)
        else:
            scheduler.load_state_dict(saved.stored["scheduler"])
        torch.set_rng_state(saved.stored["torch_rng"])
        for name, one in watched.items():
            if name in saved.stored:  # what was switched on since then starts anew; the settings' difference is listed
                one.load_state_dict(saved.stored[name])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"--resume {path}: {_OPTIMIZER} is damaged, or of another optimizer ({type(error).__name__}: {_first_line(error)}). "
            f"Resume with the same --optimizer_type.{_other_state(path)}"
        ) from error
    torn = [f"weights: in the middle of the update after step {saved.step} then"] if saved.torn else []
    return saved.step, torn + _differences(saved.settings, settings)


def _computed_as_here(stored: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state with this machine's choice of how its steps are computed, which a state of another one would bring along."""
    how = [{key: group[key] for key in ("fused", "foreach", "capturable") if key in group} for group in optimizer.param_groups]
    groups = [{**group, **own} for group, own in zip(stored["param_groups"], how, strict=True)]
    return {**stored, "param_groups": groups}


def check_resumable(path: Path) -> None:
    """
    Raises:
        UserError: no whole state; names the newest one beside it that is.
    """
    try:
        read_state(path)
    except DamagedState as error:
        raise UserError(f"--resume {path}: {error}{_other_state(path)}") from error


def _other_state(path: Path) -> str:
    """What to resume from in place of `path`, in words."""
    for other in reversed(states(path.parent, run_of(path))):
        if other.name == path.name:
            continue
        try:
            read_state(other)
        except DamagedState:
            continue
        return f" A whole one is beside it: --resume {quoted(other)}"
    return f" Give a folder that ends in '{_SUFFIX}' and is whole, or start from a saved LoRA with --network_weights."


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


def turn_of(path: Path) -> int:
    """Of a state; 0 where it does not say."""
    try:
        return _read_progress(path / _PROGRESS).get("turn", 0)
    except DamagedState:
        return 0


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
    pattern = re.compile(rf"\.{re.escape(name)}-step\d{{8}}{_SUFFIX}\.\d+(\.old|\.part)?{re.escape(_TEMPORARY)}")
    for path in [path for path in folder.iterdir() if pattern.fullmatch(path.name)]:
        shutil.rmtree(path, ignore_errors=True)


def states(folder: Path, name: str) -> list[Path]:
    """State folders of the run `name`, oldest first."""
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"{re.escape(name)}-step\d{{8}}{_SUFFIX}")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.is_dir())


def _check_optimizer(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: another optimizer, or other arguments of it, which the state holds and would put in place of the new ones.
    """
    for key in ("optimizer_type", "optimizer_args"):
        if key in _changed(saved, current):
            raise UserError(
                f"--resume {path}: the state was saved with --{key} {_shown(saved[key])}, this run has {_shown(current[key])}. Resume with "
                "the same, or start from the saved LoRA with --network_weights."
            )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


def _first_difference(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> str:
    """Where two networks differ in names or shapes; empty where they do not."""
    if odd := sorted(saved.keys() ^ current.keys()):
        return f"{len(saved)} tensors, this one has {len(current)}; first '{odd[0]}'"
    for name, tensor in saved.items():
        if tensor.shape != current[name].shape:
            return f"'{name}' is {tuple(tensor.shape)}, here {tuple(current[name].shape)}"
    return ""


def _replay(optimizer: Optimizer, scheduler: LRScheduler, rates: Sequence[Mapping[str, Any]], step: int) -> None:
    """Bring the new schedule to `step`, as the old one in the state would put the old rates in place of those that were asked for.

    Args:
        rates: of the optimizer's groups, as they were before the first step.
    """
    for group, fresh in zip(optimizer.param_groups, rates, strict=True):
        group.update(fresh)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        for _ in range(step):
            scheduler.step()


def _changed(saved: Mapping[str, Any], current: Mapping[str, Any]) -> set[str]:
    """Names of settings of both runs that differ."""
    current = json.loads(json.dumps(dict(current)))
    return {key for key in saved.keys() & current.keys() if saved[key] != current[key]}


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """A line each; of what another version of the trainer did not remember, nothing can be said."""
    return [f"{key}: {saved[key]!r} then, {current[key]!r} now" for key in sorted(_changed(saved, current))]
