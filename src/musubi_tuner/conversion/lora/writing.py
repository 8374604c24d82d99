"""A LoRA's new file or folder: checked, whole or not at all, never over another file unasked, and with how it was made."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from musubi_tuner.cache.store import serialize
from musubi_tuner.conversion.lora.contents import LoraContents
from musubi_tuner.conversion.lora.forms import WITH_ALPHA, config_text, formed
from musubi_tuner.networks.scales import HEADER, PEFT_CONFIG, PEFT_FILE
from musubi_tuner.runtime.disk import check_folder, reason, write_folder, write_whole
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.headers import read_header

_MADE_FROM = "ltxv2_made_from"
_COPIED = 2**24


def write_lora(contents: LoraContents, path: Path, *, form: str, dtype: torch.dtype, overwrite: bool, made_from: str) -> None:
    """
    Args:
        form: one of `FORMS`; PEFT's is a folder.
        made_from: what was done to which files, for the metadata.

    Raises:
        UserError: values that are not finite, something that is there already, or a place that cannot be written.
    """
    check_free(path, overwrite=overwrite, folder=form == "peft")
    result = formed(contents, form, dtype)
    bad = [key for key, value in result.tensors.items() if not bool(value.isfinite().all())]
    if bad:
        raise UserError(
            f"{path}: '{bad[0]}' would hold NaN or infinity in {str(dtype).removeprefix('torch.')}. Give --save_precision float32."
        )
    data = serialize(result.tensors, _metadata(contents, form, made_from))
    try:
        if result.config is None:
            write_whole(path, data, _temporary(path))
        else:
            config = config_text(result.config).encode()

            def fill(folder: Path) -> None:
                (folder / PEFT_FILE).write_bytes(data)
                (folder / PEFT_CONFIG).write_bytes(config)

            write_folder(path, _temporary(path), fill)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)}).") from error


def rewrite_metadata(source: Path, path: Path, metadata: Mapping[str, str], *, overwrite: bool) -> None:
    """Copy a safetensors file with other metadata; its tensors are copied byte for byte, a part at a time.

    Raises:
        UserError: as `write_lora`.
    """
    check_free(path, overwrite=overwrite, folder=False)
    header = read_header(source)
    first = min((tensor.start for tensor in header.tensors.values()), default=source.stat().st_size)
    entries = {
        name: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [one.start - first, one.end - first]}
        for name, one in header.tensors.items()
    }
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def copied(target: Path) -> None:
        with source.open("rb") as old, target.open("wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            old.seek(first)
            shutil.copyfileobj(old, new, _COPIED)
            new.flush()
            os.fsync(new.fileno())

    _write(path, copied)


def check_free(path: Path, *, overwrite: bool, folder: bool) -> None:
    """
    Raises:
        UserError: something is there, or it is named as another kind of thing.
    """
    if folder and path.suffix == ".safetensors":
        raise UserError(
            f"--output {path}: PEFT's form is a folder, with adapter_model.safetensors and adapter_config.json in it. Name one."
        )
    if not folder and path.suffix != ".safetensors":
        raise UserError(f"--output {path}: must end in .safetensors.")
    check_folder(path.parent, f"--output {path}")
    if not path.exists():
        return
    if path.is_dir() and (not folder or {one.name for one in path.iterdir()} - {PEFT_FILE, PEFT_CONFIG}):
        raise UserError(f"--output {path}: is a folder{' with other files in it' if folder else ''}. Give another name.")
    if not overwrite:
        raise UserError(f"--output {path}: is there already. Give another name, or --overwrite.")


def _write(path: Path, fill: Callable[[Path], None]) -> None:
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)}).") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")


def _metadata(contents: LoraContents, form: str, made_from: str) -> dict[str, str]:
    """Of the file that was read, with what is no longer true of it changed."""
    metadata = {key: value for key, value in contents.metadata.items() if key != HEADER}
    ranked = [one for one in contents.adapters.values() if one.rank]
    alphas = [one.rank * (one.scale if form in WITH_ALPHA else 1) for one in ranked]
    for key, values in (("ss_network_dim", [one.rank for one in ranked]), ("ss_network_alpha", alphas)):
        if values:
            metadata[key] = f"{values[0]:g}" if len(set(values)) == 1 else "Dynamic"
    before = metadata.get(_MADE_FROM)
    return metadata | {_MADE_FROM: f"{before}; {made_from}" if before else made_from}
