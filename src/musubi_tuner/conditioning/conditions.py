"""The conditioning of a batch or of a preview: the one thing that tells a mode from another in the step."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Latents that are shown beside the target, clean, with positions of their own."""

    latents: Tensor
    """(B, 128, F, H, W) video, or (B, 8, T, 16) sound"""
    chosen: Tensor | None = None
    """(B,) bool which items see theirs; None = all."""
    fps: Tensor | None = None
    """(B,) frames per second of the target; for video."""
    lengths: Tensor | None = None
    """(B,) real steps of sound; None = all are real."""
    spatial_factor: int = 1
    """How many times smaller than the target's its pictures are."""
    temporal_factor: int = 1
    """How many of the target's frames stand for one of its frames."""
    strength: float = 1.0
    """As of `StreamConditions`, of all its tokens."""
    attention: Tensor | None = None
    """(B, M) float32 0..1, how strongly each of its tokens and the clip's own attend to each other; None = fully. Of sampling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyframeLatents:
    """Single pictures that are shown beside the clip, clean, each at the time of its frame."""

    latents: Tensor
    """(B, 128, K, H, W) one-frame latents, each of its picture alone"""
    frames: Tensor
    """(B, K) int numbers of pixel frames of the clip"""
    fps: Tensor
    """(B,) frames per second of the clip"""
    real: Tensor | None = None
    """(B, K) bool, False = padding, as the item has fewer; None = all are real."""
    strengths: Tensor | None = None
    """(B, K) as of `StreamConditions`, of each picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConditions:
    """Of one stream."""

    clean: Tensor | None = None
    """(B, N) bool, True = a conditioning token: noise level 0, no loss. None where no rule asks for any."""
    weight: Tensor | None = None
    """(B, N) float32 loss weights of the tokens; None = 1."""
    reference: Reference | None = None
    keyframes: KeyframeLatents | None = None
    """Of video."""
    strength: Tensor | None = None
    """(B, N) float32, how far the clip's own conditioning tokens are kept: 1 = clean, 0 = generated; None = 1. Of sampling."""


NO_STREAM_CONDITIONS = StreamConditions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """Of both streams."""

    video: StreamConditions = NO_STREAM_CONDITIONS
    audio: StreamConditions = NO_STREAM_CONDITIONS


NO_CONDITIONS = Conditions()


def each_tensor(value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    """`value` with `change` made to every tensor in it and in the dataclasses and dicts that it holds."""
    return _changed(value, change)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(one, change) for key, one in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: _changed(getattr(value, field.name), change) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)
