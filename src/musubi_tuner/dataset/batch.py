"""What a training step reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from musubi_tuner.conditioning.conditions import NO_CONDITIONS, Conditions, each_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Preserved:
    """Items that learn what the base model, the teacher, predicts for the same input, in place of their own content. All (B,)."""

    video: Tensor
    """float32 weights of that loss; 0 = learns its own content."""
    audio: Tensor
    imagined: Tensor | None = None
    """bool items without sound, for which the base model first makes some; None = none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B items of equal shape. Every tensor is on one device; noise and noise levels were drawn for each item by name."""

    names: tuple[str, ...]
    """Keys of the items, for messages."""
    latents: Tensor | None
    """(B, 128, F, H, W) in the stored dtype; None in audio mode."""
    fps: Tensor
    """(B,) float32 frames per second of each clip."""
    text: Tensor
    """(B, S, W) contexts, or features before the connectors."""
    text_mask: Tensor | None
    """(B, S) bool; None where all tokens are real."""
    audio_latents: Tensor | None
    """(B, 8, T, 16), zero beyond `audio_lengths`; None in video mode, and where no item has sound."""
    audio_lengths: Tensor | None
    """(B,) int64 real steps; 0 = no sound."""
    audio_padded: bool
    """Whether any item has fewer real steps than T (known here without asking the device)."""
    video_noise: Tensor | None
    """(B, F*H*W, 128) float32"""
    audio_noise: Tensor | None
    """(B, T, 128) float32"""
    video_sigma: Tensor
    """(B,) float32"""
    audio_sigma: Tensor
    """(B,) float32"""
    video_weight: Tensor
    """(B,) float32 loss weights"""
    audio_weight: Tensor
    dropout_seeds: tuple[int, ...]
    """Of each item: what the network drops for it."""
    audio_expected: int = 0
    """Items whose sound should be trained."""
    audio_supervised: int = 0
    """Those of them that have sound."""
    conditions: Conditions = NO_CONDITIONS
    """What of the items is conditioning."""
    preserved: Preserved | None = None
    """None: every item learns its own content."""
    further: Mapping[str, Tensor] = field(default_factory=dict)
    """(B, ...) tensors of kinds of sidecars that no other field holds, by their keys."""

    @property
    def size(self) -> int:
        return len(self.names)

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`, copied without waiting."""
        return each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return each_tensor(self, Tensor.pin_memory)
