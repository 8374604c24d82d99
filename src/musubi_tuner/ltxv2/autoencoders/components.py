"""What the frozen components share: finding their tensors in any kind of file, and their identity."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch

from musubi_tuner.ltxv2.filling import fill
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.runtime.errors import UserError

MEAN, STD = "per_channel_statistics.mean-of-means", "per_channel_statistics.std-of-means"
"""Statistics that latents are normalized by; other statistics in the files are not used."""


@dataclass(frozen=True, slots=True)
class Component:
    """One frozen part as a checkpoint holds it."""

    config: Mapping[str, Any]
    """Its section of the `config` metadata."""
    names: Mapping[str, str]
    """{bare official name: full name}"""

    def fingerprint(self, checkpoint: Checkpoint, names: Mapping[str, str], config: Mapping[str, Any]) -> str:
        """Identity of some of its tensors and keys, whatever file they lie in."""
        text = checkpoint.fingerprint(names) + json.dumps(config, sort_keys=True)
        return sha256(text.encode()).hexdigest()[:32]


def find_component(checkpoint: Checkpoint, section: str, prefix: str, marks: tuple[str, ...], *, what: str, flag: str) -> Component:
    """A component stored under `prefix`, or bare in a file of its own.

    Args:
        section: of the config; bare names such as `encoder.conv_in` mean this component only where its section is there.
        marks: bare names of which one must be there.

    Raises:
        UserError: the checkpoint lacks the component (the message names the flag that should point elsewhere), or its config.
    """
    config = checkpoint.config.get(section)
    bare = checkpoint.with_prefix("") if config is not None or "config" not in checkpoint.metadata else {}
    for names in (checkpoint.with_prefix(prefix), bare):
        if not any(name.startswith(marks) for name in names):
            continue
        if config is None:
            lacks = "its 'config' metadata has" if "config" in checkpoint.metadata else "it has no 'config' metadata, and so"
            raise UserError(
                f"{checkpoint.path}: {lacks} no '{section}' section that the {what} could be built from. Tools that cut a file apart or "
                "convert it lose this: use an unmodified release file."
            )
        return Component(config, names)
    raise UserError(f"{checkpoint.path}: holds no {what} ('{prefix}...'). Give {flag} a full checkpoint, or the file of the {what}.")


def load_frozen(module: Any, sources: Mapping[str, str], checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Fill a module that was built on the meta device, strictly, and freeze it; to `meta`, it is held against the file alone."""
    fill(module, sources, checkpoint, device=device, dtype=dtype)
    for name, buffer in module.named_buffers():
        assert not buffer.is_meta or torch.device(device).type == "meta", f"buffer {name} of {type(module).__name__} is in no checkpoint"
    return module.requires_grad_(False).eval()


def as_dtype(module: Any, dtype: torch.dtype) -> Any:
    """A module on the meta device with parameters of a dtype, as `load_frozen` would leave it. diffusers' own `to` warns of what it keeps
    in float32 even where that is nothing."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module.requires_grad_(False).eval()


def weight_bytes(module: torch.nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
