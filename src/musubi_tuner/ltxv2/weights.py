"""Reading official checkpoints: single safetensors files and split packs, tensor by tensor.

Only the tensors that are asked for are read: a 46 GB file costs its header plus what is used.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.reading import ReadAhead, TensorEntry, read_tensor
from musubi_tuner.runtime.errors import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint: a single file, or the files of a split pack."""

    path: Path
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    """The parsed `config` metadata: sections `transformer`, `vae`, `audio_vae`, `vocoder`; empty where the file has none."""
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
        path: a `.safetensors` file, or the folder of a split pack (searched with its sub-folders).

    Raises:
        UserError: a missing path, a URL, another format, a git-lfs pointer, a truncated file, or one tensor name in two files.
    """
    if "://" in str(path):
        raise UserError(f"{path}: a URL. Models are local .safetensors files: download it first and give its path.")
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob("*.safetensors"))
        if not files:
            raise UserError(f"{path}: the folder holds no .safetensors file. Give a checkpoint file or the folder of a split pack.")
    elif path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: not a .safetensors file. Pickled checkpoints (.pt, .ckpt) are never opened; convert it first.")
        files = [path]
    else:
        raise UserError(f"{path}: no such file or folder. Model paths must be local.")
    metadata: dict[str, str] = {}
    config: dict[str, Any] = {}
    entries: dict[str, TensorEntry] = {}
    for file in files:
        file_metadata, file_entries = _read_header(file)
        metadata |= file_metadata
        config |= _parse_config(file, file_metadata)
        twice = entries.keys() & file_entries.keys()
        if twice:
            raise UserError(
                f"{file}: tensor '{min(twice)}' is in {entries[min(twice)].file.name} too. "
                "A folder must hold one split pack only; move the other checkpoint away or give one file."
            )
        entries |= file_entries
    return Checkpoint(path=path, metadata=metadata, config=config, entries=entries)


def _parse_config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "config" not in metadata:
        return {}
    try:
        config = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}: its 'config' metadata is not JSON ({error}). The file is damaged or was rewritten by another tool."
        ) from error
    return {key: value for key, value in config.items() if isinstance(value, dict)}


def _read_header(file: Path) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise UserError(
                f"{file}: a git-lfs pointer of {size} bytes, not the model. Run 'git lfs pull' in its folder, or download the file itself."
            )
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"{file}: truncated, or no safetensors file ({size} bytes). Download it again and compare its size.")
        handle.seek(8)
        try:
            header = json.loads(handle.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: its safetensors header cannot be read ({error}). Download it again.") from error
    metadata = header.pop("__metadata__", {})
    entries = {}
    for name, item in header.items():
        if item["dtype"] not in _DTYPES:
            raise UserError(f"{file}: tensor '{name}' has the dtype {item['dtype']}, which is not supported.")
        start, end = (8 + length + offset for offset in item["data_offsets"])
        if end > size:
            raise UserError(f"{file}: truncated: tensor '{name}' ends at byte {end}, the file at {size}. Download it again.")
        entries[name] = TensorEntry(file=file, shape=tuple(item["shape"]), dtype=_DTYPES[item["dtype"]], start=start, end=end)
    return metadata, entries


def cast(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move to the device, and to `dtype` where the tensor is of floating point."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


Place = Callable[[str, Tensor], Tensor]


def fill(
    module: nn.Module,
    sources: Mapping[str, str],
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    place: Place | None = None,
) -> None:
    """Give a module that was built on the meta device its weights, strictly and in the order of `sources`.

    Args:
        module: parameters and persistent buffers are replaced in place.
        sources: {name in the module: full name in the checkpoint}.
        dtype: of floating point tensors.
        place: called as `place(name, tensor)` instead of the plain move to `device` and `dtype`; keeps nothing of `tensor` but what
            it returns.

    Raises:
        UserError: names missing from the checkpoint, names the module lacks, or shapes that differ.
    """
    device = torch.device(device)
    expected = module.state_dict()
    problems = _differences(expected, sources, checkpoint)
    if problems:
        raise UserError(f"{checkpoint.path}: its tensors do not fit {type(module).__name__}: " + "; ".join(problems) + ".")
    with checkpoint.tensors(sources.values()) as tensors:
        for name in sources:
            # No name for the tensor itself: a large one has to be gone before the next one is read.
            placed = place(name, next(tensors)) if place else cast(next(tensors), device, dtype)
            set_tensor(module, name, tensors.own(placed))


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer called `name`; a parameter stays frozen or trainable as it was."""
    owner_path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_path)
    old = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point()))
    else:
        owner.register_buffer(leaf, tensor)


def _differences(expected: Mapping[str, Tensor], sources: Mapping[str, str], checkpoint: Checkpoint) -> list[str]:
    problems = []
    if missing := sorted(expected.keys() - sources.keys()):
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(sources.keys() - expected.keys()):
        problems.append(f"unexpected {_some(unexpected)}")
    for name in sorted(expected.keys() & sources.keys()):
        wanted, found = tuple(expected[name].shape), checkpoint.shape(sources[name])
        if wanted != found:
            problems.append(f"'{name}' has the shape {found}, expected {wanted}")
        if len(problems) > 5:
            break
    return problems


def _some(names: Sequence[str], most: int = 4) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:most])
    return f"{len(names)} tensor(s): {listed}" + (", ..." if len(names) > most else "")
