"""Host memory of streamed blocks: a region for each block, into which its tensors are laid while they are loaded.

The processes of one machine can have their regions in common: the frozen weights of streamed blocks then lie there once, whatever the
number of cards. The shared memory is an anonymous file, which only its maker's process table names (Linux). It takes memory as far as it
is written to, it needs no room in /dev/shm (64 MB in many containers), and nothing of it stays behind when the processes end.
"""

import itertools
import mmap
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SPARE = 2 * 2**20
"""Added to the sizes asked for, for what adapters add to a block; pages that nobody writes to take no memory."""

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


Gather = Callable[[Any], list[Any]]
"""A value -> every process's value, in the order of the processes."""

_HEADER = _REGION = 64 * 1024
_TOKEN = 32


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """One process's view."""

    bytes: Tensor
    """(size,) uint8, the same memory in all processes of this machine."""
    writes: bool
    """Whether this process fills it; the others only read."""


def processes_here(gather: Gather) -> int:
    """How many of the processes run on this machine."""
    return gather(_machine()).count(_machine())


def can_share(gather: Gather) -> bool:
    """Whether `share_memory` gives the processes of this machine anything in common. All processes call it together."""
    return processes_here(gather) > 1 and share_memory(1, gather) is not None


def share_memory(size: int, gather: Gather) -> SharedMemory | None:
    """Memory of `size` bytes for the processes of each machine; None where the system has no such thing. All processes call it together."""
    me = (_machine(), os.urandom(_TOKEN))
    everyone = gather(me)
    maker = next(number for number, (machine, _) in enumerate(everyone) if machine == me[0])
    writes = everyone[maker] == me
    handle = _make(_HEADER + size, me[1]) if writes else None
    process, offered = gather((os.getpid(), handle))[maker]
    if not writes:
        handle = _open(process, offered, everyone[maker][1])
    all_opened = all(gather(handle is not None))
    memory = mmap.mmap(handle, _HEADER + size) if all_opened and handle is not None else None
    gather(None)  # the maker's handle stays open until all have the memory
    if handle is not None:
        os.close(handle)
    return None if memory is None else SharedMemory(torch.frombuffer(memory, dtype=torch.uint8)[_HEADER:], writes)


def share_regions(sizes: Sequence[int], gather: Gather) -> list[Region] | None:
    """Regions for blocks of these sizes; None as `share_memory`. All processes call it together."""
    rooms = [-(-(size + SPARE) // _REGION) * _REGION for size in sizes]
    memory = share_memory(sum(rooms), gather)
    if memory is None:
        return None
    starts = itertools.accumulate(rooms, initial=0)
    return [Region(memory.bytes[start : start + room], writes=memory.writes) for start, room in zip(starts, rooms, strict=False)]


def _machine() -> str:
    return socket.gethostname()


def _make(size: int, token: bytes) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None
    handle = os.memfd_create("ltxv2-blocks")
    os.ftruncate(handle, size)
    os.pwrite(handle, token, 0)
    return handle


def _open(process: int, handle: int | None, token: bytes) -> int | None:
    """The maker's memory; None where this process cannot see it (another container that has the same name, say)."""
    if handle is None:
        return None
    try:
        found = os.open(Path("/proc", str(process), "fd", str(handle)), os.O_RDWR)
    except OSError:
        return None
    if os.pread(found, _TOKEN, 0) == token:
        return found
    os.close(found)
    return None
