"""Optimizers and schedules, all from libraries; averaged weights, gradients over processes, clipping."""

import ast
import importlib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from musubi_tuner.config.validation import nearest
from musubi_tuner.placement.sharding import part_of
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.fused_adamw import FusedAdamW

log = logging.getLogger(__name__)

_CLASSES = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "Adafactor": "torch.optim.Adafactor",
    "Lion": "bitsandbytes.optim.Lion",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "CAME": "came_pytorch.CAME",
    "DAdaptAdam": "dadaptation.DAdaptAdam",
    "DAdaptLion": "dadaptation.DAdaptLion",
    "Prodigy": "prodigyopt.Prodigy",
    "ProdigyPlusScheduleFree": "prodigyplus.prodigy_plus_schedulefree.ProdigyPlusScheduleFree",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "SGD": "torch.optim.SGD",
}
_KNOWN = {name.lower(): dotted for name, dotted in _CLASSES.items()} | {"dadaptation": "dadaptation.DAdaptAdam"}
"""In any case; `DAdaptation` as musubi-tuner has it."""
_DEFAULTS: dict[str, dict[str, Any]] = {"torch.optim.Adafactor": {"eps": (None, 1.0)}}
"""Adafactor's steps are in proportion to a tensor's own size, 0.001 at least by torch's default; a LoRA's B starts at zero and would
hardly learn. With 1 a step is as large as the learning rate says."""
_ADAFACTOR_OF_TRANSFORMERS = ("relative_step", "scale_parameter", "warmup_init")
_FIND_THEIR_RATE = ("prodigy", "prodigyplusschedulefree", "dadaptadam", "dadaptlion", "dadaptation")
_LEAST_OF_THESE = 0.1
_PACKAGES = {
    "bitsandbytes": "pip install bitsandbytes",
    "prodigyopt": "pip install prodigyopt",
    "came_pytorch": "pip install came-pytorch",
    "dadaptation": "pip install dadaptation",
    "prodigyplus": "pip install prodigy-plus-schedule-free",
    "schedulefree": "pip install schedulefree",
}
_CYCLES, _POWER = 3, 2.0
_EXCHANGED = 2**30
"""Bytes of gradients that are averaged at once, which no network reaches."""
_CLIP_EPS = 1e-6
"""As torch has it."""


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
    if not re.fullmatch(r"\w+(\.\w+)+", dotted):
        raise UserError(
            f"--optimizer_type {name or repr(name)}: must be one of {', '.join(_CLASSES)}, or a class by dotted name such as "
            f"torch.optim.AdamW.{nearest(name.lower(), _KNOWN)}"
        )
    optimizer_class = _import_class(name, dotted)
    if dotted == _KNOWN["adafactor"] and (odd := [key for key in _ADAFACTOR_OF_TRANSFORMERS if key in args]):
        raise UserError(
            f"--optimizer_args {' '.join(f'{key}={args[key]}' for key in odd)}: of the Adafactor of transformers. This one is "
            "torch's, which needs none of them: it takes --learning_rate as it is, as the other does with all three False. Leave them out."
        )
    arguments = _DEFAULTS.get(dotted, {}) | {key: _literal(value) for key, value in args.items()}
    groups = [group if isinstance(group, dict) else {"params": [group]} for group in parameters]
    on_card = all(parameter.is_cuda for group in groups for parameter in group["params"])
    if dotted == _KNOWN["adamw"] and on_card and not {"fused", "foreach", "capturable"} & set(args):
        optimizer_class = FusedAdamW
    try:
        optimizer = optimizer_class(groups, lr=learning_rate, **arguments)
        with evaluating(optimizer):  # schedule-free ones look at their arguments only here
            return optimizer
    except Exception as error:  # each has its own ways of refusing
        raise UserError(f"--optimizer_type {name} with --optimizer_args {dict(args)}: {error}.") from error


