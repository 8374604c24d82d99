"""The projections of the video encoder, from covariances of clips: no gradient, half a minute."""

import torch
from torch import Tensor

from dev.world.anything import any_frames
from musubi_tuner.tiny.world.video_encoder import SIGNAL, VideoEncoder, downsample, into_patches

CLIPS, SEED = 150, 1234
_GAIN = 10.0
"""Of the second and third level over the means beside them."""


def to_pixels(frames: Tensor) -> Tensor:
    """(B, F, H, W, 3) uint8 -> (B, 3, F, H, W) float32 in -1..1."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def principal(values: Tensor, count: int) -> Tensor:
    """(N, C) rows -> (count, C) directions of most variance, the mean set aside."""
    centered = values - values.mean(0)
    covariance = (centered.T @ centered).double() / len(values)
    return torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[:count].float()


@torch.no_grad()
def fit_video_encoder(frames: Tensor) -> VideoEncoder:
    """Each level takes the directions of most variance of what the level before gives.

    Args:
        frames: (B, F, H, W, 3) uint8
    """
    pixels = to_pixels(frames)
    patches = principal(_rows(into_patches(pixels)), 16)
    unset = torch.zeros(0)
    second = torch.zeros(16, 128)
    third = torch.zeros(32, 128)
    first = VideoEncoder(patches=patches, second=second, third=third, last=unset, last_bias=unset).levels(pixels)[0]
    second = _GAIN * principal(_rows(first), 16)
    x = downsample(first, second, (2, 2, 2))
    third = _GAIN * principal(_rows(x), 32)
    rows = _rows(downsample(x, third, (1, 2, 2)))
    last = principal(rows, SIGNAL) / rows.std()
    return VideoEncoder(patches=patches, second=second, third=third, last=last, last_bias=-(last @ rows.mean(0)))


def statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (128,) to normalize raw latents (B, 128, f, h, w) by: only partly to unit spread.

    Strong directions keep some of their strength and weak ones stay weak, as all count alike in the transformer's loss.
    """
    rows = latents.transpose(0, 1).flatten(1)
    return rows.mean(1), partial_std(rows.std(1))


def partial_std(std: Tensor) -> Tensor:
    """What to divide by, so that a spread s becomes sqrt(2 s), from 0.4 to 1.5; 1 where there is nothing."""
    wanted = ((std + 1e-3) / 0.5).sqrt().clamp(0.4, 1.5)
    return torch.where(std > 0, (std + 1e-3) / wanted, torch.ones_like(std))


def default_video_encoder() -> VideoEncoder:
    return fit_video_encoder(any_frames(CLIPS, SEED))


def _rows(x: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (N, C)"""
    return x.transpose(0, 1).flatten(1).T
