"""What a batch teaches: tokens are noised, the model predicts their velocity, and the error against the true velocity is the loss.

An `Objective` has two halves, `predict(batch)` and `loss(prediction)`. `FlowMatching` is the plain one; `preservation.WithTeacher` wraps it
for items that learn from the base model. `BatchObjective.backward` is what the training loop and the trial of a memory plan both call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.conditioning.apply import condition
from musubi_tuner.conditioning.tokens import audio_stream, loss_weights, noised, video_stream
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.flow.path import model_sigma
from musubi_tuner.ltxv2.transformer.modality import Modality, Velocity
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.networks.whole import TrainedNetwork

if TYPE_CHECKING:
    from musubi_tuner.training.balance import AudioBalance
    from musubi_tuner.training.preservation import PromptPreservation

ErrorFunction = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target), float32 -> error of each element."""

ModelInputs = tuple[Modality | None, Modality | None, Tensor, Tensor | None]
"""What the wrapper is called with: video, audio, text (B, S, W), text mask (B, S)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemLosses:
    """Raw losses of one batch, float32; None where the batch has no such stream."""

    video: Tensor | None
    """(B,)"""
    audio: Tensor | None
    """(B,), 0 for items without audio."""
    audio_present: Tensor | None
    """(B,) bool items whose audio was supervised"""
    video_present: Tensor | None = None
    """(B,) bool items of whose video anything was to be generated; None = all."""
    preserved: Tensor | None = None
    """(B,) weighted distance from the teacher's prediction, of items that learn from it (`Batch.preserved`); None where none does."""
    preserved_present: Tensor | None = None
    """(B,) bool items that are in it"""
    prompt: Tensor | None = None
    """(B,) distance from the teacher's prediction under the prompt of `--dop_prompt`; None without one."""
    clipped: Tensor | None = None
    """(B,) streams of which an update rule learns no more, as the policy has moved far enough; None where it does not clip."""
    clipped_of: Tensor | None = None
    """(B,) streams of which it learns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Noised:
    """A batch on its way into the model."""

    batch: Batch
    inputs: ModelInputs
    targets: Mapping[str, Tensor]
    """{stream: (B, N, C) float32 velocity that is to be predicted}"""
    weights: Mapping[str, Tensor]
    """{stream: (B, N) float32 weight of each token; 0 for conditioning and padding}"""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model made of it."""

    noised: Noised
    velocity: Velocity
    teacher: Velocity | None = None
    """What the base model predicts for the same input; None where no item learns from it."""


def of_stream(velocity: Velocity, name: str) -> Tensor:
    """(B, N, C) float32 velocity of a stream that is there."""
    found = velocity.video if name == "video" else velocity.audio
    assert found is not None
    return found.float()


def error_function(kind: str, delta: float) -> ErrorFunction:
    """`mse`: e^2; `mae`: |e|; `huber`: e^2 / 2 up to `delta`, and delta (|e| - delta / 2) beyond it."""
    if kind == "mse":
        return squared_error
    if kind == "mae":
        return partial(F.l1_loss, reduction="none")
    return partial(F.huber_loss, reduction="none", delta=delta)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).pow(2)


def masked_mean(error: Tensor, weight: Tensor) -> Tensor:
    """(B,) mean of (B, N, C) errors over channels and weighted tokens; 0 for an item whose tokens all weigh nothing.

    Args:
        weight: (B, N).
    """
    total = weight.sum(1)
    return (error.mean(-1) * weight).sum(1) / total.clamp(min=1e-8) * (total > 0)


class Objective(Protocol):
    """What is learned of a batch."""

    def predict(self, batch: Batch) -> Prediction:
        """Noise the batch and run the model on it."""
        ...

    def loss(self, prediction: Prediction) -> ItemLosses:
        """Raw losses of each item and stream."""
        ...


