"""What is in a checkpoint: release, components, how its weights are stored, its config, and whether it is likely a distilled one."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.conversion.checkpoint.components import TRANSFORMER, components_of, sizes_of
from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.transformer.config import TransformerConfig, is_known
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.versions import detect_version, looks_distilled, streams_of, transformer_names
from musubi_tuner.ltxv2.weights import SECTIONS, Checkpoint
from musubi_tuner.runtime.errors import UserError

_PIECE = 2**24
_OF_CONNECTORS = ("connector_", "audio_connector_")
"""Keys that the text side reads."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """What was found."""

    checkpoint: Checkpoint
    version: str
    """Empty where there is no transformer."""
    components: dict[str, tuple[int, int, str]]
    """Tensors, bytes, and dtypes with their counts."""
    stored_as: str
    """Quantized forms of the transformer, in words; empty where nothing is quantized."""
    config: TransformerConfig | None
    unknown: dict[str, list[str]]
    """Keys of the config's `transformer` section that nothing here reads, and sections that are none of ours."""
    kind: str
    """`dev`, `distilled` or what can be said."""

    def as_json(self) -> dict[str, Any]:
        keys = ("tensors", "bytes", "dtypes")
        return {
            "file": str(self.checkpoint.path),
            "version": self.version,
            "components": {name: dict(zip(keys, one, strict=True)) for name, one in self.components.items()},
            "quantization": self.stored_as,
            "unknown": self.unknown,
            "kind": self.kind,
            "config": dict(self.checkpoint.config),
            "metadata": {key: value for key, value in self.checkpoint.metadata.items() if key != "config"},
        }


def inspect(checkpoint: Checkpoint) -> Inspected:
    """
    Raises:
        UserError: a transformer that is none of LTX-2, or a config that is not read.
    """
    components = components_of(checkpoint)
    sizes = sizes_of(checkpoint, components)
    rows = {}
    for component, names in components.items():
        counts = Counter(str(checkpoint.dtype(name)).removeprefix("torch.") for name in names)
        rows[component] = (len(names), sizes[component], ", ".join(f"{dtype} {count:,}" for dtype, count in counts.most_common()))
    has_transformer = TRANSFORMER in components
    section = checkpoint.config.get(TRANSFORMER, {})
    unknown = {"transformer": sorted(key for key in section if not is_known(key) and not key.startswith(_OF_CONNECTORS))}
    unknown["sections"] = sorted(key for key in checkpoint.config if key not in SECTIONS)
    return Inspected(
        checkpoint=checkpoint,
        version=detect_version(checkpoint) if has_transformer else "",
        components=rows,
        stored_as=read_quantization(checkpoint, transformer_names(checkpoint)).receipt if has_transformer else "",
        config=read_config(checkpoint) if has_transformer else None,
        unknown={name: keys for name, keys in unknown.items() if keys},
        kind=kind_of(checkpoint) if has_transformer else "",
    )


def kind_of(checkpoint: Checkpoint) -> str:
    """Whether it is a distilled checkpoint, as far as its name and metadata say; tensors do not tell."""
    if looks_distilled(checkpoint):
        return "distilled, by its name or metadata"
    if "dev" in checkpoint.path.stem.lower().replace("_", "-").split("-"):
        return "dev, by its name"
    return "dev or distilled: neither its name nor its metadata say, and tensors do not tell"


def verify(checkpoint: Checkpoint, advance: Callable[[int], object]) -> list[str]:
    """Everything that is wrong with it, a line each: names and shapes against the release that its config describes, and NaN or infinity.

    Args:
        advance: called with the bytes that were looked at.
    """
    problems: list[str] = []
    components = components_of(checkpoint)
    if TRANSFORMER not in components:
        problems.append("holds no transformer of LTX-2.")
    else:
        try:
            problems += _against_the_release(checkpoint)
        except UserError as error:
            problems.append(str(error))
    for section in SECTIONS[1:]:
        if section in components and not checkpoint.config.get(section):
            problems.append(f"has tensors of the {section}, and no section '{section}' in its config to build it from.")
    with checkpoint.tensors(checkpoint.names()) as tensors:
        for name, tensor in zip(checkpoint.names(), tensors, strict=True):
            if tensor.is_floating_point() and tensor.numel() and not bool(torch.stack(torch.aminmax(tensor.float())).isfinite().all()):
                problems.append(f"'{name}' holds NaN or infinity.")
            advance(checkpoint.entries[name].size)
    return problems


def _against_the_release(checkpoint: Checkpoint) -> list[str]:
    names = read_quantization(checkpoint, transformer_names(checkpoint)).weights
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in LTXModel(read_config(checkpoint), streams_of(names)).state_dict().items()}
    problems = [f"lacks '{name}'." for name in expected if name not in names]
    problems += [f"has '{full}', which the model lacks." for name, full in names.items() if name not in expected]
    for name, full in names.items():
        if name in expected and checkpoint.shape(full) != expected[name]:
            problems.append(f"'{full}' has the shape {checkpoint.shape(full)}; its config says {expected[name]}.")
    return problems


def file_hashes(checkpoint: Checkpoint, advance: Callable[[int], object]) -> dict[Path, str]:
    """SHA-256 of each of its files, as download pages show it.

    Args:
        advance: called with the bytes that were read.
    """
    found = {}
    for path in sorted({entry.file for entry in checkpoint.entries.values()}):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                advance(len(piece))
        found[path] = digest.hexdigest()
    return found


def config_text(checkpoint: Checkpoint) -> str:
    """Its config, laid out for people."""
    return json.dumps(dict(checkpoint.config), indent=2, ensure_ascii=False)
