"""Writing a safetensors file of any size with a few tensors in memory: the header is known beforehand, and bodies follow one by one.

https://huggingface.co/docs/safetensors: eight bytes of length, JSON, and the tensors' bytes in the order of the JSON, without holes.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from musubi_tuner.ltxv2.reading import TensorEntry
from musubi_tuner.ltxv2.weights import DTYPE_NAMES
from musubi_tuner.runtime.disk import FULL, check_folder, not_written, reason, sync_folder
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.headers import SUFFIXES
from musubi_tuner.runtime.lock import held

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
        UserError: the file cannot be written, another process is writing it, a tensor is not what was said of it, or a file that tensors
            are copied from changes meanwhile.
    """
    text = _header(parts, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_alone(path) as temporary:
            try:
                _check_room(path, len(text) + sum(part.size for part in parts), temporary)
                _write(temporary, text, parts, advance)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in FULL:
            raise TemporaryFailure(f"{path}: the disk is full. Nothing of it is left; make room and run it again.") from error
        raise not_written(path, error) from error


@contextmanager
def writing_alone(path: Path) -> Iterator[Path]:
    """Where `path`, a file or a folder, is written before it gets its name, of which no other process makes use in the meantime. Its
    folder must be there.

    Raises:
        OSError: its folder takes no files.
        UserError: another process is writing it.
    """
    tempfile.TemporaryFile(dir=path.parent).close()  # says what is wrong with the folder, rather than with a lock in it
    name = f".{path.name[:120]}"
    with held(path.with_name(f"{name}.lock.tmp"), what=str(path), remedy="Wait for it to end, or give another name."):
        yield path.with_name(f"{name}.tmp")


def stamps_of(entries: Iterable[TensorEntry]) -> dict[Path, tuple[int, ...]]:
    """What tells the files of tensors from what they are once they have been written again.

    Raises:
        OSError: one has gone.
    """
    found: dict[Path, tuple[int, ...]] = {}
    for file in {entry.file for entry in entries}:
        stat = file.stat()
        found[file] = (stat.st_size, stat.st_mtime_ns)
    return found


def check_unchanged(before: Mapping[Path, tuple[int, ...]], entries: Iterable[TensorEntry]) -> None:
    """
    Raises:
        UserError: a file is another one than it was, or has gone.
    """
    try:
        now = stamps_of(entries)
    except OSError as error:
        raise UserError(f"{error.filename}: can no longer be read ({reason(error)}).") from None
    if changed := sorted(file for file, stamp in before.items() if now.get(file) != stamp):
        raise UserError(f"{changed[0]}: was changed by another program while it was in use, so what would be copied from it is not known.")


def _write(temporary: Path, text: bytes, parts: Sequence[Part], advance: Callable[[int], object]) -> None:
    sources = [part.content for part in parts if isinstance(part.content, TensorEntry)]
    before = stamps_of(sources)
    with temporary.open("wb") as file:
        file.write(text)
        for part in parts:
            for piece in _pieces(part):
                file.write(piece)
                advance(len(piece))
        file.flush()
        os.fsync(file.fileno())
    check_unchanged(before, sources)


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


def check_no_input(path: Path, flag: str, inputs: Iterable[Path]) -> None:
    """Of an output that is of another kind than what it is made of, so that no `--overwrite` can be meant for it.

    Raises:
        UserError: it would replace one of the files that it is made of.
    """
    if path.exists() and any(one.exists() and one.samefile(path) for one in inputs):
        raise UserError(f"{flag} {path}: is one of the files that are read, and would be lost. Give another place.")


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


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"{file}: can no longer be read ({reason(error)}).") from None


def _pieces(part: Part) -> Iterator[bytes | memoryview]:
    if isinstance(part.content, TensorEntry):
        entry = part.content
        with _opened(entry.file) as file:
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