@dataclass(frozen=True, slots=True)
class FlowMatching:
    """Error of the predicted velocity, noise - clean (docs/explanation/model.md, "noise levels")."""

    wrapper: OfficialLTXV2Wrapper
    error: ErrorFunction = squared_error

    def noise(self, batch: Batch) -> Noised:
        """The batch's tokens with conditioning laid over them, at its noise levels."""
        streams = {}
        if batch.latents is not None:
            streams["video"] = video_stream(batch.latents, batch.fps)
        if batch.audio_latents is not None:
            streams["audio"] = audio_stream(batch.audio_latents, batch.audio_lengths if batch.audio_padded else None)
        drawn = {"video": (batch.video_noise, batch.video_sigma), "audio": (batch.audio_noise, batch.audio_sigma)}
        modalities: dict[str, Modality] = {}
        targets, weights = {}, {}
        for name, stream in condition(streams, batch.conditions).items():
            noise, sigma = drawn[name]
            assert noise is not None
            modalities[name], targets[name] = noised(stream, noise, model_sigma(sigma, self.wrapper.timestep_format))
            weights[name] = loss_weights(stream)
        inputs = (modalities.get("video"), modalities.get("audio"), batch.text, batch.text_mask)
        return Noised(batch=batch, inputs=inputs, targets=targets, weights=weights)

    def predict(self, batch: Batch) -> Prediction:
        noised_batch = self.noise(batch)
        return Prediction(noised_batch, self.wrapper(*noised_batch.inputs))

    def loss(self, prediction: Prediction) -> ItemLosses:
        velocity, weights = prediction.velocity, prediction.noised.weights
        values = {
            name: masked_mean(self.error(of_stream(velocity, name), target), weights[name])
            for name, target in prediction.noised.targets.items()
        }
        present = {name: weight.sum(1) > 0 for name, weight in weights.items()}
        return ItemLosses(
            video=values.get("video"),
            audio=values.get("audio"),
            video_present=present.get("video"),
            audio_present=present.get("audio"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchObjective:
    """Everything that a batch gives gradients for: its own content or what the teacher makes of it, then the prompt of `--dop_prompt`."""

    network: TrainedNetwork
    objective: Objective
    balance: "AudioBalance | None" = None
    """Weighs the audio loss in place of `--audio_loss_weight`, beside the weights of datasets and noise levels; None = that weight."""
    prompt: "PromptPreservation | None" = None

    def backward(self, batch: Batch, accumulation: int = 1) -> tuple[Batch, ItemLosses]:
        """Add the gradients of the batch's loss, divided by `accumulation`, and return its raw losses.

        The prompt has a backward pass of its own, so that one graph at a time is kept. Where all of a batch is conditioning, nothing is
        learned from it. Dropout masks hold for the backward pass too, in which blocks may be recomputed.

        Returns:
            The batch as it was trained on, and its losses.
        """
        with self.network.dropout(batch.dropout_seeds):
            prediction = self.objective.predict(batch)
            losses, batch = self.objective.loss(prediction), prediction.noised.batch
            del prediction  # its graph is held by the losses alone, and freed by their backward pass
            audio_weight = batch.audio_weight if self.balance is None else batch.audio_weight * self.balance.multiplier()
            _backward(total_loss(losses, batch.video_weight, audio_weight) / accumulation)
            if self.prompt is None:
                return batch, losses
            held = self.objective.loss(self.objective.predict(self.prompt.batch(batch))).preserved
            assert held is not None
            _backward(self.prompt.weight * held.mean() / accumulation)
        return batch, replace(losses, prompt=held.detach())


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:
        loss.backward()


def total_loss(losses: ItemLosses, video_weight: Tensor, audio_weight: Tensor) -> Tensor:
    """Mean over the batch of each item's weighted sum of its streams.

    It is 0, without a gradient, where the batch has neither. It is additive over items, so it does not depend on how they are dealt to
    batches and processes.

    Args:
        video_weight, audio_weight: (B,).
    """
    parts = []
    if losses.video is not None:
        parts.append(losses.video * video_weight)
    if losses.audio is not None:
        parts.append(losses.audio * audio_weight)
    if losses.preserved is not None:
        parts.append(losses.preserved)
    return torch.stack(parts).sum(0).mean() if parts else video_weight.new_zeros(())
