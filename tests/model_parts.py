"""Calling the wrapper with latents, as a sampler that knows no tokens would."""

import torch
from torch import Tensor

from musubi_tuner.conditioning.tokens import audio_stream, model_input, video_stream
from musubi_tuner.flow.path import to_sigma
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper


def predict_latents(
    wrapper: OfficialLTXV2Wrapper,
    latents: Tensor | None,
    timesteps: Tensor,
    text: Tensor,
    *,
    fps: Tensor | float = 24.0,
    audio_latents: Tensor | None = None,
    audio_timesteps: Tensor | None = None,
    audio_lengths: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Latent-shaped velocities, in the manner of musubi-tuner.

    Args:
        latents: (B, 128, F, H, W) noised video latents.
        timesteps: (), (1,) or (B,) in the wrapper's timestep format; of the audio too where `audio_timesteps` is None.
        audio_latents: (B, 8, T, 16) noised audio latents.
    """
    given = latents if latents is not None else audio_latents
    assert given is not None
    batch = given.shape[0]
    video_input = audio_input = None
    if latents is not None:
        rates = torch.as_tensor(fps, dtype=torch.float32, device=latents.device).expand(batch)
        stream = video_stream(latents, rates)
        video_input = model_input(stream, stream.clean, _sigma(wrapper, timesteps, batch))
    if audio_latents is not None:
        stream = audio_stream(audio_latents, audio_lengths)
        audio_sigma = _sigma(wrapper, timesteps if audio_timesteps is None else audio_timesteps, batch)
        audio_input = model_input(stream, stream.clean, audio_sigma)
    velocity = wrapper(video_input, audio_input, text, text_mask)
    video = None if velocity.video is None else geometry.unpatchify_video(velocity.video, *latents.shape[2:])
    audio = None if velocity.audio is None else geometry.unpatchify_audio(velocity.audio)
    return video, audio


def _sigma(wrapper: OfficialLTXV2Wrapper, timesteps: Tensor, batch: int) -> Tensor:
    return to_sigma(timesteps.reshape(-1), wrapper.timestep_format).expand(batch)
