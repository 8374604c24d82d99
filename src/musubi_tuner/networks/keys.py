"""Keys of network files: the official module and the tensor that a key stands for, in every naming that programs write.

A key is a prefix, a module and a leaf. Prefixes and modules are the official ones, diffusers' (other names for some modules) or kohya's
(underscores for dots); leaves are PEFT's (with the name of an adapter or without), kohya's, old diffusers', LyCORIS'.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from musubi_tuner.ltxv2.transformer.diffusers_names import official_module
from musubi_tuner.ltxv2.versions import CONNECTORS
from musubi_tuner.networks.formats import DORA_SCALE, PREFIX
from musubi_tuner.networks.lora import DOWN, MAGNITUDE, UP
from musubi_tuner.networks.lycoris import LOHA, W1, W2, W2_DOWN, W2_UP
from musubi_tuner.networks.types import DIFF

ALPHA = "alpha"
PREFIXES = (PREFIX, f"model.{PREFIX}", "transformer.", "base_model.model.")
"""Of keys with dots; several may stand in a row."""
FLATTENED = ("lora_unet_model_", "lora_unet_", "lora_transformer_", "lycoris_")
"""Of keys with underscores, the longest first."""

_HALVES = {"lora_A": DOWN, "lora_down": DOWN, "lora.down": DOWN, "lora_B": UP, "lora_up": UP, "lora.up": UP, MAGNITUDE: MAGNITUDE}
_OTHERS = "(?:weight|bias|weight_scale|scale_weight)"
"""What may stand there and is no name of an adapter."""
_HALF = re.compile(rf"(?P<stem>.+?)\.(?P<half>{'|'.join(map(re.escape, _HALVES))})(?:\.(?!{_OTHERS}$)[^.]+)?(?:\.weight)?")
"""With PEFT's name of an adapter, such as `.default`, or without."""
_LEAVES = {
    DORA_SCALE: MAGNITUDE, DIFF: DIFF, ALPHA: ALPHA,
    **{leaf: leaf for leaf in (*LOHA, W1, f"{W1}_a", f"{W1}_b", W2, W2_UP, W2_DOWN)},
}  # fmt: skip
"""Other endings, and what we call them."""
_TEXT_SIDE = (*CONNECTORS, "connectors.", "text_embedding_projection.", *(name.replace(".", "_") for name in CONNECTORS))
"""Where the text connectors lie, in official files and in diffusers'."""


@dataclass(frozen=True, slots=True)
class Key:
    """What one key stands for."""

    module: str
    """Official name, where the model has such a module; else what is left without the prefix."""
    leaf: str
    """The ending that our own files have, or `ALPHA`."""
    stem: str
    """The key without its leaf, prefix included."""
    form: str
    """Whose naming it is."""


def without_prefixes(stem: str) -> list[str]:
    """A key with dots as it is, and with one prefix less each time."""
    names = [stem]
    while found := next((prefix for prefix in PREFIXES if names[-1].startswith(prefix)), None):
        names.append(names[-1].removeprefix(found))
    return names


def read_key(key: str, flattened: Mapping[str, str]) -> Key | None:
    """
    Args:
        flattened: official names by the same names with underscores.

    Returns:
        None for a leaf that is not known.
    """
    split = _split(key)
    if split is None:
        return None
    stem, leaf, theirs_leaf = split
    for prefix in FLATTENED:
        if stem.startswith(prefix):
            module = stem.removeprefix(prefix)
            return Key(flattened.get(module, module), leaf, stem, f"{prefix}*.{theirs_leaf}")
    module = without_prefixes(stem)[-1]
    prefix = stem.removesuffix(module)
    module = official_module(module)
    return Key(module, leaf, stem, f"{prefix}*.{theirs_leaf}")


def is_text_side(module: str) -> bool:
    """Whether a module belongs to the text connectors, beside the transformer."""
    return module.startswith(_TEXT_SIDE)


def unknown_prefix(module: str, model_names: Collection[str]) -> str | None:
    """What stands before a name that the model has; None where there is no such name in it."""
    for separator, names in ((".", model_names), ("_", {name.replace(".", "_") for name in model_names})):
        start = module.find(separator)
        while start >= 0:
            if module[start + 1 :] in names:
                return module[: start + 1]
            start = module.find(separator, start + 1)
    return None


def _split(key: str) -> tuple[str, str, str] | None:
    """(stem, our leaf, theirs)."""
    if match := _HALF.fullmatch(key):
        return match["stem"], _HALVES[match["half"]], match["half"]
    stem, _, ending = key.rpartition(".")
    return (stem, _LEAVES[ending], ending) if stem and ending in _LEAVES else None
