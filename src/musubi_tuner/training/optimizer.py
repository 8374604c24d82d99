"""Optimizers and schedules, all from libraries."""

import ast
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from musubi_tuner.runtime.errors import UserError

_KNOWN = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "torch.optim.Adafactor",
    "prodigy": "prodigyopt.Prodigy",
    "sgd": "torch.optim.SGD",
}
_PACKAGES = {"bitsandbytes": "pip install bitsandbytes", "prodigyopt": "pip install prodigyopt"}


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], learning_rate: float, args: Mapping[str, str]
) -> Optimizer:
    """The optimizer called `name` (short name in any case, or a class by dotted name).

    Args:
        parameters: parameters, or groups of them with an `lr` each (`LoRANetwork.parameter_groups`).
        args: keyword arguments as text; each is read as a Python literal where it is one.

    Raises:
        UserError: an unknown name, a package that is not installed, or arguments that the class does not take.
    """
    dotted = _KNOWN.get(name.lower(), name)
    if "." not in dotted:
        raise UserError(
            f"--optimizer_type {name}: one of {', '.join(sorted(_KNOWN))}, or a class by dotted name such as torch.optim.AdamW."
        )
    optimizer_class = _import_class(name, dotted)
    try:
        return optimizer_class(parameters, lr=learning_rate, **{key: _literal(value) for key, value in args.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_type {name} with --optimizer_args {dict(args)}: {error}.") from error


def make_scheduler(name: str, optimizer: Optimizer, *, warmup_steps: int, total_steps: int) -> lr_scheduler.LRScheduler:
    """Linear warm-up, then the schedule called `name` over what is left of `total_steps`.

    `linear` and `polynomial` end at zero, `cosine` at zero, `cosine_with_restarts` has three cycles.

    Raises:
        UserError: a warm-up that leaves no step.
    """
    if warmup_steps >= total_steps:
        raise UserError(f"--lr_warmup_steps {warmup_steps}: must be less than the {total_steps} steps of the run.")
    rest = total_steps - warmup_steps
    main: lr_scheduler.LRScheduler
    if name == "constant":
        main = lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    elif name == "linear":
        main = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=rest)
    elif name == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=rest)
    elif name == "cosine_with_restarts":
        main = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=max(1, -(-rest // 3)))
    elif name == "polynomial":
        main = lr_scheduler.PolynomialLR(optimizer, total_iters=rest, power=2.0)
    else:
        raise UserError(f"--lr_scheduler {name}: unknown.")
    if warmup_steps == 0:
        return main
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return lr_scheduler.SequentialLR(optimizer, [warmup, main], milestones=[warmup_steps])


def _import_class(name: str, dotted: str) -> Any:
    module_name, _, class_name = dotted.rpartition(".")
    package = module_name.partition(".")[0]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        remedy = _PACKAGES.get(package, f"install the package that holds {package}")
        raise UserError(f"--optimizer_type {name}: {module_name} cannot be imported ({error}). Remedy: {remedy}.") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"--optimizer_type {name}: {module_name} has no optimizer class '{class_name}'.")
    return found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
