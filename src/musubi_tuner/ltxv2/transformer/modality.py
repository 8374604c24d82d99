"""What goes into the transformer and what comes out, for one stream."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ReferenceAttention:
    """How strongly a clip and a reference behind it attend to each other, both ways. Keyframes between them and the reference do not attend
    to each other at all, as in ltx-core 1.0.0; everything else does fully."""

    strength: Tensor
    """(B, M) float32 0..1 of the reference's tokens, which are the last M"""
    own: int
    """Tokens of the clip itself, which are the first."""
    beside: int
    """Tokens of keyframes, between the two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Modality:
    """One stream's input. B batch, N tokens, C channels of a token, U distinct noise levels, S text tokens."""

    latent: Tensor
    """(B, N, C) token values as the model is to see them (noised, or clean where the level is 0)."""
    sigma: Tensor
    """(B,) float32 noise level of the stream, 0 to 1; drives prompt AdaLN and the other stream's gates."""
    levels: Tensor
    """(B, U) float32 distinct noise levels of the tokens, 0 to 1."""
    level_index: Tensor | None
    """(B, N) int64 index into `levels`; None where U is 1."""
    positions: Tensor
    """(B, P, N, 2) float32 [start, end): P = 3 (seconds, pixel row, pixel column) for video, 1 (seconds) for audio."""
    context: Tensor | None = None
    """(B, S, W) text context; None until the adapter gives it."""
    context_mask: Tensor | None = None
    """(B, S) bool, True = real; None where all are."""
    token_mask: Tensor | None = None
    """(B, N) bool, False = padding that nobody may attend to; None where all are real. Each row has one True at least."""
    present: Tensor | None = None
    """(B,) bool, False = this sample has no such stream, so that it may not reach the other one; None where all have it."""
    attention_mask: Tensor | None = None
    """(B, N, N) self-attention strength 0..1 (float) or permission (bool); None = all."""
    reference_attention: ReferenceAttention | None = None
    """The same in short, of a reference alone; not both of them."""
    keyframe_marker: Tensor | None = None
    """(B, N) bool: tokens that carry the keyframe embedding of 2.5."""
    enabled: bool = True
    """False = tokens stay as they are, are attended to by the other stream, and get no prediction."""

    @property
    def timesteps(self) -> Tensor:
        """(B, N) noise level of every token, as the official interface has it."""
        if self.level_index is None:
            return self.levels.expand(-1, self.latent.shape[1])
        return self.levels.gather(1, self.level_index)


def levels_of(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct levels (B, U) and indices (B, N) of per-token `timesteps` (B, N). Synchronizes: not for the training step."""
    values, index = torch.unique(timesteps, return_inverse=True)
    return values.expand(timesteps.shape[0], -1), index


class Velocity(NamedTuple):
    """Predicted velocity (noise - clean) of each stream, (B, N, C); None where the stream is absent or disabled."""

    video: Tensor | None
    audio: Tensor | None


Skip = bool | Tensor
"""True / False for the whole batch, or a (B,) bool tensor: which samples skip."""


@dataclass(frozen=True, slots=True)
class Perturbations:
    """What guidance passes leave out (docs/explanation/model.md, "sampling"), by block."""

    skip_video_self: Mapping[int, Skip] = field(default_factory=dict)
    skip_audio_self: Mapping[int, Skip] = field(default_factory=dict)
    skip_audio_to_video: Skip = False
    skip_video_to_audio: Skip = False

    @classmethod
    def isolated(cls) -> "Perturbations":
        """Modality guidance: no cross attention between the streams."""
        return cls(skip_audio_to_video=True, skip_video_to_audio=True)
