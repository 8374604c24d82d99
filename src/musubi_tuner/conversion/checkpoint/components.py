"""The components of a checkpoint, by the names of its tensors: what a file of each of them is called, and which tensors belong into it."""

from collections.abc import Mapping

from musubi_tuner.ltxv2.versions import CONNECTORS, transformer_names, transformer_prefix
from musubi_tuner.ltxv2.weights import Checkpoint

TRANSFORMER, TEXT, OTHER = "transformer", "text_projection", "other"
_BEGINNINGS = {
    "vae": ("vae.", "per_channel_statistics.", "encoder.", "decoder."),
    "audio_vae": ("audio_vae.",),
    "vocoder": ("vocoder.",),
    TEXT: ("text_embedding_projection.",),
    "duration_head": ("duration_head.",),
}
COMPONENTS = (TRANSFORMER, TEXT, "vae", "audio_vae", "vocoder", "duration_head", OTHER)
"""Text connectors lie beside the text projection, as they are part of the text side, whatever their prefix."""


def components_of(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Full names of the tensors of each component that there is, in the file's order."""
    prefix = transformer_prefix(checkpoint.names())
    found: dict[str, list[str]] = {component: [] for component in COMPONENTS}
    for name in checkpoint.names():
        found[_component(name, prefix)].append(name)
    return {component: names for component, names in found.items() if names}


def sizes_of(checkpoint: Checkpoint, components: Mapping[str, list[str]]) -> dict[str, int]:
    """Bytes of each."""
    return {component: sum(checkpoint.entries[name].size for name in names) for component, names in components.items()}


def model_names(checkpoint: Checkpoint) -> dict[str, str]:
    """{official name: full name} of the transformer's tensors and of the text connectors', those of their quantization among them.

    Raises:
        UserError: what `transformer_names` raises.
    """
    names = transformer_names(checkpoint)
    prefix = transformer_prefix(checkpoint.names()) or ""
    return names | {name: full for name, full in checkpoint.with_prefix(prefix).items() if name.startswith(CONNECTORS)}


def _component(name: str, prefix: str | None) -> str:
    if prefix is not None and name.startswith(tuple(prefix + connector for connector in CONNECTORS)):
        return TEXT
    for component, beginnings in _BEGINNINGS.items():
        if name.startswith(beginnings):
            return component
    return TRANSFORMER if prefix is not None and name.startswith(prefix) else OTHER
