"""One forward pass of training: batch -> tokens -> noised input -> velocity -> losses. Every mode takes this one path."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from musubi_tuner.conditioning.noising import loss_weights, noised
from musubi_tuner.conditioning.rules import condition
from musubi_tuner.conditioning.tokens import TokenStream, audio_stream, video_stream
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.flow.timestep_format import model_sigma
from musubi_tuner.ltxv2.transformer.modality import Modality, Velocity
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper, WrapperInput
from musubi_tuner.training.loss import ErrorFunction, ItemLosses, masked_mean, squared_error


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """What differs between training and validation: the noise levels."""

    video_sigma: Tensor
    """(B,) float32"""
    audio_sigma: Tensor


def drawn_levels(batch: Batch) -> StepInputs:
    """The noise levels that were drawn for the batch's items."""
    return StepInputs(video_sigma=batch.video_sigma, audio_sigma=batch.audio_sigma)


def item_losses(wrapper: OfficialLTXV2Wrapper, batch: Batch, levels: StepInputs) -> ItemLosses:
    """Raw losses of each item and stream of `batch`, at the given noise levels."""
    return item_losses_of_all(wrapper, [batch], [levels])[0]


def item_losses_of_all(
    wrapper: OfficialLTXV2Wrapper, batches: Sequence[Batch], levels: Sequence[StepInputs], error: ErrorFunction = squared_error
) -> list[ItemLosses]:
    """The same of several batches, for which the model visits each of its blocks once."""
    passes = [_Pass(wrapper, batch, given) for batch, given in zip(batches, levels, strict=True)]
    velocities = wrapper.forward_many([WrapperInput(one.inputs["video"], one.inputs["audio"], one.text, one.text_mask) for one in passes])
    return [one.losses(velocity, error) for one, velocity in zip(passes, velocities, strict=True)]


class _Pass:
    """One batch on its way through the model."""

    def __init__(self, wrapper: OfficialLTXV2Wrapper, batch: Batch, levels: StepInputs) -> None:
        self.text, self.text_mask = batch.text, batch.text_mask
        noise = {"video": batch.video_noise, "audio": batch.audio_noise}
        sigmas = {"video": levels.video_sigma, "audio": levels.audio_sigma}
        self.inputs: dict[str, Modality | None] = {"video": None, "audio": None}
        self._targets: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        for name, stream in condition(_streams(batch), batch.conditions).items():
            sigma = model_sigma(sigmas[name], wrapper.timestep_format)
            self.inputs[name], self._targets[name] = noised(stream, noise[name], sigma)
            self._weights[name] = loss_weights(stream)

    def losses(self, velocity: Velocity, error: ErrorFunction) -> ItemLosses:
        predictions = {"video": velocity.video, "audio": velocity.audio}
        values = {
            name: masked_mean(error(predictions[name].float(), target), self._weights[name]) for name, target in self._targets.items()
        }
        present = {name: weight.sum(1) > 0 for name, weight in self._weights.items()}
        return ItemLosses(
            video=values.get("video"),
            audio=values.get("audio"),
            audio_present=present.get("audio"),
            video_present=present.get("video"),
        )


def _streams(batch: Batch) -> dict[str, TokenStream]:
    """The batch's tokens before anything is given or noised."""
    streams = {}
    if batch.latents is not None:
        streams["video"] = video_stream(batch.latents, batch.fps)
    if batch.audio_latents is not None:
        streams["audio"] = audio_stream(batch.audio_latents, batch.audio_lengths if batch.audio_padded else None)
    return streams
