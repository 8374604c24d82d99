"""Tensors from the files of a checkpoint: while one is being used, the next ones are read by other threads.

Plain reads into one ring of memory, which is filled in the order in which tensors were asked for, so that nothing that is made of them
depends on the threads. Mapping the file in place of it reads a cold one in small pieces and in one thread; on Windows it counts the whole
file against the page file. Fresh memory for each tensor costs more than the reading, as every page of it has to be made first.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from musubi_tuner.runtime.errors import UserError

AHEAD_BYTES = 2**29
"""The largest tensor of the released transformers has 302 MB, most of the others 34 or 134."""
THREADS = 4
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """Offset in the file, in bytes."""
    end: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start

    @property
    def count(self) -> int:
        """Of its numbers."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A tensor that is being read, or was."""

    entry: TensorEntry
    data: Tensor
    """(size,) uint8"""
    start: int | None
    """Of its room in the ring, counted through all rounds; None for memory of its own."""
    done: Future[None]


def read_tensor(name: str, entry: TensorEntry) -> Tensor:
    """One tensor, on the CPU and in its stored dtype.

    Raises:
        UserError: the file cannot be read, or ends before the tensor does.
    """
    data = torch.empty(entry.size, dtype=torch.uint8)
    _read_into(data, name, entry)
    return _typed(data, entry)


class ReadAhead:
    """An iterator over tensors, each to be used before the next one is asked for: its memory is read into again then. A context manager."""

    def __init__(self, entries: Iterable[tuple[str, TensorEntry]], *, most_bytes: int = AHEAD_BYTES, threads: int = THREADS) -> None:
        """
        Args:
            entries: (name for messages, where it lies), in the order of the iteration.
            most_bytes: of the ring; a tensor that is larger gets memory of its own, one such at a time.
        """
        self._waiting = deque(entries)
        size = min(most_bytes, sum(_room(entry) for _, entry in self._waiting))
        self._ring = torch.empty(size // _ALIGNMENT * _ALIGNMENT, dtype=torch.uint8)
        self._head = 0
        self._begun: deque[_Begun] = deque()
        self._given: _Begun | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """
        Raises:
            UserError: as `read_tensor`, when the tensor's turn has come.
        """
        self._given = None
        while self._waiting and self._begin(*self._waiting[0]):
            self._waiting.popleft()
        if not self._begun:
            raise StopIteration
        self._given = self._begun.popleft()
        self._given.done.result()
        return _typed(self._given.data, self._given.entry)

    def own(self, tensor: Tensor) -> Tensor:
        """`tensor`, copied where it still lies in the ring."""
        return tensor.clone() if tensor.untyped_storage().data_ptr() == self._ring.untyped_storage().data_ptr() else tensor

    def _begin(self, name: str, entry: TensorEntry) -> bool:
        """Whether there was room."""
        room, length = _room(entry), self._ring.numel()
        if room > length:
            if self._begun:
                return False
            start, data = None, torch.empty(entry.size, dtype=torch.uint8)
        else:
            start = self._place(room)
            if start + room - self._oldest(start) > length:
                return False
            self._head = start + room
            data = self._ring.narrow(0, start % max(length, 1), entry.size)
        self._begun.append(_Begun(entry, data, start, self._pool.submit(_read_into, data, name, entry)))
        return True

    def _place(self, room: int) -> int:
        """The next place in the ring that has so much room up to its end."""
        length = max(self._ring.numel(), 1)
        over = self._head % length
        return self._head if over + room <= length else self._head + length - over

    def _oldest(self, default: int) -> int:
        """The first place in use."""
        used = chain([self._given] if self._given else [], self._begun)
        return next((one.start for one in used if one.start is not None), default)


def _room(entry: TensorEntry) -> int:
    return -(-entry.size // _ALIGNMENT) * _ALIGNMENT


def _read_into(data: Tensor, name: str, entry: TensorEntry) -> None:
    rest = memoryview(data.numpy())  # pyrefly: ignore[bad-argument-type] - numpy arrays are buffers
    try:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            while rest and (count := file.readinto(rest)):
                rest = rest[count:]
    except OSError as error:
        raise UserError(f"{entry.file}: tensor '{name}' could not be read ({error}). Is its disk still there?") from error
    if rest:
        raise UserError(f"{entry.file}: truncated: tensor '{name}' lacks its last {len(rest)} bytes. Download the file again.")


def _typed(data: Tensor, entry: TensorEntry) -> Tensor:
    return data.view(entry.dtype).view(entry.shape)
