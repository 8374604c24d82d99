"""Whole recomputation whose kept block inputs wait in host memory instead of on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.memory.checkpointing import Run, States


@dataclass(slots=True)
class _Kept:
    """One tensor on the host, and its copy on the way back."""

    host: Tensor
    device: torch.device
    dtype: torch.dtype
    stored: torch.cuda.Event | None = None
    back: Tensor | None = None
    fetched: torch.cuda.Event | None = None


class HostStore:
    """Last in, first out. Copies run on a stream of their own; while one block is computed again, the inputs of the next come back."""

    def __init__(self) -> None:
        self._outstanding: list[tuple[_Kept, ...]] = []
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None

    def put(self, tensors: Sequence[Tensor]) -> tuple[_Kept, ...]:
        kept = tuple(self._put(tensor) for tensor in tensors)
        self._outstanding.append(kept)
        return kept

    def take(self, kept: tuple[_Kept, ...]) -> list[Tensor]:
        """The tensors on their device again; their host buffers are free for others."""
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
        kept = _Kept(host, tensor.device, tensor.dtype)
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


def run_from_host(store: HostStore, plain: Run, run: Run, block: nn.Module, states: States, inputs: Any) -> States:
    """The block's next states; its own wait in `store`, and the backward pass runs it again from there.

    Args:
        plain, run: how it is run now, without gradients, and in the backward pass, with them.
    """
    present = (states[0] is not None, states[1] is not None)
    results = _HostCheckpoint.apply(
        store,
        lambda own: plain(block, own, inputs),
        lambda own: run(block, own, inputs),
        present,
        *[state for state in states if state is not None],
    )
    return spread_out(results, present)


class _HostCheckpoint(torch.autograd.Function):
    """Gradients of the block's parameters are accumulated by the second run itself, and the store has the states back afterwards."""

    @staticmethod
    def forward(
        ctx: Any,
        store: HostStore,
        plain: Callable[[States], States],
        again: Callable[[States], States],
        present: tuple[bool, bool],
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.again, ctx.store, ctx.present = again, store, present
        ctx.kept = store.put(states)
        with torch.no_grad():
            results = plain(spread_out(states, present))
        return tuple(result for result in results if result is not None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        states = [tensor.detach().requires_grad_() for tensor in ctx.store.take(ctx.kept)]
        with torch.enable_grad():
            results = [result for result in ctx.again(spread_out(states, ctx.present)) if result is not None]
        pairs = [(result, gradient) for result, gradient in zip(results, gradients, strict=True) if gradient is not None]
        torch.autograd.backward([result for result, _ in pairs], [gradient for _, gradient in pairs])
        return (None, None, None, None, *(state.grad for state in states))


def spread_out(tensors: Sequence[Tensor], present: tuple[bool, bool]) -> States:
    """`tensors` at the places that are `present`, None at the others."""
    remaining = iter(tensors)
    return next(remaining) if present[0] else None, next(remaining) if present[1] else None
