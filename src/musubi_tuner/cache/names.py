"""Names of cache files, and of the tensors in them. File names are for people; identity is in the metadata."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch

PROMPT_FOLDER = "ltxv2_prompts"
LOOKS_FOLDER = "ltxv2_looks"
LATENTS_ENDING = "_ltxv2.safetensors"
TEXT_ENDING = "_ltxv2_te.safetensors"
AUDIO_ENDING = "_ltxv2_audio.safetensors"
INDEX_ENDING = ".json"
TEXT_MASK_KEY = "text_mask"
_LONGEST_NAME = 255
"""Bytes of a file's name, in all usual file systems."""

_DTYPE = re.compile(r"_(bfloat16|float16|float32|float64|float8_e4m3fn|float8_e5m2|u?int8|int16|int32|int64|bool)$")
_SHAPE = re.compile(r"_\d+x\d+x\d+$")
_LEGACY = {"t5": "text", "t5_mask": TEXT_MASK_KEY}
"""Keys of older text caches: what they are called now."""


def too_long(names: Iterable[str]) -> str | None:
    """That a source's name is too long for the longest of its cache files' names, and by how much; None where it is not."""
    beyond = max((len(os.fsencode(name)) for name in names), default=0) - _LONGEST_NAME
    return f"its name is too long for the names of cache files; make it {beyond} bytes shorter" if beyond > 0 else None


def video_latent_name(stem: str, start: int, frames: int, width: int, height: int) -> str:
    return f"{stem}_{start:05d}-{frames:03d}_{width:04d}x{height:04d}{LATENTS_ENDING}"


def image_latent_name(stem: str, width: int, height: int) -> str:
    return f"{stem}_{width:04d}x{height:04d}{LATENTS_ENDING}"


def mirrored_name(latent_name: str) -> str:
    """Latents of the mirror image of a video or still."""
    return latent_name.removesuffix(LATENTS_ENDING) + "_mirrored" + LATENTS_ENDING


def audio_only_name(stem: str, start_ms: int, length_ms: int) -> str:
    return f"{stem}_{start_ms:08d}-{length_ms:06d}{AUDIO_ENDING}"


def text_name(stem: str) -> str:
    return f"{stem}{TEXT_ENDING}"


def prompt_path(cache_directory: Path, prompt: str) -> Path:
    """Where the context of a sample prompt lies."""
    digest = hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:16]
    return cache_directory / PROMPT_FOLDER / text_name(digest)


def index_name(digest: str) -> str:
    return f"ltxv2_index_{digest}{INDEX_ENDING}"


def receipts_name(index: str) -> str:
    """Of what became of the sources of a dataset, by the name of its index."""
    return index.replace("ltxv2_index_", "ltxv2_sources_", 1)


def is_cache_name(name: str) -> bool:
    """Whether a file or folder of such a name is ours."""
    is_index = name.startswith(("ltxv2_index_", "ltxv2_sources_")) and name.endswith(INDEX_ENDING)
    return name in (PROMPT_FOLDER, LOOKS_FOLDER) or is_index or name.endswith(".safetensors") and "_ltxv2" in name


def ending_of(name: str) -> str:
    """What tells the kind of a file, such as `_ltxv2_audio.safetensors`."""
    _, mark, rest = name.rpartition("_ltxv2")
    return mark + rest if mark else Path(name).suffix


def latents_key(frames: int, height: int, width: int, dtype: torch.dtype) -> str:
    """Sizes in latent cells."""
    return f"latents_{frames}x{height}x{width}_{_name(dtype)}"


def audio_latents_key(steps: int, dtype: torch.dtype) -> str:
    return f"audio_latents_{steps}x1x1_{_name(dtype)}"


def text_key(dtype: torch.dtype) -> str:
    return f"text_{_name(dtype)}"


def strip_key(key: str) -> str:
    """The name that training sees: a key that ends in `_mask` stays; otherwise the dtype goes, then the shape."""
    if key.endswith("_mask"):
        return key
    return _SHAPE.sub("", _DTYPE.sub("", key))


def training_key(key: str) -> str:
    """As `strip_key`, with older names of text as they are now."""
    name = strip_key(key)
    return _LEGACY.get(name, name)


def is_legacy_key(key: str) -> bool:
    return strip_key(key) in _LEGACY


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
