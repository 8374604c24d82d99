"""Reading official checkpoints: single safetensors files and split packs, tensor by tensor.

Only the tensors that are asked for are read: a 46 GB file costs its header plus what is used.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.ltxv2.reading import ReadAhead, TensorEntry, read_tensor
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import parse_json, read_json
from musubi_tuner.runtime.headers import GGUF, SUFFIXES, StoredTensor, read_header

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""What safetensors calls them."""
_SAMPLE_BYTES = 4096
INDEX_ENDING = ".safetensors.index.json"
QUANTIZATION = "_quantization_metadata"
"""Metadata that name the quantized layers of a file: {"layers": {...}}."""
SECTIONS = ("transformer", "vae", "audio_vae", "vocoder")
"""Of the `config` metadata; each is an object."""
_REWRITTEN = "The file is damaged or was rewritten by another tool: use the release's own file."


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint: a single file, or the files of a split pack."""

    path: Path
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    """The parsed `config` metadata, its `SECTIONS` among others; empty where the file has none."""
    entries: Mapping[str, TensorEntry]

    @property
    def model_version(self) -> str:
        """The `model_version` metadata, raw; empty where absent."""
        return self.metadata.get("model_version", "")

    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].dtype

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, to the CPU, in its stored dtype."""
        return read_tensor(name, self.entries[name])

    def tensors(self, names: Iterable[str]) -> ReadAhead:
        """Many, one after the other in the order of `names`, the next ones read ahead."""
        return ReadAhead((name, self.entries[name]) for name in names)

    def with_prefix(self, *prefixes: str) -> dict[str, str]:
        """{name without its prefix: full name} of the tensors under any of `prefixes`."""
        return {name[len(prefix) :]: name for name in self.entries for prefix in prefixes if name.startswith(prefix)}

    def fingerprint(self, mapping: Mapping[str, str]) -> str:
        """Identity of some tensors: names, shapes, dtypes and samples of their bytes.

        Reads at most 12 KiB a tensor, so 40 GB take seconds. Independent of the file's name and of its other tensors.

        Args:
            mapping: {name that counts for the identity: full name in this checkpoint}.
        """
        digest = hashlib.sha256()
        handles: dict[Path, Any] = {}
        try:
            for name in sorted(mapping):
                entry = self.entries[mapping[name]]
                digest.update(f"{name}|{entry.shape}|{entry.dtype}\n".encode())
                if entry.file not in handles:
                    handles[entry.file] = entry.file.open("rb")
                _hash_samples(handles[entry.file], entry, digest)
        finally:
            for handle in handles.values():
                handle.close()
        return digest.hexdigest()[:32]


