"""Latent geometry: sizes, tokens and positions (docs/explanation/model.md, "latents and positions").
Time is in seconds, space in pixels."""

import torch
from torch import Tensor

from musubi_tuner.runtime.errors import UserError

LATENT_CHANNELS = 128
SPATIAL_SCALE = 32
TEMPORAL_SCALE = 8
AUDIO_CHANNELS = 8
AUDIO_MEL_BINS = 16
AUDIO_SAMPLE_RATE = 16000
AUDIO_HOP = 160
AUDIO_LATENTS_PER_SECOND = 25
_AUDIO_MELS_PER_LATENT = 4


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of `frames` = 8n + 1 frames."""
    if frames < 1 or frames % TEMPORAL_SCALE != 1:
        low = max(1, (frames - 1) // TEMPORAL_SCALE * TEMPORAL_SCALE + 1)
        raise UserError(f"{frames} frames: the model takes 8n+1 frames; the nearest are {low} and {low + TEMPORAL_SCALE}.")
    return (frames - 1) // TEMPORAL_SCALE + 1


def latent_size(width: int, height: int) -> tuple[int, int]:
    """Latent (width, height) of a frame; both sides are multiples of 32."""
    for name, value in (("width", width), ("height", height)):
        if value < SPATIAL_SCALE or value % SPATIAL_SCALE:
            low = max(SPATIAL_SCALE, value // SPATIAL_SCALE * SPATIAL_SCALE)
            raise UserError(f"{name} {value}: sizes are multiples of 32; the nearest are {low} and {low + SPATIAL_SCALE}.")
    return width // SPATIAL_SCALE, height // SPATIAL_SCALE


def audio_latent_steps(frames: int, fps: float) -> int:
    """Audio latents that go with `frames` at `fps`, as the model is sampled."""
    return max(1, round(frames / fps * AUDIO_LATENTS_PER_SECOND))


def audio_steps_of_mel(mel_frames: int) -> int:
    """Audio latents that the encoder makes of `mel_frames`."""
    return (mel_frames - 1) // _AUDIO_MELS_PER_LATENT + 1


def patchify_video(latents: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B, F*H*W, C), frame-major, then rows, then columns."""
    return latents.flatten(2).transpose(1, 2)


def unpatchify_video(tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
    """(B, F*H*W, C) -> (B, C, F, H, W); sizes in latent cells."""
    return tokens.transpose(1, 2).unflatten(2, (frames, height, width))


def patchify_audio(latents: Tensor) -> Tensor:
    """(B, 8, T, 16) -> (B, T, 128), channels-major: index = channel * 16 + mel bin."""
    return latents.transpose(1, 2).flatten(2)


def unpatchify_audio(tokens: Tensor) -> Tensor:
    """(B, T, 128) -> (B, 8, T, 16)."""
    return tokens.unflatten(2, (AUDIO_CHANNELS, AUDIO_MEL_BINS)).transpose(1, 2)


def frame_bounds(frames: int, device: torch.device | str = "cpu") -> Tensor:
    """(F, 2) float32 [start, end) of latent frames, counted in pixel frames: [0, 1), [1, 9), [9, 17) ..."""
    edges = torch.arange(frames + 1, dtype=torch.float32, device=device) * TEMPORAL_SCALE + 1 - TEMPORAL_SCALE
    edges = edges.clamp(min=0)
    return torch.stack([edges[:-1], edges[1:]], dim=-1)


def video_positions(frames: int, height: int, width: int, fps: Tensor) -> Tensor:
    """Positions of a video's tokens.

    Args:
        frames, height, width: in latent cells.
        fps: (B,) frame rate of each clip.

    Returns:
        (B, 3, F*H*W, 2) float32 [start, end): seconds, pixel row, pixel column.
    """
    fps = fps.float()
    return _positions(frame_bounds(frames, fps.device)[None] / fps[:, None, None], height, width)


def keyframe_positions(frames: Tensor, height: int, width: int, fps: Tensor) -> Tensor:
    """Positions of keyframes' tokens: pixel frame f alone lasts [f, f + 1) / fps seconds, the first one too.

    As the official `VideoConditionByKeyframeIndex` of v1.2 (ltx-core 1.0 has [f, f + 8) for f > 0), ComfyUI's guides and diffusers'
    condition pipeline have it.

    Args:
        frames: (B, K) numbers of pixel frames.
        height, width: in latent cells.
        fps: (B,) frame rate of each clip.

    Returns:
        (B, 3, K*H*W, 2) as `video_positions`.
    """
    return _positions(torch.stack([frames, frames + 1], dim=-1).float() / fps.float()[:, None, None], height, width)


def _positions(times: Tensor, height: int, width: int) -> Tensor:
    """(B, F, 2) seconds of each latent frame -> (B, 3, F*H*W, 2)."""
    batch, frames, _ = times.shape
    rows, columns = (_cells(count, times.device) for count in (height, width))
    grid = (batch, frames, height, width, 2)
    bounds = torch.stack(
        [
            times[:, :, None, None, :].expand(grid),
            rows[None, None, :, None, :].expand(grid),
            columns[None, None, None, :, :].expand(grid),
        ],
        dim=1,
    )
    return bounds.reshape(batch, 3, frames * height * width, 2)


def reference_positions(frames: int, height: int, width: int, fps: Tensor, *, spatial_factor: int, temporal_factor: int) -> Tensor:
    """Positions of a reference's tokens on the target's scale (docs/explanation/model.md, "latents and positions").

    Pixels are multiplied by `spatial_factor`; S = `temporal_factor`: seconds of the reference at fps / S, moved by -(S - 1) / fps,
    not below 0, so that the first frame of both is the same one.

    Args:
        fps: (B,) frame rate of the target.

    Returns:
        (B, 3, F*H*W, 2) as `video_positions`.
    """
    positions = video_positions(frames, height, width, fps.float() / temporal_factor)
    times = positions[:, :1] - ((temporal_factor - 1) / fps.float())[:, None, None, None]
    return torch.cat([times.clamp(min=0), positions[:, 1:] * spatial_factor], dim=1)


def audio_positions(steps: int, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """(B, 1, T, 2) float32 seconds of audio latents: [0, .01), [.01, .05), [.05, .09) ..."""
    edges = torch.arange(steps + 1, dtype=torch.float32, device=device) * _AUDIO_MELS_PER_LATENT + 1 - _AUDIO_MELS_PER_LATENT
    edges = edges.clamp(min=0) * AUDIO_HOP / AUDIO_SAMPLE_RATE  # this order: RoPE multiplies rounding by up to 15708
    return torch.stack([edges[:-1], edges[1:]], dim=-1)[None, None].expand(batch, 1, steps, 2)


def _cells(count: int, device: torch.device) -> Tensor:
    edges = torch.arange(count + 1, dtype=torch.float32, device=device) * SPATIAL_SCALE
    return torch.stack([edges[:-1], edges[1:]], dim=-1)
