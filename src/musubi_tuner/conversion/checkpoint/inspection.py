"""What is in a checkpoint: release, components, how its weights are stored, its config, and whether it is likely a distilled one."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from musubi_tuner.conversion.checkpoint.components import TRANSFORMER, components_of, sizes_of
from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.transformer.config import TransformerConfig, is_known
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.versions import detect_version, looks_distilled, transformer_names
from musubi_tuner.ltxv2.weights import SECTIONS, Checkpoint

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


def config_text(checkpoint: Checkpoint) -> str:
    """Its config, laid out for people."""
    return json.dumps(dict(checkpoint.config), indent=2, ensure_ascii=False)
