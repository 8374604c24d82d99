"""The header of a safetensors file, held against its own rules before a byte of a tensor is read.

Eight bytes of length (little endian), JSON of that length, and the tensors' bytes:
https://huggingface.co/docs/safetensors. The JSON gives each tensor a `dtype`, a `shape` and two `data_offsets` into the bytes after
it, and may have `__metadata__`, texts by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import parse_json

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "C64": 64, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Of one element, by the names of the dtypes of safetensors."""

SUFFIXES = (".safetensors", ".sft")
"""Endings of safetensors files, in lower case."""

_MAX_HEADER_BYTES = 100_000_000
_LFS = b"version https://git-lfs"
GGUF = "a GGUF file, quantized for inference, which training does not read. Give the model's .safetensors file, in bf16 or fp8."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor, as a header describes it."""

    dtype: str
    """A key of `BITS`."""
    shape: tuple[int, ...]
    start: int
    """Offset in the file, in bytes."""
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What is in a file."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def read_header(file: Path) -> Header:
    """Read and check a header.

    Raises:
        UserError: a file that cannot be read, a git-lfs pointer, GGUF, a file that is cut short or is no safetensors file, and a header
            that breaks a rule of the format: it names the tensor or the key.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            first = handle.read(64)
            length = int.from_bytes(first[:8], "little")
            _check_kind(file, first, size, length)
            handle.seek(8)
            text = handle.read(length)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error}).") from error
    try:
        header = parse_json(text.decode(), f"{file}: its safetensors header")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: its safetensors header is not UTF-8 ({error}). {_AGAIN}") from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: its safetensors header is {_kind(header)}, not an object. {_AGAIN}")
    metadata = _checked_metadata(file, header.pop("__metadata__", {}))
    tensors = {name: _checked_tensor(file, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_overlaps(file, tensors)
    return Header(metadata, tensors)


_AGAIN = "The file is damaged, or no safetensors file: download it again."


def _check_kind(file: Path, first: bytes, size: int, length: int) -> None:
    if first.startswith(_LFS):
        raise UserError(
            f"{file}: a git-lfs pointer of {size} bytes, not the model. Run 'git lfs pull' in its folder, or download the file itself."
        )
    if first.startswith(b"GGUF"):
        raise UserError(f"{file}: {GGUF}")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise UserError(f"{file}: truncated, or no safetensors file ({size} bytes). Download it again and compare its size.")


def _checked_metadata(file: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise UserError(f"{file}: '__metadata__' in its safetensors header is {_kind(metadata)}, not an object of texts. {_AGAIN}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise UserError(f"{file}: its metadata '{key}' is {_kind(value)}; metadata are texts. Write the file again with safetensors.")
    return metadata


def _checked_tensor(file: Path, name: str, entry: Any, begin: int, size: int) -> StoredTensor:
    """
    Args:
        begin: of the tensors' bytes in the file.
        size: of the file.
    """
    where = f"{file}: tensor '{name}'"
    if not isinstance(entry, dict):
        raise UserError(f"{where} is described by {_kind(entry)}, not by an object. {_AGAIN}")
    if lacking := [key for key in ("dtype", "shape", "data_offsets") if key not in entry]:
        raise UserError(f"{where} has no '{lacking[0]}' in the header. {_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UserError(f"{where} has the dtype {dtype!r}, which is not supported ({', '.join(BITS)}).")
    if not _are_counts(shape):
        raise UserError(f"{where} has the shape {shape!r}; a shape is a list of whole numbers from 0. {_AGAIN}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{where} has the data_offsets {offsets!r}; they are two whole numbers, start and end. {_AGAIN}")
    start, end = (begin + offset for offset in offsets)
    if end > size:
        raise UserError(f"{file}: truncated: tensor '{name}' ends at byte {end}, the file at {size}. Download it again.")
    needed = -(-prod(shape) * BITS[dtype] // 8)
    if end - start != needed:
        raise UserError(f"{where} has {end - start} bytes, but {dtype} of the shape {shape} takes {needed}. {_AGAIN}")
    return StoredTensor(dtype, tuple(shape), start, end)


def _check_overlaps(file: Path, tensors: Mapping[str, StoredTensor]) -> None:
    before, last = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start < before:
            raise UserError(f"{file}: the tensors '{last}' and '{name}' lie on the same bytes. {_AGAIN}")
        before, last = tensor.end, name


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
