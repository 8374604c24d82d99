"""What the frozen components share: finding their tensors in any kind of file, and their identity."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from musubi_tuner.ltxv2.weights import Checkpoint, fill
from musubi_tuner.runtime.errors import UserError

MEAN, STD = "per_channel_statistics.mean-of-means", "per_channel_statistics.std-of-means"
"""Statistics that latents are normalized by; other statistics in the files are not used."""


def component_names(checkpoint: Checkpoint, prefix: str, marks: tuple[str, ...], *, what: str, flag: str) -> dict[str, str]:
    """{bare name: full name} of a component stored under `prefix`, or bare in a file of its own.

    Args:
        marks: bare names of which one must be there.

    Raises:
        UserError: the checkpoint lacks the component; names the flag that should point elsewhere.
    """
    for found in (checkpoint.with_prefix(prefix), checkpoint.with_prefix("")):
        if any(name.startswith(marks) for name in found):
            return found
    raise UserError(f"{checkpoint.path}: holds no {what} ('{prefix}...'). Give {flag} a full checkpoint, or the file of the {what}.")


def section(checkpoint: Checkpoint, name: str, *, what: str) -> Mapping[str, Any]:
    """A section of the checkpoint's config.

    Raises:
        UserError: the file has no such section, so its shape is not known.
    """
    found = checkpoint.config.get(name)
    if found is None and name in ("vae", "audio_vae") and "_class_name" in checkpoint.config:
        return checkpoint.config
    if found is None:
        raise UserError(
            f"{checkpoint.path}: its 'config' metadata has no '{name}' section, so the {what} cannot be built. Use an "
            "unmodified release file."
        )
    return found


def load_frozen(
    module: nn.Module, sources: Mapping[str, str], checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """Fill a module that was built on the meta device, strictly, and freeze it."""
    fill(module, sources, checkpoint, device=device, dtype=dtype)
    for name, buffer in module.named_buffers():
        assert not buffer.is_meta, f"buffer {name} of {type(module).__name__} is in no checkpoint"
    return module.requires_grad_(False).eval()


def component_fingerprint(checkpoint: Checkpoint, names: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Identity of weights and config, whatever file they lie in."""
    from hashlib import sha256

    text = checkpoint.fingerprint(names) + json.dumps(config, sort_keys=True)
    return sha256(text.encode()).hexdigest()[:32]
