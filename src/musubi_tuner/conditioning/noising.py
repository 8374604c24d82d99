"""From tokens and a noise level to what the model sees. Training and preview both pass through `model_input`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.conditioning.tokens import TokenStream
from musubi_tuner.flow.path import add_noise, velocity_target
from musubi_tuner.ltxv2.transformer.modality import Modality


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
    return Modality(
        latent=values,
        sigma=sigma,
        levels=levels,
        level_index=index,
        positions=stream.positions,
        token_mask=stream.token_mask,
        present=stream.present,
        keyframe_marker=stream.keyframe_marker,
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
