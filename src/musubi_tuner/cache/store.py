"""Reading and writing cache files: whole or not at all, finite, the same bytes for the same content; and identity by content."""

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from musubi_tuner.cache.names import ending_of
from musubi_tuner.runtime.errors import TemporaryFailure, UserError

FORMAT_VERSION = "1"
_TEMPORARY = ".tmp"
_WHOLE_UP_TO = 16 * 2**20
_BLOCK = 2**20
_BLOCKS = 16


class DiskFullError(TemporaryFailure):
    """No later write can succeed either, so a caching program stops here."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write through a temporary file in the same folder.

    Raises:
        UserError: NaN or infinity in a tensor; the old file, if any, is untouched. Also what `write_bytes` raises.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not bool(torch.isfinite(tensor.float()).all()):
            raise UserError(
                f"{path}: '{key}' holds NaN or infinity, so it was not written. The encoder or its dtype is at fault: "
                "try --vae_dtype float32 (--text_dtype float32), and check that the checkpoint is undamaged."
            )
    write_bytes(path, serialize(tensors, {"ltxv2_cache": FORMAT_VERSION, **metadata}))


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content: safetensors itself writes metadata in the order of a hash table."""
    data = save({key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}, metadata=dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    found = header.pop("__metadata__", {})
    ordered = {"__metadata__": dict(sorted(found.items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` atomically.

    Raises:
        DiskFullError: what was cached before stays good.
        UserError: the folder cannot be written.
    """
    temporary = path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:12]}.{os.getpid()}{ending_of(path.name)}{_TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFullError(
                f"{path}: the disk is full ({len(data):,} bytes were to be written). What is cached stays good; "
                "make room and run the same command again, it completes what is missing."
            ) from error
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def clean_temporaries(folder: Path, endings: Sequence[str]) -> int:
    """Remove what killed runs left behind in `folder`; returns how many files that were.

    Args:
        endings: those of the files that the calling program writes, so that another program at work in the same folder is left alone.
    """
    if not folder.is_dir():
        return 0
    found = [path for path in folder.glob(f".*{_TEMPORARY}") if path.name.removesuffix(_TEMPORARY).endswith(tuple(endings))]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Metadata, and {key: shape}, without reading tensors.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            return file.metadata() or {}, {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: missing or damaged ({error}). Run the caching program again; it makes this file again.") from error


def read_metadata(path: Path) -> dict[str, str]:
    return read_header(path)[0]


def read(path: Path) -> dict[str, Tensor]:
    """All tensors.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: missing or damaged ({error}). Run the caching program again; it makes this file again.") from error


def file_fingerprint(path: Path) -> str:
    """32 hex digits of a file's size and content.

    Files up to 16 MiB are hashed whole; of larger ones the head, the tail and evenly spaced blocks, 16 MiB in all.
    Renaming or copying a file does not change it.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE_UP_TO:
            digest.update(file.read())
        else:
            for block in range(_BLOCKS):
                file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]


def text_fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
