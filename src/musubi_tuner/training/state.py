"""A run's state on disk, from which it can go on exactly: adapters, optimizer, schedule, step. Order and noise follow from the step."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
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
from musubi_tuner.networks.whole import TrainedNetwork, settled_values
from musubi_tuner.placement.sharding import part_of
from musubi_tuner.runtime.disk import write_folder
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json

LAST_STEP = 10**8 - 1
"""Names of files have eight digits for it."""
_NETWORK, OPTIMIZER, _PROGRESS = "network.safetensors", "optimizer.pt", "progress.json"
_MOST_IN_MEMORY = 2**30
"""Bytes of a file of a state that is read as a whole; a larger one, of a whole model, is mapped, so the host needs no room for it."""
SUFFIX, TEMPORARY = "-state", ".tmp"


def state_path(folder: Path, name: str, step: int) -> Path:
    return folder / f"{name}-step{step:08d}{SUFFIX}"


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

    write_folder(path, path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}"), write)


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
    return path.with_name(f".{path.name}.{part}.part{TEMPORARY}")


def _write_part(folder: Path, weights: Mapping[str, Tensor], stored: Mapping[str, Any], part: int) -> None:
    _write_tensors(folder / _of_part(_NETWORK, part), {name: part_of(value) for name, value in weights.items()})
    torch.save(stored, folder / _of_part(OPTIMIZER, part))


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
    names = [_of_part(name, part) for name in (_NETWORK, OPTIMIZER)]
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
        raise DamagedState(f"{file}: damaged, or no state of an optimizer ({first_line(error)}).") from error
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


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def turn_of(path: Path) -> int:
    """Of a state; 0 where it does not say."""
    try:
        return _read_progress(path / _PROGRESS).get("turn", 0)
    except DamagedState:
        return 0
