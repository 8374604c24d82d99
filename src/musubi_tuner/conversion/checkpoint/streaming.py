"""Writing a safetensors file of any size with a few tensors in memory: the header is known beforehand, and bodies follow one by one.

https://huggingface.co/docs/safetensors: eight bytes of length, JSON, and the tensors' bytes in the order of the JSON, without holes.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.ltxv2.reading import TensorEntry
from musubi_tuner.ltxv2.weights import DTYPE_NAMES
from musubi_tuner.runtime.disk import FULL, check_folder, not_written, sync_folder
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.headers import SUFFIXES

_PIECE = 2**24
_SPARE = 2**20
"""Bytes of the disk that stay free."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    content: TensorEntry | Callable[[], Tensor]
    """Where its bytes are copied from, or what makes it when its turn has come."""

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize


def copied(name: str, entry: TensorEntry) -> Part:
    """A tensor as it lies in another file."""
    return Part(name, entry.dtype, entry.shape, entry)


def write_stream(path: Path, parts: Sequence[Part], metadata: Mapping[str, str], advance: Callable[[int], object]) -> None:
    """Write `path` whole or not at all.

    Args:
        parts: in their order in the file.
        advance: called with the bytes that were written.

    Raises:
        TemporaryFailure: the disk has no room for it, known before the first byte where the system says so.
        UserError: the file cannot be written, or a tensor is not what was said of it.
    """
    text = _header(parts, metadata)
    temporary = path.with_name(f".{path.name[:120]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(path, len(text) + sum(part.size for part in parts), temporary)
        with temporary.open("wb") as file:
            file.write(text)
            for part in parts:
                for piece in _pieces(part):
                    file.write(piece)
                    advance(len(piece))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in FULL:
            raise TemporaryFailure(f"{path}: the disk is full. Nothing of it is left; make room and run it again.") from error
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):  # where its folder cannot be made, the error that says so is the one to be seen
            temporary.unlink(missing_ok=True)


def check_new(path: Path, flag: str, *, overwrite: bool) -> None:
    """
    Raises:
        UserError: no name of a safetensors file, something is there already, or a file stands where its folder would be.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{flag} {path}: must end in .safetensors.")
    check_folder(path.parent, f"{flag} {path}")
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder. Give the name of a file.")
    if path.exists() and not overwrite:
        raise UserError(f"{flag} {path}: is there already. Give another name, or --overwrite.")


def total_size(parts: Iterable[Part]) -> int:
    return sum(part.size for part in parts)


def _header(parts: Sequence[Part], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    place = 0
    for part in parts:
        entries[part.name] = {"dtype": DTYPE_NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [place, place + part.size]}
        place += part.size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_room(path: Path, size: int, temporary: Path) -> None:
    temporary.unlink(missing_ok=True)  # of a run that was killed
    free = shutil.disk_usage(path.parent).free
    if size + _SPARE > free:
        raise TemporaryFailure(
            f"{path}: takes {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free. Make room, or name another disk."
        )


def _pieces(part: Part) -> Iterator[bytes | memoryview]:
    if isinstance(part.content, TensorEntry):
        entry = part.content
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            left = entry.size
            while left:
                piece = file.read(min(_PIECE, left))
                if not piece:
                    raise UserError(f"{entry.file}: ends before its tensor '{part.name}' does. Download it again.")
                left -= len(piece)
                yield piece
        return
    tensor = part.content().detach().to("cpu").contiguous()
    if tensor.dtype != part.dtype or tuple(tensor.shape) != part.shape:
        raise AssertionError(f"{part.name}: {tensor.dtype} {tuple(tensor.shape)} in place of {part.dtype} {part.shape}")
    if tensor.numel():
        yield tensor.flatten().view(torch.uint8).numpy().data
