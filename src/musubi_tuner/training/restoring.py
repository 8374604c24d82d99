"""Setting a run back to a saved state: network, optimizer, schedule, random numbers; what differs from the settings of then is told."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from musubi_tuner.networks.whole import TrainedNetwork, set_values, settled_values
from musubi_tuner.placement.sharding import part_of
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.state import OPTIMIZER, Watched, first_line, read_state
from musubi_tuner.training.state_folders import other_state

_SCHEDULE_SETTINGS = {
    "learning_rate", "audio_learning_rate", "network_args", "lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps",
    "lr_decay_steps", "max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "items", "datasets", "clips", "processes",
}  # fmt: skip
"""What rates and their schedule follow from."""


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
    _check_groups(path, saved.stored.get("optimizer"), optimizer)
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
            f"--resume {path}: {OPTIMIZER} is damaged, or of another optimizer ({type(error).__name__}: {first_line(error)}). "
            f"Resume with the same --optimizer_type.{other_state(path)}"
        ) from error
    torn = [f"weights: in the middle of the update after step {saved.step} then"] if saved.torn else []
    return saved.step, torn + _differences(saved.settings, settings)


def _computed_as_here(stored: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state with this machine's choice of how its steps are computed, which a state of another one would bring along."""
    how = [{key: group[key] for key in ("fused", "foreach", "capturable") if key in group} for group in optimizer.param_groups]
    groups = [{**group, **own} for group, own in zip(stored["param_groups"], how, strict=True)]
    return {**stored, "param_groups": groups}


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


def _check_groups(path: Path, stored: object, optimizer: Optimizer) -> None:
    """
    Raises:
        UserError: as many groups of parameters as a run with other rates has.
    """
    groups = stored.get("param_groups") if isinstance(stored, Mapping) else None
    if isinstance(groups, Sequence) and len(groups) != len(optimizer.param_groups):
        raise UserError(
            f"--resume {path}: the state was saved with {len(groups)} group(s) of rates, this run has {len(optimizer.param_groups)}. "
            "Resume with --audio_learning_rate and the rates of --network_args where they were given, and without them where they were not."
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
