"""Velocity loss per item and stream."""

from dataclasses import dataclass

import torch
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


def masked_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """(B,) mean of the squared error over channels and weighted tokens; 0 for an item whose tokens all weigh nothing.

    Args:
        prediction, target: (B, N, C).
        weight: (B, N).
    """
    error = (prediction.float() - target).pow(2).mean(-1)
    total = weight.sum(1)
    return (error * weight).sum(1) / total.clamp(min=1e-8) * (total > 0)


def total_loss(losses: ItemLosses, video_weight: Tensor, audio_weight: Tensor) -> Tensor:
    """Mean over the batch of each item's weighted sum of its streams.

    It is additive over items, so it does not depend on how they are dealt to batches and processes.

    Args:
        video_weight, audio_weight: (B,).
    """
    parts = []
    if losses.video is not None:
        parts.append(losses.video * video_weight)
    if losses.audio is not None:
        parts.append(losses.audio * audio_weight)
    return torch.stack(parts).sum(0).mean()
