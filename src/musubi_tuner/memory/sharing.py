"""Host memory that the processes of one machine have in common: frozen weights of streamed blocks lie there once, whatever the number
of cards.

An anonymous file in memory, which only its maker's process table names (Linux). It takes memory as far as it is written to, it needs no
room in /dev/shm (64 MB in many containers), and nothing of it stays behind when the processes end.
"""

import itertools
import mmap
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.memory.region import SPARE, Region

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
