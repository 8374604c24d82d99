"""Activation offload: whole blocks are recomputed, and the states that each block keeps wait in host memory instead of on the device.

With every block on the level `everything` a step still keeps the states of each block: one unit (memory/step_model.py) a block, 48 of them
for the longest time of all activations. Their order is known, last in and first out, so they travel like streamed weights
(memory/streaming.py): on a stream of their own, into pinned memory, ordered by events, the states of the next block coming back while this
one is recomputed. On the device there are never more than those of two blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.memory.checkpointing import RunBlock, States


@dataclass(slots=True)
class _Kept:
    """One tensor on the host, and its copy on the way back."""

    host: Tensor
    device: torch.device
    stored: torch.cuda.Event | None = None
    back: Tensor | None = None
    fetched: torch.cuda.Event | None = None


class HostStore:
    """States of blocks on the host, last in and first out; buffers are used again for tensors of the same shape."""

    def __init__(self) -> None:
        self._outstanding: list[tuple[_Kept, ...]] = []
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None

    def put(self, tensors: Sequence[Tensor]) -> tuple[_Kept, ...]:
        kept = tuple(self._put(tensor) for tensor in tensors)
        self._outstanding.append(kept)
        return kept

    def take(self, kept: tuple[_Kept, ...]) -> list[Tensor]:
        """The tensors, back on their device; begins to fetch those that were put before them, which are wanted next."""
        tensors = [self._fetch(one) for one in kept]
        self._outstanding = [other for other in self._outstanding if other is not kept]
        for one in self._outstanding[-1] if self._outstanding else ():
            self._fetch(one)
        for one in kept:
            if one.fetched is not None:
                torch.cuda.current_stream(one.device).wait_event(one.fetched)
            self._free.setdefault((one.host.shape, one.host.dtype), []).append(one.host)
        return tensors

    def _put(self, tensor: Tensor) -> _Kept:
        free = self._free.get((tensor.shape, tensor.dtype))
        cuda = tensor.is_cuda
        host = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
        kept = _Kept(host, tensor.device)
        if not cuda:
            host.copy_(tensor)
            return kept
        self._stream = self._stream or torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
            kept.stored = torch.cuda.Event()
            kept.stored.record(self._stream)
        tensor.record_stream(self._stream)
        return kept

    def _fetch(self, one: _Kept) -> Tensor:
        """Begin to copy it back, unless that has begun."""
        if one.back is not None:
            return one.back
        if one.stored is None:
            one.back = one.host.clone()
            return one.back
        with torch.cuda.stream(self._stream):
            one.back = one.host.to(one.device, non_blocking=True)
            one.fetched = torch.cuda.Event()
            one.fetched.record(self._stream)
        one.back.record_stream(torch.cuda.current_stream(one.device))
        return one.back


def run_from_host(
    store: HostStore, run_without_gradients: RunBlock, run: RunBlock, block: nn.Module, states: States, inputs: Any
) -> States:
    """The states after the block. Those before it wait in `store`, and the backward pass runs the block again from there.

    `torch.utils.checkpoint` would keep them on the device. No gradient is passed to the inputs.

    Args:
        run_without_gradients, run: how the block is run now, and in the backward pass.
    """
    present = (states[0] is not None, states[1] is not None)
    results = _HostCheckpoint.apply(
        store,
        lambda own: run_without_gradients(block, own, inputs),
        lambda own: run(block, own, inputs),
        present,
        *(state for state in states if state is not None),
    )
    return as_states(results, present)


class _HostCheckpoint(torch.autograd.Function):
    """Gradients of the block's parameters are accumulated by the backward pass within this one."""

    @staticmethod
    def forward(
        ctx: Any,
        store: HostStore,
        run_without_gradients: Callable[[States], States],
        run: Callable[[States], States],
        present: tuple[bool, bool],
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.store, ctx.present = run, store, present
        ctx.kept = store.put(states)
        with torch.no_grad():
            results = run_without_gradients(as_states(states, present))
        return tuple(result for result in results if result is not None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        states = [tensor.detach().requires_grad_() for tensor in ctx.store.take(ctx.kept)]
        with torch.enable_grad():
            results = [one for one in ctx.run(as_states(states, ctx.present)) if one is not None]
        pairs = [(result, gradient) for result, gradient in zip(results, gradients, strict=True) if gradient is not None]
        torch.autograd.backward([result for result, _ in pairs], [gradient for _, gradient in pairs])
        return (None, None, None, None, *(state.grad for state in states))


def as_states(tensors: Sequence[Tensor], present: Sequence[bool]) -> States:
    """The tensors of the streams that are `present`, None for the others."""
    remaining = iter(tensors)
    first, second = (next(remaining) if there else None for there in present)
    return first, second
