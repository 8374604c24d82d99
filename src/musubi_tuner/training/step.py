"""One forward pass of training: batch -> tokens -> noised input -> velocity -> losses. Every mode takes this one path."""

from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.conditioning.noising import loss_weights, noised
from musubi_tuner.conditioning.tokens import audio_stream, video_stream
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.flow.timestep_format import model_sigma
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.training.loss import ItemLosses, masked_mse


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """What differs between training and validation: the noise levels."""

    video_sigma: Tensor
    """(B,) float32"""
    audio_sigma: Tensor


def item_losses(wrapper: OfficialLTXV2Wrapper, batch: Batch, levels: StepInputs) -> ItemLosses:
    """Raw losses of each item and stream of `batch`, at the given noise levels."""
    video_input = audio_input = None
    video_target = audio_target = video_weight = audio_weight = None
    if batch.latents is not None:
        stream = video_stream(batch.latents, batch.fps)
        video_input, video_target = noised(stream, batch.video_noise, model_sigma(levels.video_sigma, wrapper.timestep_format))
        video_weight = loss_weights(stream)
    if batch.audio_latents is not None:
        stream = audio_stream(batch.audio_latents, batch.audio_lengths if batch.audio_padded else None)
        audio_input, audio_target = noised(stream, batch.audio_noise, model_sigma(levels.audio_sigma, wrapper.timestep_format))
        audio_weight = loss_weights(stream)
    velocity = wrapper(video_input, audio_input, batch.text, batch.text_mask)
    video = None if video_input is None else masked_mse(velocity.video, video_target, video_weight)
    if audio_input is None:
        return ItemLosses(video=video, audio=None, audio_present=None)
    present = torch.ones(batch.size, dtype=torch.bool, device=batch.text.device) if not batch.audio_padded else batch.audio_lengths > 0
    audio = masked_mse(velocity.audio, audio_target, audio_weight) * present
    return ItemLosses(video=video, audio=audio, audio_present=present)
