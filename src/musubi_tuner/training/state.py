"""Saving a run so that it can go on exactly: adapters, optimizer, schedule, step. Order and noise follow from the step."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from musubi_tuner.networks.lora_ltxv2 import LoRANetwork
from musubi_tuner.runtime.errors import UserError

_NETWORK, _OPTIMIZER, _PROGRESS = "network.safetensors", "optimizer.pt", "progress.json"
_SUFFIX = "-state"
_SCHEDULE_SETTINGS = {
    "learning_rate", "audio_learning_rate", "network_args", "lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps",
    "lr_decay_steps", "max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "items", "processes",
}  # fmt: skip
"""What rates and their schedule follow from."""


def state_path(folder: Path, name: str, step: int) -> Path:
    return folder / f"{name}-step{step:08d}{_SUFFIX}"


class StateNotSaved(UserError):
    """A later one may succeed, once there is room."""


class Watched(Protocol):
    """Something with a state of its own that goes on with the run."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_state(
    path: Path,
    *,
    network: LoRANetwork,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    step: int,
    settings: Mapping[str, Any],
    watched: Mapping[str, Watched],
) -> None:
    """Write the state folder, whole or not at all.

    Raises:
        StateNotSaved: the disk is full, or the folder cannot be written; an older state stays as it is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    stored = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "torch_rng": torch.get_rng_state()}
    stored |= {name: one.state_dict() for name, one in watched.items()}
    progress = {"step": step, "settings": dict(settings)}
    try:
        temporary.mkdir(parents=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in network.named_parameters().items()}, temporary / _NETWORK)
        torch.save(stored, temporary / _OPTIMIZER)
        (temporary / _PROGRESS).write_text(json.dumps(progress, indent=1, ensure_ascii=False), encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors and torch have words of their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise StateNotSaved(f"{path}: the state could not be written ({error})") from error


def load_state(
    path: Path,
    *,
    network: LoRANetwork,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    settings: Mapping[str, Any],
    watched: Mapping[str, Watched],
) -> tuple[int, list[str]]:
    """Restore a run.

    Returns:
        The step to go on from, and what differs from the settings that the state was saved with, a line each.

    Raises:
        UserError: no state folder, or one of another network or optimizer.
    """
    for name in (_NETWORK, _OPTIMIZER, _PROGRESS):
        if not (path / name).is_file():
            raise UserError(f"--resume {path}: no training state (no {name}). Give a folder that ends in '{_SUFFIX}'.")
    progress = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
    _check_optimizer(path, progress["settings"], settings)
    saved = load_file(path / _NETWORK)
    current = network.named_parameters()
    if odd := _first_difference(saved, current):
        raise UserError(
            f"--resume {path}: the state is of another network ({odd}). Resume with the same --ltx_mode, --network_dim and --network_args."
        )
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(saved[name])
    stored = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
    rates = [{key: group[key] for key in ("lr", "initial_lr")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(stored["optimizer"])
    except ValueError as error:
        raise UserError(f"--resume {path}: the state is of another optimizer ({error}). Resume with the same --optimizer_type.") from error
    if _changed(progress["settings"], settings) & _SCHEDULE_SETTINGS:
        _replay(optimizer, scheduler, rates, progress["step"])
    else:
        scheduler.load_state_dict(stored["scheduler"])
    torch.set_rng_state(stored["torch_rng"])
    for name, one in watched.items():
        if name in stored:  # what was switched on since then starts anew; the settings' difference is listed
            one.load_state_dict(stored[name])
    return progress["step"], _differences(progress["settings"], settings)


def remove_old_states(folder: Path, name: str, keep: int, step: int) -> None:
    """Keep the newest `keep` of the states up to `step`; those beyond it are an earlier run's, and not for this one to judge."""
    newest = state_path(folder, name, step).name
    for path in [path for path in _states(folder, name) if path.name <= newest][:-keep]:
        shutil.rmtree(path)


def newest_state(folder: Path, name: str) -> Path | None:
    """What `--autoresume` goes on from; None where this run has left no state."""
    return next(reversed(_states(folder, name)), None)


def _states(folder: Path, name: str) -> list[Path]:
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
    return str(value) if isinstance(value, str) else " ".join(value) or "none"


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
    current = json.loads(json.dumps(dict(current)))
    return [
        f"{key}: {saved.get(key)!r} then, {current.get(key)!r} now"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
