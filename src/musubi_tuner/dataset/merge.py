"""An item's cache files -> one dict under the keys that training knows; such dicts -> stacked tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.cache.names import training_key
from musubi_tuner.cache.store import read
from musubi_tuner.dataset.items import Item
from musubi_tuner.runtime.errors import UserError


def merge_sources(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Read the files in order (latents, sound, text) and give their tensors the keys of training.

    Raises:
        UserError: two keys that strip to the same name.
    """
    merged: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for path in paths:
        for key, tensor in read(path).items():
            name = training_key(key)
            if name in merged:
                raise UserError(
                    f"{path}: the key '{key}' and '{origin[name]}' are both '{name}'. "
                    "One of the files is from another tool or was edited; delete both and run the caching programs again."
                )
            merged[name] = tensor
            origin[name] = f"{path.name}: {key}"
    return merged


def stack_equal(items: Sequence[Item], merged: Sequence[Mapping[str, Tensor]], key: str) -> Tensor:
    """(B, ...) tensors of one key.

    Raises:
        UserError: they differ in shape.
    """
    shapes = {tuple(tensors[key].shape) for tensors in merged}
    if len(shapes) > 1:
        listed = ", ".join(f"{item.key} {tuple(tensors[key].shape)}" for item, tensors in zip(items, merged, strict=True))
        raise UserError(
            f"'{key}' of one batch differ in shape: {listed}. The caches were made with different settings; run the caching programs again."
        )
    return torch.stack([tensors[key] for tensors in merged])
