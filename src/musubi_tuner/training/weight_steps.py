"""Updates of a model's own weights, tensor by tensor: in bf16 with stochastic rounding, and within the backward pass where asked for.

bf16 has 8 bits of mantissa, so a number changes by 1/256 of itself at least. AdamW moves a weight by about its learning rate: 1e-5 on a
weight of 0.02 is 1/2000 of it, and rounding to the nearest would drop every such step. Float32 masters would keep them, for 4 bytes a
weight more (88 GB at 22 billion). Stochastic rounding keeps them in expectation for none: the update is computed in float32, and the
result is rounded up or down at random, with probabilities that make its mean exact (Gupta et al. 2015, arXiv 1502.02551; for training in
bf16 Zamirai et al. 2020, arXiv 2010.06192). What is drawn follows from the seed, the step and the weight's name, so a resumed run draws
the same.

    weight (bf16) -> float32 -> the optimizer's step on this tensor alone -> rounded at random -> weight

The optimizer holds a stand-in for each weight, which is float32 and empty between its steps. Its states so are those of a float32 weight,
also when they are loaded. Only optimizers that treat each tensor by itself can be run in this way.

Within the backward pass (`--fused_backward_pass`) autograd calls us as each gradient is complete. It is used up and freed there, so that
the gradients of one block are alive at a time (Lv et al. 2023, arXiv 2306.09782). No later operation of the pass reads the weight: its
gradient is complete only when all that use it are done, and a block that is recomputed was so before its first gradient.

Weights of streamed blocks are updated in the same way while they are on the device, with states that are there for the time being
(training/streamed_states.py); their stand-ins lie on the host, and so whatever a saved state puts into them does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from musubi_tuner.memory.streaming import BlockStreamer
from musubi_tuner.placement.sharding import part_of
from musubi_tuner.runtime.draws import seed_for
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.streamed_states import StreamedStates, travels

BY_TENSOR = ("adamw", "adamw8bit", "pagedadamw8bit", "adafactor", "lion", "lion8bit", "sgd")
"""Optimizers without a number that all tensors share."""
_LOW_BITS = 16
"""Of a float32 that bf16 has not."""


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """bf16 of float32 numbers, each of the two neighbors as likely as it is near; numbers that bf16 has stay.

    Args:
        generator: on the device of `value`.
    """
    noise = torch.randint(0, 1 << _LOW_BITS, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = noise.add_(value.contiguous().view(torch.int32)).bitwise_and_(-1 << _LOW_BITS)
    return bits.view(torch.float32).to(torch.bfloat16)


class WeightSteps:
    """Takes the optimizer's steps of a run that trains the model's own weights."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        groups: Iterable[Mapping[str, Any]],
        make: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        seed: int,
        part: int = 0,
        streamer: BlockStreamer | None = None,
    ) -> None:
        """
        Args:
            weights: by their names.
            groups: of these weights, for an optimizer.
            make: the optimizer of such groups.
            part: which part of the weights this process holds, where they are sharded.
            streamer: of the blocks whose weights lie on the host; all steps are taken within the backward pass then.
        """
        self._names = {weight: name for name, weight in weights.items()}
        self._part = part
        streamed = [] if streamer is None else streamer.trained
        on_host = {weight for block in streamed for weight in block}
        self._held = {weight: _stand_in(torch.device("cpu")) if weight in on_host else _held_for(weight) for weight in weights.values()}
        """Each weight's parameter in the optimizer: the weight itself where it is float32 and all here."""
        self.optimizer = make([{**group, "params": [self._held[weight] for weight in group["params"]]} for group in groups])
        self._place = {id(held): place for place, group in enumerate(self.optimizer.param_groups) for held in group["params"]}
        """Of its group; the groups themselves are others once a state has been loaded."""
        if streamer is not None:
            blocks = [[self._held[weight] for weight in block] for block in streamed]
            device = next(iter(weights.values())).device
            streamer.beside = StreamedStates(self.optimizer, blocks, device, slots=streamer.slots, poison=streamer.poison)
        self._seed, self._step = seed, 0
        self._norms: list[Tensor] = []

    def begin(self, step: int) -> None:
        """Before the first backward pass of a step."""
        self._step = step
        self._norms.clear()

    def step(self) -> None:
        """Update all weights that have gradients, which are used up."""
        if all(held is weight for weight, held in self._held.items()):
            self.optimizer.step()
            return
        for weight in self._held:
            if weight.grad is not None:
                self._step_one(weight)

    @contextmanager
    def within_backward(self, changed: Callable[[], None]) -> Iterator[None]:
        """Update each weight as soon as its gradient is complete, for as long as the context lasts.

        Args:
            changed: called before the first weight of a step changes.

        Raises:
            NotFinite: a gradient that is not; the weights that come after it are as they were. From the backward pass.
        """

        def update(weight: Tensor) -> None:
            assert weight.grad is not None and isinstance(weight, nn.Parameter)
            norm = torch.linalg.vector_norm(weight.grad, dtype=torch.float32)
            if not bool(torch.isfinite(norm)):
                raise NotFinite(self._names[weight])
            if not self._norms:
                changed()
            self._norms.append(norm)
            self._step_one(weight)

        hooks = [weight.register_post_accumulate_grad_hook(update) for weight in self._held]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def norm(self) -> Tensor:
        """() norm of the gradients that this step's backward pass has used up."""
        if not self._norms:
            return torch.zeros((), device=next(iter(self._held)).device)
        return torch.linalg.vector_norm(torch.stack(self._norms))

    @torch.no_grad()
    def _step_one(self, weight: nn.Parameter) -> None:
        held = self._held[weight]
        if held is weight:
            with self._alone(held):
                self.optimizer.step()
            weight.grad = None
            increment_version(weight)  # torch notices where the old weight would be read afterwards
            return
        assert weight.grad is not None
        own = part_of(weight.detach())
        if not own.numel():  # of a small tensor that other processes hold all of
            weight.grad = None
            return
        at_rest = held.device
        held.data = own.float()
        held.grad, weight.grad = part_of(weight.grad).float(), None
        self._fetch_loaded(held)
        with self._alone(held):
            self.optimizer.step()
        if own.dtype != torch.float32:  # else the step was taken on it
            number = seed_for(self._seed, "rounding", self._step, self._names[weight], self._part)
            own.copy_(round_stochastically(held.data, torch.Generator(own.device).manual_seed(number)))
        increment_version(weight)  # torch notices where the old weight would be read afterwards
        held.grad, held.data = None, torch.empty(0, device=at_rest)

    def _fetch_loaded(self, held: nn.Parameter) -> None:
        """States lie with their tensor: bitsandbytes leaves those that it loads on the host until its first step, and that is taken with
        one tensor."""
        states = self.optimizer.state.get(held, {})
        for key, value in states.items():
            if isinstance(value, Tensor) and value.device != held.device and not getattr(value, "is_paged", False):
                if travels(self.optimizer.param_groups[self._place[id(held)]], key):
                    states[key] = value.to(held.device)

    @contextmanager
    def _alone(self, held: nn.Parameter) -> Iterator[None]:
        """The optimizer with one tensor, in its own group."""
        groups = self.optimizer.param_groups
        before = [group["params"] for group in groups]
        for place, group in enumerate(groups):
            group["params"] = [held] if place == self._place[id(held)] else []
        try:
            yield
        finally:
            for group, parameters in zip(groups, before, strict=True):
                group["params"] = parameters


@contextmanager
def gradients_used_up(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Free each gradient as soon as it is complete, as `--fused_backward_pass` does, without an update: around a trial."""

    def drop(weight: Tensor) -> None:
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(drop) for weight in weights]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class NotFinite(ArithmeticError):
    """A gradient within the backward pass; the text names its weight."""


def check_by_tensor(optimizer_type: str, why: str) -> None:
    """
    Args:
        why: tensors are updated one by one.

    Raises:
        UserError: an optimizer that cannot be run in this way.
    """
    if optimizer_type.lower() not in BY_TENSOR:
        raise UserError(
            f"--optimizer_type {optimizer_type}: {why}, which needs an optimizer that keeps nothing of all weights together (a rate that "
            "it finds, a count of steps). Give AdamW, AdamW8bit, PagedAdamW8bit, Adafactor, Lion, Lion8bit or SGD."
        )


def _held_for(weight: nn.Parameter) -> nn.Parameter:
    return weight if weight.dtype == torch.float32 and part_of(weight) is weight else _stand_in(weight.device)


def _stand_in(device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(0, dtype=torch.float32, device=device))
