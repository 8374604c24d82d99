"""Activation offload: whole blocks are recomputed, and the states that each block keeps wait in host memory instead of on the device.

With every block on the level `everything` a step still keeps the states of each block: one unit (memory/step_model.py) a block, 48 of them
for the longest time of all activations. Their order is known, last in and first out, so they travel like streamed weights
(memory/streaming.py): on a stream of their own, into pinned memory, ordered by events, the states of the next block coming back while this
one is recomputed. On the device there are never more than those of two blocks.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.memory.checkpointing import RunBlock, States
from musubi_tuner.memory.pinning import pinned_memory
from musubi_tuner.memory.regions import aligned


@dataclass(slots=True)
class _Kept:
    """The states of one block on the host, and their copies on the way back."""

    buffer: Tensor
    """(size,) uint8, in which they lie one after the other."""
    host: tuple[Tensor, ...]
    device: torch.device
    stored: torch.cuda.Event | None = None
    back: list[Tensor] | None = None
    fetched: torch.cuda.Event | None = None


class HostStore:
    """States of blocks on the host, last in and first out.

    Each block has one buffer, of the exact size of the largest states that came to it. Buffers are used again, for smaller states too, so
    clips of several sizes take no more than the largest ones.
    """

    def __init__(self) -> None:
        self._outstanding: list[_Kept] = []
        self._free: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def put(self, tensors: Sequence[Tensor]) -> _Kept:
        """Begin to copy them to the host.

        Raises:
            PinningFailed: the system does not let so much host memory be pinned.
        """
        device = tensors[0].device
        buffer = self._take_buffer(sum(aligned(tensor.nbytes) for tensor in tensors), pinned=device.type == "cuda")
        starts = itertools.accumulate((aligned(tensor.nbytes) for tensor in tensors), initial=0)
        host = tuple(
            buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=False)
        )
        kept = _Kept(buffer, host, device)
        self._outstanding.append(kept)
        if device.type != "cuda":
            for place, tensor in zip(host, tensors, strict=True):
                place.copy_(tensor)
            return kept
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for place, tensor in zip(host, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)
            kept.stored = torch.cuda.Event()
            kept.stored.record(self._stream)
        return kept

    def take(self, kept: _Kept) -> list[Tensor]:
        """The tensors, back on their device; begins to fetch those that were put before them, which are wanted next."""
        tensors = self._fetch(kept)
        kept.back = None  # `kept` lives until the whole backward pass has ended, and so would they
        self._outstanding = [other for other in self._outstanding if other is not kept]
        if self._outstanding:
            self._fetch(self._outstanding[-1])
        if kept.fetched is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.fetched)
        self._free.append(kept.buffer)
        return tensors

    def _take_buffer(self, size: int, *, pinned: bool) -> Tensor:
        """The smallest free buffer that is large enough; where none is, a new one in the place of the largest."""
        self._free.sort(key=Tensor.numel)
        for place, buffer in enumerate(self._free):
            if buffer.numel() >= size:
                return self._free.pop(place)
        if self._free:
            if self._stream is not None:
                self._stream.synchronize()  # what was in it may still be on its way
            self._free.pop()
        return pinned_memory(size) if pinned else torch.empty(size, dtype=torch.uint8)

    def _fetch(self, kept: _Kept) -> list[Tensor]:
        """Begin to copy them back, unless that has begun."""
        if kept.back is not None:
            return kept.back
        if kept.stored is None:
            kept.back = [one.clone() for one in kept.host]
            return kept.back
        with torch.cuda.stream(self._stream):
            kept.back = [one.to(kept.device, non_blocking=True) for one in kept.host]
            kept.fetched = torch.cuda.Event()
            kept.fetched.record(self._stream)
        for one in kept.back:
            one.record_stream(torch.cuda.current_stream(kept.device))
        return kept.back


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
