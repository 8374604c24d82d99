"""Velocity loss per item and stream."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemLosses:
    """Raw losses of one batch, float32; None where the batch has no such stream."""

    video: Tensor | None
    """(B,)"""
    audio: Tensor | None
    """(B,), 0 for items without sound."""
    audio_present: Tensor | None
    """(B,) bool items whose sound was supervised"""
    video_present: Tensor | None = None
    """(B,) bool items of whose video anything was to be generated; None = all."""
    preserved: Tensor | None = None
    """(B,) weighted distance from the base model's prediction, of items that learn from it (`Batch.taught`); None where none does."""
    preserved_present: Tensor | None = None
    """(B,) bool items that are in it"""


ErrorFunction = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target), float32 -> error of each element."""


def error_function(kind: str, delta: float) -> ErrorFunction:
    """`mse`: e^2; `mae`: |e|; `huber`: e^2 / 2 up to `delta`, and delta (|e| - delta / 2) beyond it."""
    if kind == "mse":
        return squared_error
    if kind == "mae":
        return partial(F.l1_loss, reduction="none")
    return partial(F.huber_loss, reduction="none", delta=delta)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).pow(2)


def masked_mean(error: Tensor, weight: Tensor) -> Tensor:
    """(B,) mean of (B, N, C) errors over channels and weighted tokens; 0 for an item whose tokens all weigh nothing.

    Args:
        weight: (B, N).
    """
    total = weight.sum(1)
    return (error.mean(-1) * weight).sum(1) / total.clamp(min=1e-8) * (total > 0)


def total_loss(losses: ItemLosses, video_weight: Tensor, audio_weight: Tensor) -> Tensor:
    """Mean over the batch of each item's weighted sum of its streams.

    It is 0, without a gradient, where the batch has neither. It is additive over items, so it does not depend on how they are dealt to
    batches and processes.

    Args:
        video_weight, audio_weight: (B,).
    """
    parts = []
    if losses.video is not None:
        parts.append(losses.video * video_weight)
    if losses.audio is not None:
        parts.append(losses.audio * audio_weight)
    if losses.preserved is not None:
        parts.append(losses.preserved)
    return torch.stack(parts).sum(0).mean() if parts else video_weight.new_zeros(())
