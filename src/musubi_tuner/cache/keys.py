"""Tensor keys of cache files: written with shape and dtype, stripped of both for training."""

import re

import torch

AUDIO_LENGTHS_KEY = "audio_lengths_int32"
REFERENCE_AUDIO_LENGTHS_KEY = "ref_audio_lengths_int32"
VIDEO_MASK_KEY = "video_mask"
TEXT_MASK_KEY = "text_mask"

_DTYPE = re.compile(r"_(bfloat16|float16|float32|float64|float8_e4m3fn|float8_e5m2|u?int8|int16|int32|int64|bool)$")
_SHAPE = re.compile(r"_\d+x\d+x\d+$")


def latents_key(frames: int, height: int, width: int, dtype: torch.dtype) -> str:
    """Sizes in latent cells."""
    return f"latents_{frames}x{height}x{width}_{_name(dtype)}"


def reference_latents_key(frames: int, height: int, width: int, dtype: torch.dtype) -> str:
    return f"ref_{latents_key(frames, height, width, dtype)}"


def audio_latents_key(steps: int, dtype: torch.dtype) -> str:
    return f"audio_latents_{steps}x1x1_{_name(dtype)}"


def reference_audio_latents_key(steps: int, dtype: torch.dtype) -> str:
    return f"ref_{audio_latents_key(steps, dtype)}"


def text_key(dtype: torch.dtype) -> str:
    return f"text_{_name(dtype)}"


def strip_key(key: str) -> str:
    """The name that training sees: a key that ends in `_mask` stays; otherwise the dtype goes, then the shape."""
    if key.endswith("_mask"):
        return key
    return _SHAPE.sub("", _DTYPE.sub("", key))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
