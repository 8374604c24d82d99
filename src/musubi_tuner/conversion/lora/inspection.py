"""What is in a LoRA: its form and ranks, how much it changes and where, what of it does nothing, and how it was made."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.conversion.checkpoint.components import model_names
from musubi_tuner.conversion.lora.changes import change_of
from musubi_tuner.conversion.lora.contents import LoraContents
from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.networks.keys import is_text_side
from musubi_tuner.networks.lora import DOWN, UP
from musubi_tuner.networks.reading import StoredAdapter
from musubi_tuner.networks.shapes import adapted_shape
from musubi_tuner.networks.targets import stream_of
from musubi_tuner.networks.types import TYPES
from musubi_tuner.runtime.errors import UserError

_BLOCK = re.compile(r".*_blocks\.(\d+)\.")
_RECIPE = (
    "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    "ss_learning_rate", "ss_optimizer", "ss_lr_scheduler", "ss_seed", "ss_steps", "ss_epoch", "ltxv2_made_from",
)  # fmt: skip
"""Entries of the metadata that say how a file was made."""


@dataclass(frozen=True, slots=True)
class Found:
    """One module."""

    module: str
    stream: str
    """`video`, `audio`, `cross` or `text`"""
    block: int | None
    kind: str
    rank: int
    scale: float
    norm: float | None
    """Frobenius norm of the change; None of a DoRA without its base."""
    base_norm: float | None
    """Of the weight that is changed."""

    @property
    def relative(self) -> float | None:
        return self.norm / self.base_norm if self.norm is not None and self.base_norm else None

    @property
    def is_dead(self) -> bool:
        """Whether it changes nothing."""
        return self.norm == 0


@dataclass(frozen=True, slots=True)
class Inspected:
    """A whole file."""

    contents: LoraContents
    modules: tuple[Found, ...]

    def by_stream(self) -> dict[str, tuple[int, float, float | None]]:
        """Modules, norm of all changes together, and that as a share of the norm of their weights."""
        groups: dict[str, list[Found]] = defaultdict(list)
        for one in self.modules:
            groups[one.stream].append(one)
        return {stream: _together(groups[stream]) for stream in ("video", "audio", "cross", "text") if stream in groups}

    def by_block(self) -> dict[int, tuple[int, float, float | None]]:
        """As `by_stream`."""
        groups: dict[int, list[Found]] = defaultdict(list)
        for one in self.modules:
            if one.block is not None and one.stream != "text":
                groups[one.block].append(one)
        return {block: _together(groups[block]) for block in sorted(groups)}

    @property
    def recipe(self) -> dict[str, str]:
        """As `metadata_table`."""
        metadata = self.contents.metadata
        keys = (*_RECIPE, *(key for key in sorted(metadata) if key.startswith("modelspec.")))
        return {key: _shortened(metadata[key]) for key in keys if key in metadata}

    def as_json(self) -> dict[str, Any]:
        contents = self.contents
        return {
            "file": str(contents.path),
            "form": contents.form,
            "scale_from": contents.scale_from,
            "dtype": str(contents.dtype).removeprefix("torch."),
            "types": dict(Counter(one.kind for one in self.modules)),
            "ranks": contents.ranks,
            "streams": {stream: dict(zip(("modules", "norm", "relative"), one, strict=True)) for stream, one in self.by_stream().items()},
            "dead": [one.module for one in self.modules if one.is_dead],
            "modules": [asdict(one) for one in self.modules],
            "metadata": dict(contents.metadata),
        }


def inspect(contents: LoraContents, base: Checkpoint | None) -> Inspected:
    """
    Args:
        base: the checkpoint that its changes are measured against; its weights are read one by one.

    Raises:
        UserError: a module that the base lacks, or has in another size.
    """
    weights = {} if base is None else model_names(base)
    quantization = None if base is None else read_quantization(base, weights)
    found = []
    for name, adapter in contents.adapters.items():
        weight = None
        if base is not None and quantization is not None:
            full = quantization.weights.get(f"{name}.weight")
            if full is None:
                raise UserError(f"{base.path}: has no '{name}', which {contents.path} adapts. Give the checkpoint that it was trained on.")
            weight = quantization.restored(f"{name}.weight", base.tensor(full), torch.device("cpu"), torch.float32).float()
        match = _BLOCK.match(name)
        found.append(
            Found(
                module=name,
                stream="text" if is_text_side(name) else stream_of(name),
                block=None if match is None else int(match[1]),
                kind=adapter.kind,
                rank=adapter.rank,
                scale=adapter.scale,
                norm=_norm(contents, name, adapter, weight),
                base_norm=None if weight is None else float(weight.norm()),
            )
        )
    return Inspected(contents, tuple(found))


def _norm(contents: LoraContents, name: str, adapter: StoredAdapter, weight: Tensor | None) -> float | None:
    """
    Args:
        weight: (out, in) of the base, where it is known.
    """
    own = adapted_shape("lora" if adapter.kind == "dora" else adapter.kind, adapter.stored)
    if weight is not None and own != tuple(weight.shape):
        raise UserError(
            f"{contents.path}: '{name}' is for a weight of {own}, the base's is {tuple(weight.shape)}. It was made for another model."
        )
    if adapter.kind == "lora":  # |B A|^2 is the sum over (B^T B) * (A A^T)
        tensors = adapter.tensors
        up, down = tensors[UP].double(), tensors[DOWN].double()
        return max(0.0, float(((up.mT @ up) * (down @ down.mT)).sum())) ** 0.5
    if adapter.kind != "dora":
        return float(change_of(adapter).norm())
    return None if weight is None else float((TYPES["dora"].merged(weight, adapter.tensors) - weight).norm())


def _together(some: list[Found]) -> tuple[int, float, float | None]:
    norm = sum((one.norm or 0.0) ** 2 for one in some) ** 0.5
    bases = [one.base_norm for one in some]
    whole = sum(base**2 for base in bases if base is not None) ** 0.5
    return len(some), norm, norm / whole if whole and None not in bases else None


def sentences(inspected: Inspected) -> list[str]:
    """What most people want to know, in words."""
    lines = []
    streams = inspected.by_stream()
    total = sum(norm**2 for _, norm, _ in streams.values()) ** 0.5
    unknown = sum(one.norm is None for one in inspected.modules)
    if unknown:
        lines.append(f"how much {unknown} DoRA(s) change is known beside the base alone: give --base.")
    for stream, what in (("audio", "the sound's"), ("video", "the pictures'")):
        if stream not in streams:
            lines.append(f"this file does not touch {what} own layers.")
        elif (relative := streams[stream][2]) is not None:
            lines.append(f"this file changes {what} own weights by {relative:.2%} of their norm.")
        elif total and not unknown:
            lines.append(f"{streams[stream][1] ** 2 / total**2:.0%} of its change (squared norm) is in {what} own layers.")
    dead = [one.module for one in inspected.modules if one.is_dead]
    if dead:
        lines.append(f"{len(dead)} of {len(inspected.modules)} modules change nothing, first '{dead[0]}'.")
    return lines


def metadata_table(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """Entries by name; long ones, such as pictures, by their length."""
    return [(key, _shortened(value)) for key, value in sorted(metadata.items())]


def _shortened(value: str) -> str:
    return value if len(value) <= 200 else f"({len(value):,} characters) {value[:60]}..."
