"""Weight streaming (block swap): the frozen weights of some blocks lie in host memory and pass through a small ring of device buffers.

    Five streamed blocks, two slots; "<2" is a copy of block 2 on its way to the slot:

                     forward                              backward                       next step
        computes     0      1      2      3      4    |   4      3      2      1      0    |    0
        slot 0       0      <2     2      <4     4    |   4      <2     2      <0     0    |    0
        slot 1       1      1      <3     3      3    |   3      3      <1     1      1    |    1

Block n always has slot n modulo the number of slots. Once a block has been computed, its slot takes the streamed block that is `slots`
ahead in the direction of the pass, and that copy hides behind the computing of the blocks between. At the turn nothing is copied: the last
blocks of the forward pass are the first of the backward pass, and the last of that are the first of the next step. With S streamed blocks
each direction copies S - slots of them. A pass without gradients has no way back, so at its end the slots take the first blocks again.
`spread` chooses which blocks are streamed: evenly, so that each copy has the same number of resident blocks to hide behind.

Frozen weights never change, so they only ever travel to the device. Each block has one contiguous host buffer (memory/regions.py), pinned
where there is a GPU: one large copy, asynchronous, at the full rate of the bus. Copies run on a stream of their own. The copy stream waits
for what the compute stream still reads of the slot, the compute stream waits for the event of the copy, and the host waits for neither.

The parameters of a block are views of its slot for as long as the streamer lives, instead of new tensors at every visit: autograd may save
them, and a compiled graph may hold their addresses, and both are right again as soon as the slot holds the block again. Autograd does not
believe that: it counts the writes to a tensor and refuses a saved one that was written to since. Slots are therefore written through
`.data`, which that count does not see. This also switches off the check, so tests have free slots overwritten with NaN (`poison`): a read
of the wrong weights shows.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musubi_tuner.memory.pinning import pin
from musubi_tuner.memory.regions import Region, aligned


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor lies in a block's buffer."""

    module: nn.Module
    leaf: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    end: int


@dataclass(slots=True)
class _Slot:
    """One device buffer."""

    buffer: Tensor
    holds: int | None = None
    loaded: torch.cuda.Event | None = None
    """Recorded on the copy stream after the last copy into the buffer."""


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
    ) -> None:
        """
        Args:
            blocks: the streamed blocks in the order of the forward pass; their frozen tensors are moved into host buffers here.
                Tensors that require gradients stay as they are.
            slots: buffers on the device; one is in use while the others are being filled.
            poison: fill a slot with NaN bytes as soon as it is free, so that a stale read shows (for tests).
            regions: host memory of each block, where most of it lies already; None = its tensors are copied into regions here. Processes
                that share regions must all have come here before the first pass, which is the first to read them.

        Raises:
            PinningFailed: the system does not let so much host memory be pinned.
        """
        self._device = device
        self._poison = poison
        self._order = {block: number for number, block in enumerate(blocks)}
        if regions is None:
            tensors = [itertools.chain(block.parameters(), block.buffers()) for block in blocks]
            regions = Region.of_own([sum(aligned(one.nbytes) for one in own if not one.requires_grad) for own in tensors])
        self._places = [_layout(block, region) for block, region in zip(blocks, regions, strict=True)]
        self._host = [_pack(places, region, pinned=device.type == "cuda") for places, region in zip(self._places, regions, strict=True)]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        size = max((buffer.numel() for buffer in self._host), default=0)
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(min(slots, len(blocks)))]
        for number, places in enumerate(self._places):
            buffer = self._slot(number).buffer
            for place in places:
                _set(place, buffer[place.start : place.end].view(place.dtype).view(place.shape))

    @property
    def host_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._host)

    @property
    def device_bytes(self) -> int:
        return sum(slot.buffer.numel() for slot in self._slots)

    def before_forward(self, block: nn.Module) -> None:
        self._use(block)

    def after_forward(self, block: nn.Module, *, last: bool) -> None:
        """
        Args:
            last: no backward pass follows, so at the end the ring turns back to the first blocks.
        """
        number = self._order.get(block)
        if number is None:
            return
        following = number + len(self._slots)
        if following < len(self._order):
            self._exchange(number, following)
        elif last:
            self._exchange(number, number % len(self._slots))

    def before_backward(self, block: nn.Module) -> None:
        self._use(block)

    def after_backward(self, block: nn.Module) -> None:
        number = self._order.get(block)
        if number is not None and number >= len(self._slots):
            self._exchange(number, number - len(self._slots))

    def _slot(self, number: int) -> _Slot:
        return self._slots[number % len(self._slots)]

    def _use(self, block: nn.Module) -> None:
        number = self._order.get(block)
        if number is None:
            return
        if self._slots[0].holds is None:  # the first pass
            for first in range(len(self._slots)):
                self._load(first)
        slot = self._slot(number)
        if slot.holds != number:  # after an interrupted pass
            self._load(number)
        if slot.loaded is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.loaded)

    def _exchange(self, done: int, wanted: int) -> None:
        """Block `done` is not read any more in this direction; its slot takes block `wanted`."""
        slot = self._slot(done)
        if self._poison:
            slot.buffer.data.fill_(0xFF)
        if done != wanted or self._poison:
            self._load(wanted)

    def _load(self, number: int) -> None:
        slot, host = self._slot(number), self._host[number]
        slot.holds = number
        # `.data` leaves autograd's version counter alone: see the head of this file.
        if self._copies is None:
            slot.buffer.data[: host.numel()].copy_(host)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))  # whatever has read, or had, this memory before
        with torch.cuda.stream(self._copies):
            slot.buffer.data[: host.numel()].copy_(host, non_blocking=True)
            slot.loaded = torch.cuda.Event()
            slot.loaded.record(self._copies)


def _layout(block: nn.Module, region: Region) -> list[_Place]:
    """Frozen tensors of a block where they lie in its region, and those that do not yet after them."""
    places, free = [], region.used
    for module in block.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, tensor in own:
            if tensor.requires_grad:
                continue
            start = region.place_of(tensor)
            if start is None:
                start = free
                free += aligned(tensor.nbytes)
            places.append(_Place(module, leaf, tensor.shape, tensor.dtype, start, start + tensor.nbytes))
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


def _set(place: _Place, tensor: Tensor) -> None:
    if place.leaf in place.module._parameters:
        place.module._parameters[place.leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        place.module._buffers[place.leaf] = tensor
