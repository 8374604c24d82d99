"""Keeping what the base model knows: the model without its adapters as the teacher of the model with them.

Three uses of one thing: items without audio keep the base model's audio (`--audio_dop_weight`), datasets with `preserve_base` keep what it
makes of them (prior preservation, known as regularization images), and the class prompt keeps its meaning (`--dop_prompt`, differential
output preservation). The teacher sees the very input that the learner sees, so the distance is zero as long as nothing was learned.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musubi_tuner.conditioning.tokens import audio_stream, model_input
from musubi_tuner.dataset.batch import Batch, Preserved
from musubi_tuner.flow.path import model_sigma, velocity_to_x0
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.transformer.modality import Modality, Velocity
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, OfficialLTXV2Wrapper
from musubi_tuner.training.objective import FlowMatching, ItemLosses, Prediction, masked_mean, of_stream


@dataclass(frozen=True, slots=True)
class Teacher:
    """The model with its network switched off."""

    wrapper: OfficialLTXV2Wrapper
    network: LoRANetwork

    def __call__(self, video: Modality | None, audio: Modality | None, text: Tensor, text_mask: Tensor | None) -> Velocity:
        """Its velocity, which nothing is learned through; arguments as of the wrapper."""
        with torch.no_grad(), self.network.disabled():
            return self.wrapper(video, audio, text, text_mask)

    def imagine_audio(self, batch: Batch) -> Batch:
        """The batch with audio for the items that have none: what the base model expects of pure noise and the caption, in one step.

        It sees no video while it does so: only what is then learned, at the item's own noise level, is learned together.
        """
        if batch.preserved is None or batch.preserved.imagined is None:
            return batch
        assert batch.audio_latents is not None and batch.audio_noise is not None
        stream = audio_stream(batch.audio_latents, batch.audio_lengths if batch.audio_padded else None)
        sigma = model_sigma(torch.ones_like(batch.audio_sigma), self.wrapper.timestep_format)
        velocity = self(None, model_input(stream, batch.audio_noise, sigma), batch.text, batch.text_mask).audio
        assert velocity is not None
        clean = velocity_to_x0(batch.audio_noise, velocity.float(), sigma[:, None, None])
        if stream.token_mask is not None:
            clean = clean * stream.token_mask[..., None]
        made = geometry.unpatchify_audio(clean).to(batch.audio_latents.dtype)
        return replace(batch, audio_latents=torch.where(batch.preserved.imagined[:, None, None, None], made, batch.audio_latents))


@dataclass(frozen=True, slots=True)
class WithTeacher:
    """An objective whose batches may hold items that learn what the teacher predicts for the same input (`Batch.preserved`)."""

    objective: FlowMatching
    teacher: Teacher

    def predict(self, batch: Batch) -> Prediction:
        noised = self.objective.noise(self.teacher.imagine_audio(batch))
        teacher = self.teacher(*noised.inputs) if batch.preserved is not None else None  # before any graph is kept
        return Prediction(noised, self.objective.wrapper(*noised.inputs), teacher)

    def loss(self, prediction: Prediction) -> ItemLosses:
        losses, preserved = self.objective.loss(prediction), prediction.noised.batch.preserved
        if preserved is None or prediction.teacher is None:
            return losses
        parts, items = [], []
        for name, weight in prediction.noised.weights.items():
            share = preserved.video if name == "video" else preserved.audio
            error = self.objective.error(of_stream(prediction.velocity, name), of_stream(prediction.teacher, name))
            parts.append(masked_mean(error, weight) * share)
            items.append((weight.sum(1) > 0) & (share > 0))
        return replace(
            losses,
            video=None if losses.video is None else losses.video * (preserved.video == 0),
            audio=None if losses.audio is None else losses.audio * (preserved.audio == 0),
            video_present=None if losses.video_present is None else losses.video_present & (preserved.video == 0),
            audio_present=None if losses.audio_present is None else losses.audio_present & (preserved.audio == 0),
            preserved=torch.stack(parts).sum(0),
            preserved_present=torch.stack(items).any(0),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptPreservation:
    """Differential output preservation: the same noised clips under another prompt."""

    text: Tensor
    """(1, S, W) context of the prompt, or its features before the connectors."""
    text_mask: Tensor | None
    """(1, S) bool; None where all are real."""
    weight: float

    def batch(self, batch: Batch) -> Batch:
        """`batch` under the prompt, every stream of which is to stay as the base model predicts it."""
        size = batch.size
        ones = torch.ones_like(batch.video_weight)
        return replace(
            batch,
            text=self.text.expand(size, -1, -1),
            text_mask=None if self.text_mask is None else self.text_mask.expand(size, -1),
            video_weight=torch.zeros_like(ones),
            audio_weight=torch.zeros_like(ones),
            preserved=Preserved(video=ones, audio=ones),
        )
