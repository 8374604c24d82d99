"""The network's file: the one form that ComfyUI, diffusers and the official pipelines load, checked before it is written.

Official loaders compute W + B A and never read an alpha, so every scale is folded into the tensors.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.networks.base import Tensors
from musubi_tuner.networks.lora import MAGNITUDE
from musubi_tuner.runtime.errors import UserError

PREFIX = "diffusion_model."
DORA_SCALE = "dora_scale"
CONNECTORS_ENDING = ".connectors.safetensors"
BAKED_KEY = "ltxv2_baked_loras"
"""Of a checkpoint's metadata: the names of the files that were baked into it."""

Contents = dict[str, Tensors]
"""{official module name: its tensors}."""


def connectors_path(path: Path) -> Path:
    """The file beside the LoRA `path` that holds its adapters of the text connectors."""
    return path.with_name(f"{path.stem}{CONNECTORS_ENDING}")


def file_keys(modules: Mapping[str, Collection[str]], *, dora_key: str = MAGNITUDE) -> list[str]:
    """Keys of a file that holds these tensors (endings) of these modules."""
    return [f"{PREFIX}{name}.{dora_key if leaf == MAGNITUDE else leaf}" for name, leaves in modules.items() for leaf in leaves]


def to_file(contents: Mapping[str, Tensors], dtype: torch.dtype, *, dora_key: str = MAGNITUDE) -> dict[str, Tensor]:
    """The tensors of a file in the official naming.

    Args:
        dora_key: `lora_magnitude_vector` (out,), or `dora_scale` (out, 1). Either stays float32: one step of bfloat16 in a row's
            length is more than what training moves it by.
    """
    tensors = {}
    for name, own in contents.items():
        for leaf, value in own.items():
            if leaf == MAGNITUDE:
                value = value.float() if dora_key == MAGNITUDE else value.float()[:, None]
                leaf = dora_key
            else:
                value = value.to(dtype)
            tensors[f"{PREFIX}{name}.{leaf}"] = value.detach().to("cpu").contiguous()
    return tensors


def check_file(tensors: Mapping[str, Tensor], expected: Collection[str], zero_at_start: Collection[str]) -> None:
    """What is about to be written must be whole, finite and not all zero.

    Args:
        expected: all keys of the network.
        zero_at_start: endings of those tensors that are zero as long as nothing is learned.

    Raises:
        UserError: lists the tensors that are at fault.
    """
    odd = sorted(set(expected) ^ set(tensors))
    if odd:
        raise UserError(f"the network is not whole: {len(odd)} tensor(s) missing or foreign, first '{odd[0]}'. Nothing was written.")
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(
            f"the network holds NaN or infinity in {len(bad)} tensor(s), first '{bad[0]}'. Nothing was written; "
            "the last file that was saved is good. Lower --learning_rate and resume from there."
        )
    endings = tuple(f".{ending}" for ending in zero_at_start)
    if all(not bool(tensor.any()) for name, tensor in tensors.items() if name.endswith(endings)):
        raise UserError(
            "the network is all zero: nothing has been learned, and a file of zeros would look like a result. Check "
            "--learning_rate and the data."
        )
