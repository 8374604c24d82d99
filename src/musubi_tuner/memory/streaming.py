"""Weight streaming (block swap): the weights of some blocks lie in host memory and pass through a small ring of device buffers.

    Five streamed blocks, two slots; "<2" is a copy of block 2 on its way to the slot:

                     forward                              backward                       next step
        computes     0      1      2      3      4    |   4      3      2      1      0    |    0
        slot 0       0      <2     2      <4     4    |   4      <2     2      <0     0    |    0
        slot 1       1      1      <3     3      3    |   3      3      <1     1      1    |    1

Block n always has slot n modulo the number of slots (memory/ring.py). Once a block has been computed, its slot takes the streamed block
that is `slots` ahead in the direction of the pass, and that copy hides behind the computing of the blocks between. At the turn nothing is
copied: the last blocks of the forward pass are the first of the backward pass, and the last of that are the first of the next step. With S
streamed blocks each direction copies S - slots of them. A pass without gradients has no way back, so at its end the slots take the first
blocks again. `spread` chooses which blocks are streamed: evenly, so that each copy has the same number of resident blocks to hide behind.

Frozen weights never change, so they only ever travel to the device. Trained ones (`--full_finetune`) are updated in the slot while the
block's backward pass runs, as their gradients are used up there (training/weight_steps.py), and once that has ended they travel back,
before the slot takes another block. Autograd runs the update of a gradient that is complete before any other node, and nodes of later
operations before those of earlier ones, so all updates of a block come before the gate at its entry says that its backward pass has ended
(memory/engine.py). The host has the weights as they are whenever no backward pass runs, and after one that was cut short once `settle`
was called. What else belongs to a block's weights, the optimizer's states, travels beside them by the same calls (`Beside`).

Each block has one contiguous host buffer (memory/regions.py), pinned where there is a GPU: one large copy, asynchronous, at the full rate
of the bus.

The parameters of a block are views of its slot for as long as the streamer lives, instead of new tensors at every visit: autograd may save
them, and a compiled graph may hold their addresses, and both are right again as soon as the slot holds the block again. Autograd does not
believe that: it counts the writes to a tensor and refuses a saved one that was written to since. Slots are therefore written through
`.data`, which that count does not see. This also switches off the check, so tests have free slots overwritten with NaN (`poison`): a read
of the wrong weights shows. Each trained weight has a count of its own, so that its update is seen and those of its neighbors are not.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from musubi_tuner.memory.pinning import pin
from musubi_tuner.memory.regions import Region, aligned
from musubi_tuner.memory.ring import Ring


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor lies in a block's buffer."""

    module: nn.Module
    leaf: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    end: int
    trained: bool

    def of(self, buffer: Tensor) -> Tensor:
        """The tensor as it lies in a buffer."""
        return buffer[self.start : self.end].view(self.dtype).view(self.shape)


class Beside(Protocol):
    """What travels beside trained blocks, by their numbers in the order of the forward pass."""

    def before_backward(self, number: int) -> None: ...

    def after_backward(self, number: int) -> None: ...

    def settle(self) -> None:
        """As `BlockStreamer.settle`."""
        ...