def _hash_samples(handle: Any, entry: TensorEntry, digest: Any) -> None:
    length = entry.end - entry.start
    middle = entry.start + max(0, length // 2 - _SAMPLE_BYTES // 2)
    for offset in sorted({entry.start, middle, max(entry.start, entry.end - _SAMPLE_BYTES)}):
        handle.seek(offset)
        digest.update(handle.read(min(_SAMPLE_BYTES, entry.end - offset)))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint's header(s).

    Args:
        path: a `.safetensors` (or `.sft`) file, or the folder of a split pack (searched with its sub-folders).

    Raises:
        UserError: a missing path, a URL, another format, a shard that an index names and that is not there, and what `open_files` raises.
    """
    if re.match(r"\w{2,}:/", str(path)):  # a path has made one slash of two by now
        raise UserError(f"{path}: a URL. Models are local .safetensors files: download it first and give its path.")
    path = Path(path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
        for index in sorted(path.rglob(f"*{INDEX_ENDING}")):
            shards_of(index)
        if not files:
            raise UserError(f"{path}: the folder holds no .safetensors file. Give a checkpoint file or the folder of a split pack.")
    elif path.is_file():
        if path.suffix.lower() == ".gguf":
            raise UserError(f"{path}: {GGUF}")
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: not a .safetensors file. Pickled checkpoints (.pt, .ckpt) are never opened; convert it first.")
        files = [path]
    else:
        raise UserError(f"{path}: no such file or folder. Model paths must be local.")
    return open_files(path, files)


def open_files(path: Path, files: Sequence[Path]) -> Checkpoint:
    """Files that are one checkpoint together.

    Args:
        path: what messages call it.

    Raises:
        UserError: a header that `read_header` refuses, a dtype that torch lacks, `config` metadata that is no JSON object or has a
            section that is none, or one tensor name in two files.
    """
    metadata: dict[str, str] = {}
    config: dict[str, Any] = {}
    entries: dict[str, TensorEntry] = {}
    layers: dict[str, Any] = {}
    for file in files:
        header = read_header(file)
        metadata |= header.metadata
        layers |= quantized_layers(file, header.metadata) if len(files) > 1 else {}
        config |= _parse_config(file, header.metadata)
        file_entries = {name: _entry(file, name, stored) for name, stored in header.tensors.items()}
        twice = entries.keys() & file_entries.keys()
        if twice:
            raise UserError(
                f"{file}: tensor '{min(twice)}' is in {entries[min(twice)].file.name} too. "
                "A folder must hold one split pack only; move the other checkpoint away or give one file."
            )
        entries |= file_entries
    if layers:  # of all files, where other metadata are those of the last one
        metadata[QUANTIZATION] = json.dumps({"layers": layers})
    return Checkpoint(path=path, metadata=metadata, config=config, entries=entries)


def quantized_layers(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file's metadata declare of its own layers.

    Raises:
        UserError: metadata that declare nothing of the kind.
    """
    if QUANTIZATION not in metadata:
        return {}
    where = f"{file}: its '{QUANTIZATION}' metadata"
    content = parse_json(metadata[QUANTIZATION], where)
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, dict):
        raise UserError(f"{where} has no 'layers', an object for each quantized layer. {_REWRITTEN}")
    return layers


def shards_of(index: Path) -> list[Path]:
    """The files that an index (`*.safetensors.index.json`) names, beside it.

    Raises:
        UserError: it is no index, or files that it names are not there.
    """
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: no index of a checkpoint: 'weight_map' is to name the file of each tensor. Download it again.")
    files = [index.parent / name for name in sorted(set(names.values()))]
    lacking = [file.name for file in files if not file.is_file()]
    if lacking:
        raise UserError(
            f"{index}: names {len(files)} files, of which {len(lacking)} are not in its folder, first {lacking[0]}. Download them too."
        )
    return files


@contextmanager
def building_from(checkpoint: Checkpoint, section: str) -> Iterator[None]:
    """Around what builds a module from a section of the config: whatever a damaged section makes fail names the file and the section.

    Raises:
        UserError: in place of what is raised inside.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint.path}: nothing can be built from the section '{section}' of its 'config' metadata "
            f"({type(error).__name__}: {error}). {_REWRITTEN}"
        ) from error


def _parse_config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "config" not in metadata:
        return {}
    where = f"{file}: its 'config' metadata"
    config = parse_json(metadata["config"], where)
    if not isinstance(config, dict):
        raise UserError(f"{where} is no JSON object. {_REWRITTEN}")
    for section in SECTIONS:
        if not isinstance(config.get(section), dict | None):
            raise UserError(f"{where} has a section '{section}' that is no JSON object. {_REWRITTEN}")
    return {key: value for key, value in config.items() if isinstance(value, dict)}


def _entry(file: Path, name: str, stored: StoredTensor) -> TensorEntry:
    if stored.dtype not in _DTYPES:
        raise UserError(f"{file}: tensor '{name}' has the dtype {stored.dtype}, which training does not read. Give a file in bf16 or fp8.")
    return TensorEntry(file=file, shape=stored.shape, dtype=_DTYPES[stored.dtype], start=stored.start, end=stored.end)
