"""Host memory of one streamed block, into which its tensors are laid while they are loaded."""

from collections.abc import Iterable

import torch
from torch import Tensor

SPARE = 2 * 2**20
"""Beside the sizes that are asked for, for what adapters add to a block; memory that nobody writes to is not taken."""

_ALIGNMENT = 256


def aligned(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes in a region."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Region:
    """Tensors one after the other."""

    def __init__(self, memory: Tensor, *, writes: bool = True) -> None:
        """
        Args:
            memory: (size,) uint8
            writes: False where another process lays the same tensors into the same memory.
        """
        self.bytes = memory
        self.writes = writes
        self.used = 0

    @staticmethod
    def of_own(sizes: Iterable[int]) -> list["Region"]:
        """Regions of this process alone, for blocks of these sizes."""
        return [Region(torch.empty(size + SPARE, dtype=torch.uint8)) for size in sizes]

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor as it lies in the region."""
        size = tensor.numel() * tensor.element_size()
        start = self.used
        self.used += aligned(size)
        assert self.used <= self.bytes.numel(), "a region is as large as all that is put into it"
        place = self.bytes[start : start + size]
        if self.writes:
            place.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        return place.view(tensor.dtype).view(tensor.shape)

    def place_of(self, tensor: Tensor) -> int | None:
        """Where a tensor begins that lies in the region; None for any other."""
        start = tensor.data_ptr() - self.bytes.data_ptr()
        inside = tensor.device.type == "cpu" and 0 <= start < self.bytes.numel() and tensor.numel() > 0
        return start if inside else None
