"""The optimizer's states of streamed blocks (memory/streaming.py): they lie in host memory, and come to the device for the block's backward
pass, in which its weights are updated (training/weight_steps.py).

    backward of block       4         3         2         1         0
    slot 0                  4    >4   <2        2    >2   <0        0    >0   <4
    slot 1                       <3   3    >3   <1        1    >1   <3

"<3" is a copy of the states of block 3 to the slot, ">3" the one back; in the forward pass they are not needed. What a state is, is the
optimizer's own business: whatever tensors it keeps for a weight go along, but for a count of steps that torch reads on the host. A block's
states are made by its first update, on the device, and get their place on the host after it; those of a batch that trains what none before
it has (sound, say) are joined to them in the same way. Between backward passes the optimizer holds the tensors on the host, so it is saved
as any other; where a saved state was put in their place, that is laid into the buffers when the block's turn comes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from musubi_tuner.memory.pinning import pinned_memory
from musubi_tuner.memory.regions import aligned
from musubi_tuner.memory.ring import Ring


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of a block's states."""

    held: nn.Parameter
    key: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    end: int
    home: Tensor
    """As it lies on the host."""

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.end].view(self.dtype).view(self.shape)

    def fits(self, held: nn.Parameter, key: str, tensor: Tensor) -> bool:
        return self.held is held and self.key == key and self.shape == tensor.shape and self.dtype == tensor.dtype


class StreamedStates:
    """Beside the weights of trained blocks (`memory.streaming.Beside`)."""

    def __init__(
        self,
        optimizer: Optimizer,
        blocks: Sequence[Sequence[nn.Parameter]],
        device: torch.device,
        *,
        slots: int,
        poison: bool = False,
    ) -> None:
        """
        Args:
            blocks: the optimizer's parameters of each streamed block, in the order of the forward pass.
            slots, poison: as of `Ring`.
        """
        self._optimizer, self._blocks, self._device = optimizer, blocks, device
        self._group_of = {held: group for group, own in enumerate(one["params"] for one in optimizer.param_groups) for held in own}
        self._ring = Ring([None] * len(blocks), device, slots=slots, poison=poison)
        self._entries: list[list[_Entry]] = [[] for _ in blocks]
        self._out: int | None = None
        """The block whose states are on the device."""

    @property
    def host_bytes(self) -> int:
        return self._ring.host_bytes

    @property
    def device_bytes(self) -> int:
        return self._ring.device_bytes

    def before_backward(self, number: int) -> None:
        """
        Raises:
            PinningFailed: the system does not let so much host memory be pinned.
        """
        found = list(self._tensors(number))
        if not found:
            return
        if not self._lie_at_home(number, found):  # from a saved state
            self._settle_in(number, found)
        self._ring.use(number, changes=True)
        buffer = self._ring.buffer(number)
        for entry in self._entries[number]:
            self._optimizer.state[entry.held][entry.key] = entry.of(buffer)
        self._out = number

    def after_backward(self, number: int) -> None:
        """
        Raises:
            PinningFailed: as `before_backward`.
        """
        was_here = self._ring.holds(number)
        self._bring_home(number)
        if not was_here:
            return  # made in this pass, beside which slots are not to take room already
        slots, last = self._ring.slots, len(self._blocks) - 1
        following = number - slots if number >= slots else last - (last - number) % slots
        if self._ring.host(following) is not None and (following != number or not self._ring.holds(number)):
            self._ring.exchange(number, following)

    def settle(self) -> None:
        """The optimizer holds tensors on the host that are as they are."""
        if self._out is not None:
            self._bring_home(self._out)
        self._ring.settle()

    def _bring_home(self, number: int) -> None:
        found, entries = list(self._tensors(number)), self._entries[number]
        self._out = None
        if len(found) != len(entries) or not all(entry.fits(*one) for entry, one in zip(entries, found, strict=True)):
            self._settle_in(number, found)
            return
        if not found:
            return
        buffer = self._ring.buffer(number)
        for entry, (held, key, tensor) in zip(entries, found, strict=True):
            place = entry.of(buffer)
            if tensor.data_ptr() != place.data_ptr():  # an optimizer that makes a new one
                place.copy_(tensor)
            self._optimizer.state[held][key] = entry.home
        self._ring.write_back(number)

    def _settle_in(self, number: int, found: list[tuple[nn.Parameter, str, Tensor]]) -> None:
        """Lay tensors that have no places yet, or others than now, into a buffer on the host."""
        size = sum(aligned(tensor.nbytes) for _, _, tensor in found)
        host = pinned_memory(size) if self._device.type == "cuda" else torch.empty(size, dtype=torch.uint8)
        entries, start = [], 0
        for held, key, tensor in found:
            end = start + tensor.nbytes
            home = host[start:end].view(tensor.dtype).view(tensor.shape)
            home.copy_(tensor)
            self._optimizer.state[held][key] = home
            entries.append(_Entry(held, key, tensor.shape, tensor.dtype, start, end, home))
            start += aligned(tensor.nbytes)
        self._entries[number] = entries
        self._ring.set_host(number, host)

    def _lie_at_home(self, number: int, found: Sequence[tuple[nn.Parameter, str, Tensor]]) -> bool:
        entries = self._entries[number]
        return len(found) == len(entries) and all(entry.home is tensor for entry, (_, _, tensor) in zip(entries, found, strict=True))

    def _tensors(self, number: int) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
        """What travels of a block's states, in one order; the optimizer makes its groups anew when it is loaded."""
        for held in self._blocks[number]:
            group = self._optimizer.param_groups[self._group_of[held]]
            for key, value in self._optimizer.state.get(held, {}).items():
                if isinstance(value, Tensor) and travels(group, key):
                    yield held, key, value


def travels(group: dict, key: str) -> bool:
    """Whether a tensor of a weight's state lies with the weight: torch counts steps on the host, unless its kernels do."""
    return key != "step" or bool(group.get("fused") or group.get("capturable"))
