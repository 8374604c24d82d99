"""One forward pass of training: batch -> tokens -> noised input -> velocity -> losses. Every mode takes this one path."""

from dataclasses import dataclass

from torch import Tensor

from musubi_tuner.conditioning.noising import loss_weights, noised
from musubi_tuner.conditioning.rules import condition
from musubi_tuner.conditioning.tokens import TokenStream, audio_stream, video_stream
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
    streams = condition(_streams(batch), batch.conditions)
    video_input = audio_input = None
    video_target = audio_target = video_weight = audio_weight = None
    if "video" in streams:
        video_input, video_target = noised(streams["video"], batch.video_noise, model_sigma(levels.video_sigma, wrapper.timestep_format))
        video_weight = loss_weights(streams["video"])
    if "audio" in streams:
        audio_input, audio_target = noised(streams["audio"], batch.audio_noise, model_sigma(levels.audio_sigma, wrapper.timestep_format))
        audio_weight = loss_weights(streams["audio"])
    velocity = wrapper(video_input, audio_input, batch.text, batch.text_mask)
    video = None if video_input is None else masked_mse(velocity.video, video_target, video_weight)
    video_present = None if video_input is None else video_weight.sum(1) > 0
    if audio_input is None:
        return ItemLosses(video=video, audio=None, audio_present=None, video_present=video_present)
    present = audio_weight.sum(1) > 0
    audio = masked_mse(velocity.audio, audio_target, audio_weight)
    return ItemLosses(video=video, audio=audio, audio_present=present, video_present=video_present)


def _streams(batch: Batch) -> dict[str, TokenStream]:
    """The batch's tokens before anything is given or noised."""
    streams = {}
    if batch.latents is not None:
        streams["video"] = video_stream(batch.latents, batch.fps)
    if batch.audio_latents is not None:
        streams["audio"] = audio_stream(batch.audio_latents, batch.audio_lengths if batch.audio_padded else None)
    return streams
