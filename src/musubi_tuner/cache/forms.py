"""What the tensors of a cache file must be: shape and dtype, which headers tell, and the range of their values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.cache.names import TEXT_MASK_KEY

FLOATS = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"})
INTEGERS = frozenset({"U8", "I8", "I16", "I32", "I64"})
MASKS = FLOATS | INTEGERS | {"BOOL"}
"""dtypes by their names in a safetensors header."""

_LATENT_CHANNELS, _AUDIO_CHANNELS, _MEL_BINS = 128, 8, 16
_FRAMES_A_CELL, _PIXELS_A_CELL, _STEPS_A_SECOND = 8, 32, 25
"""As in `ltxv2.geometry`; files are described in docs/reference/cache_files.md."""
_LARGEST_LATENT = 1e3
"""Latents are normalized: values beyond some tens do not occur."""
_TEXT_TOKENS = 1024
"""Of a context, and at most of everything else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorForm:
    """Of one tensor."""

    shape: tuple[int | range, ...] | None = None
    """A range where a side has no one length; None: any shape."""
    dtypes: frozenset[str] = FLOATS
    limits: tuple[float, float] | None = None
    """Least and greatest value; None: any finite ones."""
    counts: str | None = None
    """Key of another tensor of the file, of whose second axis it counts the real part."""


Forms = Callable[[Mapping[str, str]], Mapping[str, TensorForm]]
"""A file's metadata -> the form of each of its tensors, by stripped key; tensors of other keys may be of any."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str


def latent_form(frames: int, height: int, width: int) -> TensorForm:
    """(128, F, H, W) of pictures of a size in pixels."""
    limits = (-_LARGEST_LATENT, _LARGEST_LATENT)
    return TensorForm(shape=(_LATENT_CHANNELS, *_cells(frames, height, width)), dtypes=FLOATS, limits=limits)


def mask_form(frames: int, height: int, width: int) -> TensorForm:
    """(F, H, W) shares of white in latent cells."""
    return TensorForm(shape=_cells(frames, height, width), dtypes=FLOATS, limits=(0, 1))


def audio_forms(prefix: str, seconds: float) -> dict[str, TensorForm]:
    """(8, T, 16) and the number of real steps. Sound may end before its clip, and is no longer than a second more, as other tools cut it.

    Args:
        prefix: of the keys.
        seconds: of its clip.
    """
    steps = range(int((seconds + 1) * _STEPS_A_SECOND) + 2)
    latents, limits = f"{prefix}audio_latents", (-_LARGEST_LATENT, _LARGEST_LATENT)
    return {
        latents: TensorForm(shape=(_AUDIO_CHANNELS, steps, _MEL_BINS), dtypes=FLOATS, limits=limits),
        f"{prefix}audio_lengths": TensorForm(dtypes=INTEGERS, counts=latents),
    }


def text_forms(metadata: Mapping[str, str]) -> Mapping[str, TensorForm]:
    """What a text must be by what its metadata say of it: (1024, W) contexts, or fewer rows of features and of T5."""
    rows: int | range = range(1, _TEXT_TOKENS + 1)
    if metadata.get("stage") == "context" and metadata.get("backend") == "gemma":
        rows = _TEXT_TOKENS
    widths = metadata.get("widths", "").split("+")
    width = sum(map(int, widths)) if all(one.isdecimal() for one in widths) else range(1, 2**31)
    return {"text": TensorForm(shape=(rows, width)), TEXT_MASK_KEY: TensorForm(shape=(rows,), dtypes=MASKS)}


def header_fault(headers: Mapping[str, TensorHeader], forms: Mapping[str, TensorForm]) -> str | None:
    """What is wrong with shapes and dtypes, in words; None where nothing is.

    Args:
        headers: by stripped key.
    """
    for key, form in forms.items():
        found = headers.get(key)
        if found is None:
            continue
        if form.counts is not None and math.prod(found.shape) != 1:
            return f"its '{key}' has the shape {_tuple(found.shape)}, and must be one number"
        if form.shape is not None and not _fits(found.shape, form.shape):
            return f"its '{key}' has the shape {_tuple(found.shape)}, and must have {_tuple(form.shape)}"
        if found.dtype not in form.dtypes:
            return f"its '{key}' is of the dtype {found.dtype}, and must be one of {', '.join(sorted(form.dtypes))}"
    return None


def value_fault(tensors: Mapping[str, Tensor], forms: Mapping[str, TensorForm]) -> str | None:
    """What is wrong with values: NaN, infinity, or beyond a form's limits; None where nothing is.

    Args:
        tensors: by stripped key.
    """
    for key, tensor in tensors.items():
        form = forms.get(key, TensorForm())
        if not tensor.numel() or tensor.dtype == torch.bool:
            continue
        least, greatest = (float(value) for value in (tensor.float() if tensor.element_size() == 1 else tensor).aminmax())
        low, high = form.limits or (-math.inf, math.inf)
        if form.counts is not None and form.counts in tensors:
            low, high = 0, tensors[form.counts].shape[1]
        if not (math.isfinite(least) and math.isfinite(greatest)):
            return f"its '{key}' holds NaN or infinity"
        if least < low or greatest > high:
            return f"its '{key}' holds values from {least:.6g} to {greatest:.6g}, and must stay within {low:g} and {high:g}"
    return None


def _cells(frames: int, height: int, width: int) -> tuple[int, int, int]:
    return (frames - 1) // _FRAMES_A_CELL + 1, height // _PIXELS_A_CELL, width // _PIXELS_A_CELL


def _fits(shape: Sequence[int], wanted: Sequence[int | range]) -> bool:
    return len(shape) == len(wanted) and all(
        side in allowed if isinstance(allowed, range) else side == allowed for side, allowed in zip(shape, wanted, strict=True)
    )


def _tuple(shape: Sequence[int | range]) -> str:
    sides = [f"{side.start} to {side.stop - 1}" if isinstance(side, range) else str(side) for side in shape]
    return f"({', '.join(sides)}{',' if len(sides) == 1 else ''})"
