"""Keeping what the base model knows: the model without its adapters as the teacher of the model with them.

Three uses of one thing: items without sound keep the base model's sound (`--audio_dop_weight`), datasets with `preserve_base` keep what it
makes of them (prior preservation), and the class prompt keeps its meaning (`--dop_prompt`, differential output preservation, as known from
image trainers). The teacher sees the very input that the learner sees, so the distance is zero as long as nothing was learned.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.conditioning.noising import model_input
from musubi_tuner.conditioning.tokens import audio_stream
from musubi_tuner.dataset.batch import Batch, Taught
from musubi_tuner.flow.path import model_sigma, velocity_to_x0
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.transformer.modality import Modality, Velocity
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, OfficialLTXV2Wrapper


class BaseModel:
    """The model with its network switched off."""

    def __init__(self, wrapper: OfficialLTXV2Wrapper, network: LoRANetwork) -> None:
        self._wrapper = wrapper
        self._network = network

    def __call__(self, video: Modality | None, audio: Modality | None, text: Tensor, text_mask: Tensor | None) -> Velocity:
        """Its velocity, which nothing is learned through; arguments as of the wrapper."""
        with torch.no_grad(), self._network.disabled():
            return self._wrapper(video, audio, text, text_mask)

    def with_imagined_sound(self, batch: Batch) -> Batch:
        """The batch with sound for the items that have none: what the base model expects of pure noise and the caption, in one step.

        It hears no video while it does so: only what is then learned, at the item's own noise level, is learned together.
        """
        if batch.taught is None or batch.taught.imagined is None:
            return batch
        stream = audio_stream(batch.audio_latents, batch.audio_lengths if batch.audio_padded else None)
        sigma = model_sigma(torch.ones_like(batch.audio_sigma), self._wrapper.timestep_format)
        velocity = self(None, model_input(stream, batch.audio_noise, sigma), batch.text, batch.text_mask).audio
        clean = velocity_to_x0(batch.audio_noise, velocity.float(), sigma[:, None, None])
        if stream.token_mask is not None:
            clean = clean * stream.token_mask[..., None]
        made = geometry.unpatchify_audio(clean).to(batch.audio_latents.dtype)
        return dataclasses.replace(batch, audio_latents=torch.where(batch.taught.imagined[:, None, None, None], made, batch.audio_latents))


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
        return dataclasses.replace(
            batch,
            text=self.text.expand(size, -1, -1),
            text_mask=None if self.text_mask is None else self.text_mask.expand(size, -1),
            video_weight=torch.zeros_like(ones),
            audio_weight=torch.zeros_like(ones),
            taught=Taught(video=ones, audio=ones),
        )
