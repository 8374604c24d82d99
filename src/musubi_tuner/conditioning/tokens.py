"""A token has a value, a noise level, a position and a loss weight; with noise, streams of tokens are what the model sees.

Training and preview both pass through `model_input`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.flow.path import add_noise, velocity_target
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.transformer.modality import Modality, ReferenceAttention


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
    share: "NoiseShare | None" = None
    """Tokens that are conditioning in part: noisy ones, but at a lower level. None = there are none. Of sampling."""
    attention: ReferenceAttention | None = None
    """Between the clip and a reference behind it; None = all tokens attend to all. Of sampling."""


@dataclass(frozen=True, slots=True)
class NoiseShare:
    """What share of the noise level each token has: 1 - strength of its conditioning."""

    shares: Tensor
    """(U,) float32, all that occur"""
    index: Tensor
    """(B, N) into them"""

    def of_tokens(self) -> Tensor:
        """(B, N, 1)"""
        return self.shares[self.index][..., None]


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


def video_keyframes(latents: Tensor, frames: Tensor, fps: Tensor, real: Tensor | None) -> TokenStream:
    """(B, 128, K, H, W) one-frame latents of the pixel frames (B, K) of clips of (B,) frames per second: no keyframe marker.

    Args:
        real: (B, K) bool, False = padding; None = all are real.
    """
    _, _, _, height, width = latents.shape
    positions = geometry.keyframe_positions(frames, height, width, fps)
    mask = None if real is None else real.repeat_interleave(height * width, dim=1)
    return TokenStream(clean=geometry.patchify_video(latents).float(), positions=positions, token_mask=mask)


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


def model_input(stream: TokenStream, values: Tensor, sigma: Tensor) -> Modality:
    """The stream as the model's input.

    Args:
        values: (B, N, C) what noisy tokens hold; clean tokens show `stream.clean` whatever stands here, and may be left out at the end.
        sigma: (B,) float32 noise level of the noisy tokens.

    An item whose tokens are all clean has a stream of noise level 0: its prompt modulation and the other stream's gates follow it.
    """
    levels, index = sigma[:, None], None
    if stream.noisy is not None:
        values = torch.where(stream.noisy[..., None], _as_long_as(stream, values), stream.clean)
        sigma = sigma * stream.noisy.any(dim=1)
        levels = torch.stack([sigma, torch.zeros_like(sigma)], dim=1)
        index = (~stream.noisy).long()
        if stream.share is not None:
            levels, index = sigma[:, None] * stream.share.shares, stream.share.index
    return Modality(
        latent=values,
        sigma=sigma,
        levels=levels,
        level_index=index,
        positions=stream.positions,
        token_mask=stream.token_mask,
        present=stream.present,
        keyframe_marker=stream.keyframe_marker,
        reference_attention=stream.attention,
    )


def noised(stream: TokenStream, noise: Tensor, sigma: Tensor) -> tuple[Modality, Tensor]:
    """Training's model input, and the velocity (B, N, C) that it is to predict; `noise` may lack the clean tokens at the end."""
    noise = _as_long_as(stream, noise)
    values = add_noise(stream.clean, noise, sigma[:, None, None])
    return model_input(stream, values, sigma), velocity_target(stream.clean, noise)


def _as_long_as(stream: TokenStream, values: Tensor) -> Tensor:
    """Zeros for appended tokens."""
    return F.pad(values, (0, 0, 0, stream.clean.shape[1] - values.shape[1]))


def loss_weights(stream: TokenStream) -> Tensor:
    """(B, N) float32 weight of each token in the loss: none for clean tokens and padding."""
    weight = torch.ones(stream.clean.shape[:2], device=stream.clean.device) if stream.weight is None else stream.weight
    return weight if stream.noisy is None else weight * stream.noisy
