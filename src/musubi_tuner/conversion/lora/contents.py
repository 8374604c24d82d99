"""A LoRA's file by itself, without the model that it is for: read in every form that users have, and what is kept of it when it is written.

Module names are looked up among those of the releases (2.0, 2.3 and 2.5), text connectors included.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.versions import CONNECTORS
from musubi_tuner.networks.base import Tensors
from musubi_tuner.networks.lora import DOWN, UP
from musubi_tuner.networks.reading import StoredAdapter, newest_file, read_network, scaled_leaf
from musubi_tuner.networks.targets import linear_names
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.headers import read_header

_CONNECTOR_BLOCKS = 16
"""More than any release has."""
_CONNECTOR_LINEARS = (*(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")), "ff.net.0.proj", "ff.net.2")
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclasses.dataclass(frozen=True, slots=True)
class LoraContents:
    """What a file holds."""

    path: Path
    adapters: Mapping[str, StoredAdapter]
    """By official module name."""
    metadata: Mapping[str, str]
    form: str
    """Whose naming its keys follow."""
    scale_from: str
    """Where the scale was found, in words."""
    dtype: torch.dtype
    """Of most of its values."""

    def with_adapters(self, adapters: Mapping[str, StoredAdapter]) -> "LoraContents":
        return dataclasses.replace(self, adapters=adapters)

    @property
    def kinds(self) -> list[str]:
        return sorted({adapter.kind for adapter in self.adapters.values()})

    @property
    def ranks(self) -> list[int]:
        """Those that occur, of adapters that have one."""
        return sorted({adapter.rank for adapter in self.adapters.values() if adapter.rank})


def read_lora(path: Path) -> LoraContents:
    """Read a file, or the newest one of a folder, such as PEFT's.

    Raises:
        UserError: what `read_network` raises.
    """
    path = newest_file(path)
    linears = dict.fromkeys(_linears())
    file = read_network(path, linears)
    adapters = dict(file.adapters)
    if file.left_out:
        adapters |= read_network(path, linears, of_connectors=True).adapters
    stored = [_STORED.get(tensor.dtype, torch.float32) for tensor in read_header(path).tensors.values()]
    return LoraContents(path, adapters, file.metadata, file.form, file.scale_from, max(set(stored), key=stored.count))


def unscaled(adapter: StoredAdapter) -> Tensors:
    """Its tensors without its scale, float32."""
    return {leaf: value.float() for leaf, value in adapter.stored.items()}


def scaled(adapter: StoredAdapter, factor: float) -> StoredAdapter:
    """An adapter that changes the weight `factor` times as much.

    Raises:
        ValueError: of a DoRA, which no factor scales; or a factor that leaves nothing of it.
    """
    if adapter.kind == "dora":
        raise ValueError("a DoRA is not linear in its strength: give the strength where it is used")
    tensors, leaf = adapter.tensors, scaled_leaf(adapter.kind, adapter.stored)
    made = tensors[leaf] * factor
    if bool(tensors[leaf].any()) and not bool(made.any()):
        raise ValueError(f"at strength {factor:g} its values are too small for float32, and nothing would be left of it")
    return dataclasses.replace(adapter, stored={**tensors, leaf: made}, scale=1.0)


def lora_of(down: Tensor, up: Tensor) -> StoredAdapter:
    """(rank, in) and (out, rank), float32, as an adapter."""
    return StoredAdapter("lora", {DOWN: down.contiguous(), UP: up.contiguous()}, rank=down.shape[0])


def require_kinds(contents: LoraContents, allowed: tuple[str, ...], what: str, remedy: str) -> None:
    """
    Raises:
        UserError: an adapter of another type.
    """
    for name, adapter in contents.adapters.items():
        if adapter.kind not in allowed:
            raise UserError(f"{contents.path}: '{name}' is a {adapter.kind}; {what}. {remedy}")


@cache
def _linears() -> frozenset[str]:
    """Official names of all linears of the releases."""
    names: set[str] = set()
    for of_release in (
        TransformerConfig(),
        TransformerConfig(apply_gated_attention=True, cross_attention_adaln=True, caption_proj_before_connector=True),
    ):
        with torch.device("meta"):
            names |= set(linear_names(LTXModel(of_release)))
    for connector in CONNECTORS:
        names |= {
            f"{connector}transformer_1d_blocks.{block}.{linear}" for block in range(_CONNECTOR_BLOCKS) for linear in _CONNECTOR_LINEARS
        }
    return frozenset(names)
