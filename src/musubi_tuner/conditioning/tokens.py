"""A token has a value, a noise level, a position and a loss weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.ltxv2 import geometry


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStream:
    """One stream's tokens before noise. B batch, N tokens, C = 128 channels."""

    clean: Tensor
    """(B, N, C) float32 normalized latents."""
    positions: Tensor
    """(B, P, N, 2) float32, see `Modality.positions`."""
    noisy: Tensor | None = None
    """(B, N) bool, False = a clean conditioning token: noise level 0, no loss; None = all are noisy."""
    weight: Tensor | None = None
    """(B, N) float32 loss weights; None = 1. Clean tokens weigh nothing in any case."""
    token_mask: Tensor | None = None
    """(B, N) bool, False = padding; None = no padding."""
    present: Tensor | None = None
    """(B,) bool, False = this item has no such stream; None = all have it."""
    keyframe_marker: Tensor | None = None
    """(B, N) bool tokens that carry the keyframe embedding of 2.5."""


def video_stream(latents: Tensor, fps: Tensor) -> TokenStream:
    """(B, 128, F, H, W) latents at (B,) frames per second.

    The first latent frame carries the keyframe marker, as it does wherever the models are sampled.
    """
    _, _, frames, height, width = latents.shape
    positions = geometry.video_positions(frames, height, width, fps)
    marker = torch.zeros(latents.shape[0], frames * height * width, dtype=torch.bool, device=latents.device)
    marker[:, : height * width] = True
    return TokenStream(clean=geometry.patchify_video(latents).float(), positions=positions, keyframe_marker=marker)


def video_reference(latents: Tensor, fps: Tensor, *, spatial_factor: int = 1, temporal_factor: int = 1) -> TokenStream:
    """(B, 128, F, H, W) latents of a reference to a target of (B,) frames per second: no keyframe marker, positions of the target's scale.

    Args:
        spatial_factor: how many times smaller than the target its pictures are.
        temporal_factor: how many of the target's frames one of its frames stands for.
    """
    _, _, frames, height, width = latents.shape
    positions = geometry.reference_positions(frames, height, width, fps, spatial_factor=spatial_factor, temporal_factor=temporal_factor)
    return TokenStream(clean=geometry.patchify_video(latents).float(), positions=positions)


def audio_stream(latents: Tensor, lengths: Tensor | None) -> TokenStream:
    """(B, 8, T, 16) latents of which the first (B,) `lengths` steps are real; length 0 = the item has no sound.

    `lengths` of None means that all steps of all items are real.
    """
    batch, _, steps, _ = latents.shape
    positions = geometry.audio_positions(steps, batch, latents.device)
    tokens = geometry.patchify_audio(latents).float()
    if lengths is None:
        return TokenStream(clean=tokens, positions=positions)
    real = torch.arange(steps, device=latents.device)[None] < lengths[:, None]
    present = lengths > 0
    # An item without sound keeps its (zero) tokens visible to themselves, as attention needs one key; `present` keeps them from the video.
    return TokenStream(
        clean=tokens,
        positions=positions,
        weight=real.float(),
        token_mask=real | ~present[:, None],
        present=present,
    )