def spread(blocks: int, streamed: int) -> list[int]:
    """Which of `blocks` are streamed: `streamed` of them, evenly spread."""
    assert 0 <= streamed <= blocks
    return [(2 * i + 1) * blocks // (2 * streamed) for i in range(streamed)]


class BlockStreamer:
    """Brings the weights of each streamed block to its slot before they are read, in both directions of the pass."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        *,
        slots: int = 2,
        poison: bool = False,
        regions: Sequence[Region] | None = None,
        trained: bool = False,
    ) -> None:
        """
        Args:
            blocks: the streamed blocks in the order of the forward pass; their tensors are moved into host buffers here, and other
                parameters are in their places then.
            slots: buffers on the device; one is in use while the others are being filled.
            poison: fill a slot with NaN bytes as soon as it is free, so that a stale read shows (for tests).
            regions: host memory of each block, where most of it lies already; None = its tensors are copied into regions here. Processes
                that share regions must all have come here before the first pass, which is the first to read them.
            trained: tensors that require gradients are streamed too, and written back after the backward pass; else they stay as they are.

        Raises:
            PinningFailed: the system does not let so much host memory be pinned.
        """
        self._order = {block: number for number, block in enumerate(blocks)}
        self.slots, self.poison = slots, poison
        if regions is None:
            tensors = [itertools.chain(block.parameters(), block.buffers()) for block in blocks]
            regions = Region.of_own([sum(aligned(one.nbytes) for one in own if trained or not one.requires_grad) for own in tensors])
        places = [_layout(block, region, trained=trained) for block, region in zip(blocks, regions, strict=True)]
        hosts = [_pack(own, region, pinned=device.type == "cuda") for own, region in zip(places, regions, strict=True)]
        self._ring = Ring(hosts, device, slots=slots, poison=poison)
        self._homes: dict[Tensor, Tensor] = {}
        self.trained: list[list[nn.Parameter]] = []
        """Of each streamed block."""
        for number, (own, host) in enumerate(zip(places, hosts, strict=True)):
            found = {place: _set(place, place.of(self._ring.buffer(number))) for place in own}
            self._homes |= {tensor: place.of(host) for place, tensor in found.items()}
            self.trained.append([one for one in found.values() if isinstance(one, nn.Parameter) and one.requires_grad])
        self._within_backward: set[int] = set()
        """Blocks whose backward pass has begun and not ended."""
        self.beside: Beside | None = None

    @property
    def host_bytes(self) -> int:
        return self._ring.host_bytes

    @property
    def device_bytes(self) -> int:
        return self._ring.device_bytes

    def before_forward(self, block: nn.Module) -> None:
        self._use(block)

    def after_forward(self, block: nn.Module, *, last: bool) -> None:
        """
        Args:
            last: no backward pass follows, so at the end the ring turns back to the first blocks.
        """
        number, slots = self._order.get(block), self._ring.slots
        if number is None:
            return
        if number + slots < len(self._order):
            self._ring.exchange(number, number + slots)
        elif last:
            self._ring.exchange(number, number % slots)

    def before_backward(self, block: nn.Module) -> None:
        number = self._order.get(block)
        if number is None:
            return
        self._use(block, changes=bool(self.trained[number]))
        if self.trained[number]:
            self._within_backward.add(number)
            if self.beside is not None:
                self.beside.before_backward(number)

    def after_backward(self, block: nn.Module) -> None:
        number, slots = self._order.get(block), self._ring.slots
        if number is None:
            return
        if self.trained[number]:
            self._ring.write_back(number)
            self._within_backward.discard(number)
        if number >= slots:
            self._ring.exchange(number, number - slots)
        if self.trained[number] and self.beside is not None:
            self.beside.after_backward(number)

    def settle(self) -> None:
        """Have the host hold all weights as they are, those of a backward pass that was cut short too, and what is beside them."""
        for number in self._within_backward:
            if self._ring.holds(number):
                self._ring.write_back(number)
        self._within_backward.clear()
        self._ring.settle()
        if self.beside is not None:
            self.beside.settle()

    def home(self, tensor: Tensor) -> Tensor:
        """Where a tensor lies on the host, to be read after `settle`, and written to before `forget`; itself where it is not streamed."""
        return self._homes.get(tensor, tensor)

    def forget(self) -> None:
        """The host was written to: what is in the slots is old."""
        self._ring.forget()

    def _use(self, block: nn.Module, *, changes: bool = False) -> None:
        number = self._order.get(block)
        if number is None:
            return
        if self._ring.is_empty:  # the first pass
            for first in range(self._ring.slots):
                self._ring.load(first)
        self._ring.use(number, changes=changes)  # which loads it after an interrupted pass


def _layout(block: nn.Module, region: Region, *, trained: bool) -> list[_Place]:
    """Tensors of a block where they lie in its region, and those that do not yet after them."""
    places, free = [], region.used
    for module in block.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, tensor in own:
            if tensor.requires_grad and not trained:
                continue
            start = region.place_of(tensor)
            if start is None:
                start = free
                free += aligned(tensor.nbytes)
            places.append(_Place(module, leaf, tensor.shape, tensor.dtype, start, start + tensor.nbytes, tensor.requires_grad))
    return places


def _pack(places: Sequence[_Place], region: Region, *, pinned: bool) -> Tensor:
    """The region's memory with all tensors in it; those that had memory of their own release it one by one."""
    total = aligned(max(place.end for place in places))
    buffer = region.bytes[:total]
    assert buffer.numel() == total, "a region has room for what adapters add"
    for place in places:
        tensor = getattr(place.module, place.leaf).detach()
        if region.writes and region.place_of(tensor) is None:
            buffer[place.start : place.end].copy_(tensor.contiguous().view(-1).view(torch.uint8))
        _set(place, torch.empty(0, dtype=place.dtype))
    if pinned:
        pin(buffer)
    return buffer


def _set(place: _Place, tensor: Tensor) -> Tensor:
    """The parameter or buffer that is now in its place."""
    if place.leaf not in place.module._parameters:
        place.module._buffers[place.leaf] = tensor
        return tensor
    own = tensor.data if place.trained else tensor  # `.data` has a count of versions of its own: see the head of this file
    parameter = place.module._parameters[place.leaf] = nn.Parameter(own, requires_grad=place.trained)
    return parameter
