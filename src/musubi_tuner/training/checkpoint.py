"""Writing LoRA files: checked, atomic, with the metadata that model sites and our own loader read."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.cache.store import read_metadata, serialize
from musubi_tuner.networks.formats import connectors_path
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork
from musubi_tuner.runtime.disk import write_whole
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

_TEMPORARY, _TURN = ".tmp", "ltxv2_turn"
SAVE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def lora_path(folder: Path, name: str, *, step: int | None = None, epoch: int | None = None) -> Path:
    """The final file, or the one of a step or an epoch."""
    if step is not None:
        return folder / f"{name}-step{step:08d}.safetensors"
    if epoch is not None:
        return folder / f"{name}-{epoch:06d}.safetensors"
    return folder / f"{name}.safetensors"


def save_lora(network: LoRANetwork, path: Path, metadata: Mapping[str, str], dtype: torch.dtype, *, name: str) -> None:
    """Check the network and write it through a temporary file; adapters of the text connectors go to a file beside it.

    Args:
        name: of the run, whose leftovers `remove_leftovers` knows by it.

    Raises:
        UserError: the network is not whole, not finite or all zero.
        OSError: the file could not be written; an older one stays as it is.
    """
    parts = {path: network.of_transformer(), connectors_path(path): network.of_connectors()}
    try:
        files = {target: part.file_tensors(dtype) for target, part in parts.items() if part is not None}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for target, tensors in files.items():
        write_whole(target, serialize(tensors, metadata), target.with_name(f"{_temporary_stem(name)}{os.getpid()}{_TEMPORARY}"))


def check_whole(weights: Mapping[str, Tensor], path: Path) -> None:
    """
    Raises:
        UserError: a trained weight is not finite.
    """
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"{path}: '{name}' holds NaN or infinity; it is not written. Lower --learning_rate.")


def remove_old_loras(folder: Path, name: str, keep: int, *, step: int, epoch: int) -> None:
    """Keep the newest `keep` LoRAs of steps and as many of epochs, with what lies beside them; the final one always stays.

    Files beyond `step` and `epoch` are an earlier run's: they neither count nor go. One that cannot be removed, as Windows removes none
    that another program has open, is told of and costs no run.
    """
    newest_of_step, newest_of_epoch = lora_path(folder, name, step=step).name, lora_path(folder, name, epoch=epoch).name
    for digits, newest in ((r"-step\d{8}", newest_of_step), (r"-\d{6}", newest_of_epoch)):
        pattern = re.compile(re.escape(name) + digits + r"\.safetensors")
        saved = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.name <= newest)
        for path in saved[:-keep]:
            for old in (path, connectors_path(path)):
                try:
                    old.unlink(missing_ok=True)
                except OSError as error:
                    log.warning("WARNING: %s: an old LoRA that could not be removed (%s)", old, error.strerror)


def lora_files(folder: Path, name: str) -> list[Path]:
    """The LoRAs of the run `name`: the final one, those of steps and of epochs, with what lies beside them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_lora_name(path.name, name))


def is_lora_name(file: str, name: str) -> bool:
    """Whether the run `name` may write a file of that name, and remove it."""
    return re.fullmatch(re.escape(name) + r"(-step\d{8}|-\d{6})?(\.connectors)?\.safetensors", file) is not None


def steps_of(path: Path) -> int:
    """Steps that a finished LoRA was trained for; 0 where there is no such file, or it does not say."""
    try:
        return int(read_metadata(path).get("ss_steps", "0")) if path.is_file() else 0
    except (UserError, ValueError):
        return 0


def remove_leftovers(folder: Path, name: str) -> None:
    """What killed runs of this name have begun to write; call it while the run's lock is held."""
    whole = re.compile(rf"\.{re.escape(name)}(-step\d{{8}}|-\d{{6}})?\.safetensors(\.lock)?{re.escape(_TEMPORARY)}")
    for path in [path for path in folder.iterdir() if whole.fullmatch(path.name)]:
        path.unlink(missing_ok=True)
    for path in folder.glob(f"{_temporary_stem(name)}*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def _temporary_stem(name: str) -> str:
    """Short, as a long name has no room for more."""
    return f".{hashlib.sha256(name.encode()).hexdigest()[:12]}-lora."


def turn_of(path: Path) -> int:
    """As `training.state.turn_of`, of a LoRA."""
    try:
        return int(read_metadata(path).get(_TURN, "0"))
    except (UserError, ValueError):
        return 0


def lora_metadata(facts: Mapping[str, object], *, step: int, epoch: int, turn: int = 0) -> dict[str, str]:
    """`ss_*` and `modelspec.*` entries; `facts` are the run's own (see `training.setup`), `turn` as in `training.state`."""
    entries = {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in facts.items()}
    return entries | {"ss_steps": str(step), "ss_epoch": str(epoch)} | ({_TURN: str(turn)} if turn else {})
