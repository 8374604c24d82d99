"""Trained networks that become part of the frozen weights, tensor by tensor, while these are loaded: base LoRAs of training, and LoRAs that
clips are made with.

A weight is merged in float32, before it is quantized where it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.networks.reading import NetworkFile, StoredAdapter
from musubi_tuner.networks.stack import Strength
from musubi_tuner.networks.types import TYPES
from musubi_tuner.runtime.errors import UserError

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class BaseNetwork:
    """One network to merge, and how strongly: W + multiplier (merged W - W)."""

    file: NetworkFile
    multiplier: float


def merge_weight(weight: Tensor, adapter: StoredAdapter, multiplier: float) -> Tensor:
    """(out, in) float32 with one adapter merged in.

    Raises:
        ValueError: the adapter's tensors do not fit the weight.
    """
    try:
        merged = TYPES[adapter.kind].merged(weight, adapter.tensors)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if merged.shape != weight.shape:
        raise ValueError(f"{tuple(merged.shape)} for a weight of {tuple(weight.shape)}")
    return merged if multiplier == 1 else weight + multiplier * (merged - weight)


def merging_place(networks: Sequence[BaseNetwork], place: Callable[[str, Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    """A `place` for `ltxv2.filling.fill` that merges `networks`, in their order, and then does what `place` does.

    Merged weights reach `place` in float32, the others as they are.
    """

    def merged(name: str, tensor: Tensor) -> Tensor:
        module = name.removesuffix(_WEIGHT)
        if name.endswith(_WEIGHT) and any(module in network.file.adapters for network in networks):
            weight = tensor.float()
            for network in networks:
                adapter = network.file.adapters.get(module)
                if adapter is not None:
                    weight = _merged(f"--base_weights {network.file.path}", module, weight, adapter, network.multiplier)
            tensor = weight
        return place(name, tensor)

    return merged


def summing_place(
    networks: Sequence[tuple[NetworkFile, Strength]], place: Callable[[str, Tensor], Tensor], device: torch.device
) -> Callable[[str, Tensor], Tensor]:
    """As `merging_place`, but with what `NetworkStack` gives beside the model: W + sum of s (W' - W), where each network changes the plain
    weight. Weights that no network changes, as its strength there is 0, stay as they are.

    Args:
        device: where weights are merged.
    """

    def merged(name: str, tensor: Tensor) -> Tensor:
        module = name.removesuffix(_WEIGHT)
        found = [(file, file.adapters[module], strength.of(module)) for file, strength in networks if module in file.adapters]
        plain = total = None
        for file, adapter, factor in found if name.endswith(_WEIGHT) else ():
            if not factor:
                continue
            if plain is None:
                plain = tensor.to(device).float()
            alone = _merged(f"--lora {file.path}", module, plain, adapter, factor)
            total = alone if total is None else total + (alone - plain)
        if total is not None and not bool(torch.isfinite(total).all()):
            raise UserError(
                f"--lora {found[-1][0].path}: merged at this strength, '{module}' is not finite. Lower the strength, or leave it out."
            )
        return place(name, tensor if total is None else total)

    return merged


def _merged(named: str, module: str, weight: Tensor, adapter: StoredAdapter, multiplier: float) -> Tensor:
    try:
        return merge_weight(weight, adapter, multiplier)
    except ValueError as error:
        raise UserError(f"{named}: '{module}' does not fit this model ({error}). It was made for another model.") from error
