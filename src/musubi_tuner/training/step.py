"""One forward pass of training: batch -> tokens -> noised input -> velocity -> losses. Every mode takes this one path."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.conditioning.apply import condition
from musubi_tuner.conditioning.noising import loss_weights, noised
from musubi_tuner.conditioning.tokens import TokenStream, audio_stream, video_stream
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.flow.path import model_sigma
from musubi_tuner.ltxv2.transformer.modality import Modality, Velocity
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
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


def item_losses(
    wrapper: OfficialLTXV2Wrapper,
    batch: Batch,
    levels: StepInputs,
    error: ErrorFunction = squared_error,
    base: Callable[..., Velocity] | None = None,
) -> ItemLosses:
    """Raw losses of each item and stream of `batch`, at the given noise levels.

    Args:
        base: the model without its adapters, asked first where the batch has items that learn from it (`Batch.taught`).
    """
    one = _Pass(wrapper, batch, levels)
    if batch.taught is not None:
        assert base is not None
        one.base_velocity = base(*one.inputs)
    return one.losses(wrapper(*one.inputs), error)


class _Pass:
    """One batch on its way through the model."""

    def __init__(self, wrapper: OfficialLTXV2Wrapper, batch: Batch, levels: StepInputs) -> None:
        self.taught = batch.taught
        self.base_velocity: Velocity | None = None
        noise = {"video": batch.video_noise, "audio": batch.audio_noise}
        sigmas = {"video": levels.video_sigma, "audio": levels.audio_sigma}
        inputs: dict[str, Modality | None] = {"video": None, "audio": None}
        self._targets: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        for name, stream in condition(_streams(batch), batch.conditions).items():
            sigma = model_sigma(sigmas[name], wrapper.timestep_format)
            inputs[name], self._targets[name] = noised(stream, noise[name], sigma)
            self._weights[name] = loss_weights(stream)
        self.inputs = (inputs["video"], inputs["audio"], batch.text, batch.text_mask)

    def losses(self, velocity: Velocity, error: ErrorFunction) -> ItemLosses:
        predictions = {"video": velocity.video, "audio": velocity.audio}
        values = {
            name: masked_mean(error(predictions[name].float(), target), self._weights[name]) for name, target in self._targets.items()
        }
        present = {name: weight.sum(1) > 0 for name, weight in self._weights.items()}
        preserved = preserved_present = None
        if self.taught is not None:
            preserved, preserved_present = self._preserved(predictions, present, error)
            for name in values:
                own = getattr(self.taught, name) == 0
                values[name], present[name] = values[name] * own, present[name] & own
        return ItemLosses(
            video=values.get("video"),
            audio=values.get("audio"),
            audio_present=present.get("audio"),
            video_present=present.get("video"),
            preserved=preserved,
            preserved_present=preserved_present,
        )

    def _preserved(
        self, predictions: Mapping[str, Tensor | None], present: Mapping[str, Tensor], error: ErrorFunction
    ) -> tuple[Tensor, Tensor]:
        """(B,) weighted distance from the base model's prediction over both streams, and (B,) bool items that have one."""
        targets = {"video": self.base_velocity.video, "audio": self.base_velocity.audio}
        parts, items = [], []
        for name, weight in self._weights.items():
            share = getattr(self.taught, name)
            parts.append(masked_mean(error(predictions[name].float(), targets[name].float()), weight) * share)
            items.append(present[name] & (share > 0))
        return torch.stack(parts).sum(0), torch.stack(items).any(0)


def _streams(batch: Batch) -> dict[str, TokenStream]:
    """The batch's tokens before anything is given or noised."""
    streams = {}
    if batch.latents is not None:
        streams["video"] = video_stream(batch.latents, batch.fps)
    if batch.audio_latents is not None:
        streams["audio"] = audio_stream(batch.audio_latents, batch.audio_lengths if batch.audio_padded else None)
    return streams
