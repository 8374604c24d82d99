"""Reading and writing cache files: whole or not at all, finite, the same bytes for the same content; and identity by content."""

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

from musubi_tuner.cache.forms import Forms, TensorHeader, value_fault
from musubi_tuner.cache.names import ending_of, training_key
from musubi_tuner.cache.record import note_checked
from musubi_tuner.runtime.disk import FULL, not_written
from musubi_tuner.runtime.errors import TemporaryFailure, UserError

FORMAT_VERSION = "1"
_AGAIN = "Run the caching program again; it makes this file again."
_ENCODER_AT_FAULT = (
    "The encoder or its dtype is at fault: try --vae_dtype float32 (--text_dtype float32), and check that the checkpoint is undamaged."
)
_TEMPORARY = ".tmp"
_WHOLE_UP_TO = 16 * 2**20
_BLOCK = 2**20
_BLOCKS = 16


class DiskFullError(TemporaryFailure):
    """No later write can succeed either, so a caching program stops here."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], forms: Forms | None = None) -> None:
    """Write through a temporary file in the same folder.

    Args:
        forms: what the tensors must be; a file that was written with them counts as checked.

    Raises:
        UserError: NaN or infinity in a tensor, or values beyond its form's limits; the old file, if any, is untouched. Also what
            `write_bytes` raises.
    """
    if forms is not None and (fault := value_fault({training_key(key): tensor for key, tensor in tensors.items()}, forms(metadata))):
        raise UserError(f"{path}: {fault}, so it was not written. {_ENCODER_AT_FAULT}")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not bool(torch.isfinite(tensor.float()).all()):
            raise UserError(f"{path}: '{key}' holds NaN or infinity, so it was not written. {_ENCODER_AT_FAULT}")
    header, body = _parts(save(_ordered(tensors)))
    write_bytes(path, joined(header, body, {"ltxv2_cache": FORMAT_VERSION, **metadata}))
    if forms is not None:
        note_checked({path: tensors_fingerprint(header, body)})


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content: safetensors itself writes metadata in the order of a hash table."""
    return joined(*_parts(save(_ordered(tensors))), metadata)


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}


def joined(header: Mapping[str, Any], body: memoryview, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of its parts.

    Args:
        header: without metadata.
        body: the tensors' bytes.
    """
    ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, body))


def tensors_fingerprint(header: Mapping[str, Any], body: memoryview) -> str:
    """32 hex digits of a file's tensors: their names, dtypes, shapes and bytes. Metadata do not count."""
    digest = hashlib.sha256(canonical({key: entry for key, entry in header.items() if key != "__metadata__"}).encode())
    digest.update(body)
    return digest.hexdigest()[:32]


def read_parts(path: Path) -> tuple[dict[str, str], dict[str, Any], memoryview]:
    """Metadata, header without them, and the tensors' bytes of a file whose header is known to be sound (`read_header`).

    Raises:
        UserError: the file cannot be read.
    """
    try:
        header, body = _parts(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}). {_AGAIN}") from error
    return header.pop("__metadata__", {}), header, body


def _parts(data: bytes) -> tuple[dict[str, Any], memoryview]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]


def write_bytes(path: Path, data: bytes, *, lasting: bool = True) -> None:
    """Replace `path` by `data` atomically.

    Args:
        lasting: wait until a power cut would leave it whole.

    Raises:
        DiskFullError: what was cached before stays good.
        UserError: the folder cannot be written.
    """
    temporary = path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:12]}.{os.getpid()}{ending_of(path.name)}{_TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(
                f"{path}: the disk is full ({len(data):,} bytes were to be written). What is cached stays good; "
                "make room and run the same command again, it completes what is missing."
            ) from error
        raise not_written(path, error) from error
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


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorHeader]]:
    """Metadata, and shape and dtype of each tensor by key, without reading tensors.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return file.metadata() or {}, {name: TensorHeader(tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: missing or damaged ({error}). {_AGAIN}") from error


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
        raise UserError(f"{path}: missing or damaged ({error}). {_AGAIN}") from error


def file_fingerprint(path: Path) -> str:
    """32 hex digits of a file's size and content.

    Files up to 16 MiB are hashed whole; of larger ones the head, the tail and evenly spaced blocks, 16 MiB in all.
    Renaming or copying a file does not change it.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # opening a pipe waits for whoever writes into it
            raise UserError(f"{path}: is not a file. Repair it, or remove it.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            if size <= _WHOLE_UP_TO:
                digest.update(file.read())
            else:
                for block in range(_BLOCKS):
                    file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                    digest.update(file.read(_BLOCK))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Repair the file, or remove it.") from error
    return digest.hexdigest()[:32]


def text_fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
