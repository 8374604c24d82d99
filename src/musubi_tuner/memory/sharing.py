"""Host memory that the processes of one machine have in common: frozen weights of streamed blocks lie there once, whatever the number
of cards.

An anonymous file in memory, which only its maker's process table names (Linux). It takes memory as far as it is written to, it needs no
room in /dev/shm (64 MB in many containers), and nothing of it stays behind when the processes end.
"""

import mmap
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Gather = Callable[[Any], list[Any]]
"""A value -> every process's value, in the order of the processes."""

ALIGNMENT = 256
"""Of tensors in a block's memory, in bytes."""

_HEADER = _REGION = 64 * 1024
_SPARE = 2 * 2**20
"""For what adapters add to a block, and for gaps; memory that nobody writes to is not taken."""
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
    offered = gather((os.getpid(), handle))[maker]
    if not writes:
        handle = _open(*offered, everyone[maker][1])
    memory = mmap.mmap(handle, _HEADER + size) if all(gather(handle is not None)) else None
    gather(None)  # the maker's handle stays open until all have the memory
    if handle is not None:
        os.close(handle)
    return None if memory is None else SharedMemory(torch.frombuffer(memory, dtype=torch.uint8)[_HEADER:], writes)


class Region:
    """A part of host memory into which tensors are laid one after the other."""

    def __init__(self, memory: SharedMemory, start: int, size: int) -> None:
        self.bytes = memory.bytes[start : start + size]
        self.writes = memory.writes
        self.used = 0

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor as it lies in the region; a process that does not write trusts that the one that does puts the same."""
        size = tensor.numel() * tensor.element_size()
        start = self.used
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
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


def share_regions(sizes: Sequence[int], gather: Gather) -> list[Region] | None:
    """Regions for blocks of these sizes, each with room to spare; None as `share_memory`. All processes call it together."""
    rooms = [-(-(size + _SPARE) // _REGION) * _REGION for size in sizes]
    memory = share_memory(sum(rooms), gather)
    return None if memory is None else [Region(memory, sum(rooms[:number]), room) for number, room in enumerate(rooms)]


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