def try_out(name: str, learning_rate: float, args: Mapping[str, str], schedule: "ScheduleOptions", device: torch.device) -> None:
    """Take a step with optimizer and schedule on a weight that nobody needs, before a model is loaded for them.

    Raises:
        UserError: what `make_optimizer` and `make_scheduler` raise, or a step that cannot be taken.
    """
    if name.lower() in _FIND_THEIR_RATE and learning_rate < _LEAST_OF_THESE:
        log.warning("WARNING: --optimizer_type %s finds its own rate and hardly learns at --learning_rate %g; give 1", name, learning_rate)
    weight = nn.Parameter(torch.ones(8, 8, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer(name, [{"params": [weight], "lr": learning_rate}], learning_rate, args)
    scheduler = make_scheduler(optimizer, schedule)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            optimizer.step()
    except Exception as error:  # whatever the class raises that wants a closure, sparse gradients, other arguments
        given = f" with --optimizer_args {' '.join(f'{key}={value}' for key, value in args.items())}" if args else ""
        raise UserError(
            f"--optimizer_type {name}{given}: cannot take a step here ({type(error).__name__}: {error}). An optimizer must take step() "
            "alone, on dense gradients."
        ) from error
    try:
        scheduler.step()
    except Exception as error:  # as above
        given = f" with --lr_scheduler_args {' '.join(f'{key}={value}' for key, value in schedule.args.items())}" if schedule.args else ""
        raise UserError(
            f"--lr_scheduler_type {schedule.class_name}{given}: cannot take a step here ({type(error).__name__}: {error}). A schedule must "
            "take step() alone."
        ) from error


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether it trains other weights than those that count."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


@contextmanager
def evaluating(optimizer: Optimizer) -> Iterator[None]:
    """Weights as they are to be saved and looked at: schedule-free optimizers keep others while they train.

    They come back from it to the bit, so that saving and looking change nothing of a run.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    schedule_free: Any = optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter.detach().clone() for parameter in parameters]
    schedule_free.eval()
    try:
        yield
    finally:
        schedule_free.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, trained, strict=True):
                parameter.copy_(value)


class WeightAverage:
    """A moving average of the trained weights (EMA): often steadier than the last step's. It is what is saved, previewed and validated.

    average <- d average + (1 - d) weights after each step, with d = min(decay, (1 + n) / (10 + n)) after n steps: the start is
    forgotten soon (as in TensorFlow's ExponentialMovingAverage with `num_updates`).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = dict(parameters)
        self._averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._decay = decay
        self._steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Take in the weights after an optimizer step."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        weights: list[Tensor] = [*self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the weights, which come back from it to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            weights = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name] = weights

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"steps": self._steps} | self._averages

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = int(state["steps"])
        for name, average in self._averages.items():
            average.copy_(state[name])


def average_gradients(parameters: Sequence[nn.Parameter], processes: int) -> None:
    """Replace every gradient by its mean over the processes, in one exchange.

    Adapters are small beside the model, so one flat buffer after the last backward costs less than hooks during it. A whole model's are
    exchanged by `_EXCHANGED` bytes. A parameter that took no part in this process's batch adds zero; one that took part in nobody's keeps
    none, as in a run of one process: with a gradient of zero an optimizer would move it on by its momentum.
    """
    if processes == 1:
        return
    for some in _by_size(parameters, _EXCHANGED):
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        own = [p.grad is not None for p in some]
        flat = torch.cat([*(piece.reshape(-1) for piece in pieces), torch.tensor(own).to(pieces[0])])
        torch.distributed.all_reduce(flat)
        flat /= processes
        *averages, counts = flat.split([*(p.numel() for p in some), len(some)])
        anywhere = own if all(own) else (counts > 0).tolist()  # only who lacks some waits for the answer
        for parameter, average, is_there in zip(some, averages, anywhere, strict=True):
            parameter.grad = average.view_as(parameter) if is_there else None


def _by_size(parameters: Sequence[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """In their order, by no more than so many bytes, but for one that is larger itself."""
    some: list[nn.Parameter] = []
    for parameter in parameters:
        if some and sum(one.nbytes for one in some) + parameter.nbytes > most:
            yield some
            some = []
        some.append(parameter)
    if some:
        yield some


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Total gradient norm (a scalar on the device), clipped to `max_norm` where that is above 0."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and all(gradient.is_cuda for gradient in gradients):
        return clip_together(gradients, max_norm)
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def clip_model(parameters: Sequence[nn.Parameter], max_norm: float, *, sharded: bool) -> Tensor:
    """As `clip`, of gradients of a model's own weights, whose norm is taken in float32 where they are bf16.

    Args:
        sharded: each process holds a part of every gradient.
    """
    gradients = [part_of(p.grad) for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    squares = torch.stack([torch.linalg.vector_norm(one, dtype=torch.float32) for one in gradients]).square().sum()
    if sharded:
        torch.distributed.all_reduce(squares)
    norm = squares.sqrt()
    if max_norm > 0:
        factor = (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
    return norm


def clip_together(gradients: list[Tensor], max_norm: float) -> Tensor:
    """As `clip`, of gradients on one device in one dtype. torch sorts them by both first, which takes the host longer than the rest."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0))
    return norm


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleOptions:
    """What `make_scheduler` is told."""

    name: str
    total_steps: int
    warmup: float = 0.0
    """Steps, or a share of the run below 1."""
    decay: float = 0.0
    """Steps at the end over which a constant rate falls to zero, or a share of the run below 1."""
    class_name: str | None = None
    """A scheduler class by dotted name, in place of `name`."""
    args: Mapping[str, str] = field(default_factory=dict)


def make_scheduler(optimizer: Optimizer, options: ScheduleOptions) -> lr_scheduler.LRScheduler:
    """Linear warm-up, then the schedule over what is left of the run.

    `linear`, `polynomial` and `cosine` end at zero; `cosine_with_restarts` has three cycles. `args` may hold `num_cycles` and `power`,
    or the arguments of the class.

    Raises:
        UserError: a warm-up or decay that leaves no step, an unknown argument, or a class that cannot be made.
    """
    warmup, decay = (_steps(value, options.total_steps) for value in (options.warmup, options.decay))
    if warmup + decay >= options.total_steps:
        raise UserError(
            f"--lr_warmup_steps {options.warmup:g} and --lr_decay_steps {options.decay:g}: together must be less than the "
            f"{options.total_steps} steps of the run. For a short trial add --lr_warmup_steps 0 --lr_decay_steps 0; a share of the run, "
            "such as --lr_warmup_steps 0.1, fits runs of any length."
        )
    rest = options.total_steps - warmup
    parts, milestones = [], []
    if warmup:
        parts.append(lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup))
        milestones.append(warmup)
    parts.append(_from_class(optimizer, options) if options.class_name is not None else _named(optimizer, options, rest))
    if decay:
        if options.class_name is not None or options.name not in ("constant", "constant_with_warmup"):
            raise UserError(f"--lr_decay_steps {options.decay:g}: is for a constant rate; --lr_scheduler {options.name} falls by itself.")
        parts.append(lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=decay))
        milestones.append(options.total_steps - decay)
    return parts[0] if len(parts) == 1 else lr_scheduler.SequentialLR(optimizer, parts, milestones=milestones)


def _steps(value: float, total: int) -> int:
    return round(value * total) if 0 < value < 1 else round(value)


def _named(optimizer: Optimizer, options: ScheduleOptions, rest: int) -> lr_scheduler.LRScheduler:
    known = {"cosine_with_restarts": "num_cycles", "polynomial": "power"}.get(options.name)
    for key in options.args:
        if key != known:
            raise UserError(f"--lr_scheduler_args {key}=...: --lr_scheduler {options.name} takes {known or 'none'}.")
    if options.name in ("constant", "constant_with_warmup"):
        return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    if options.name == "linear":
        return lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=rest)
    if options.name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=rest)
    if options.name == "cosine_with_restarts":
        cycles = round(_argument(options, "num_cycles", _CYCLES, least=1))
        return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=max(1, -(-rest // cycles)))
    return lr_scheduler.PolynomialLR(optimizer, total_iters=rest, power=_argument(options, "power", _POWER, least=0))


def _argument(options: ScheduleOptions, key: str, default: float, *, least: float) -> float:
    text = options.args.get(key, str(default))
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"--lr_scheduler_args {key}={text}: must be a number.") from None
    if not least <= value < math.inf:
        raise UserError(f"--lr_scheduler_args {key}={text}: must be {least:g} at least.")
    return value


def _from_class(optimizer: Optimizer, options: ScheduleOptions) -> lr_scheduler.LRScheduler:
    dotted = str(options.class_name)
    module_name, _, class_name = dotted.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name or "torch.optim.lr_scheduler"), class_name)
    except Exception as error:  # a user's module raises what it likes, and a name that is none TypeError or ValueError
        raise UserError(
            f"--lr_scheduler_type {dotted or repr(dotted)}: cannot be imported ({error}). Give a class by dotted name, such as "
            "torch.optim.lr_scheduler.StepLR."
        ) from error
    try:
        made = found(optimizer, **{key: _literal(value) for key, value in options.args.items()})
    except Exception as error:  # each has its own ways of refusing
        raise UserError(f"--lr_scheduler_type {dotted} with --lr_scheduler_args {dict(options.args)}: {error}.") from error
    if not isinstance(made, lr_scheduler.LRScheduler):
        raise UserError(f"--lr_scheduler_type {dotted}: is no scheduler of torch's kind.")
    return made


def _import_class(name: str, dotted: str) -> Any:
    module_name, _, class_name = dotted.rpartition(".")
    package = module_name.partition(".")[0]
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # what a module raises that lacks something, of its own or of this machine
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
