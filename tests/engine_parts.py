"""A transformer of a few blocks with a LoRA, and one training step of it: what the tests of memory and speed share."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor

from musubi_tuner.conditioning.conditions import each_tensor
from musubi_tuner.conditioning.tokens import audio_stream, noised, video_stream
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.modality import Modality, Perturbations
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, create_network
from musubi_tuner.tiny import configs

RANK = 4
SHAPES = ((2, 2, 3, 9), (3, 4, 4, 17), (4, 3, 5, 26), (1, 4, 6, 5))
"""Latent frames, rows and columns, and steps of sound."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInput:
    """What `LTXModel.forward` takes."""

    video: Modality | None
    audio: Modality | None
    perturbations: Perturbations | None = None


def make_model(layers: int = 5, version: str = "2.3", args: Mapping[str, str] = MappingProxyType({})) -> tuple[LTXModel, LoRANetwork]:
    """Toy width, random weights, a LoRA whose B is not zero."""
    config = dataclasses.replace(TransformerConfig.from_checkpoint_config(configs.transformer_section(version)), num_layers=layers)
    model = LTXModel(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.normal_(std=spread, generator=generator)
    model.requires_grad_(False)
    network = create_network(model, dim=RANK, alpha=RANK, args=args, seed=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return model, network


def make_input(
    model: LTXModel, shape: Sequence[int], seed: int = 0, batch: int = 1, device: str = "cpu"
) -> tuple[ModelInput, list[Tensor]]:
    """Noised clips with text, and the velocities to predict."""
    generator = torch.Generator().manual_seed(seed)
    frames, rows, columns, steps = shape
    video = video_stream(torch.randn(batch, 128, frames, rows, columns, generator=generator), torch.full((batch,), 24.0))
    audio = audio_stream(torch.randn(batch, 8, steps, 16, generator=generator), None)
    given, targets = [], []
    for stream, width in ((video, model.config.video_context_width), (audio, model.config.audio_context_width)):
        modality, target = noised(stream, torch.randn(stream.clean.shape, generator=generator), torch.rand(batch, generator=generator))
        given.append(dataclasses.replace(modality, context=torch.randn(batch, 32, width, generator=generator)))
        targets.append(target)
    moved = each_tensor(ModelInput(*_typed(given)), lambda tensor: tensor.to(device))
    return moved, [target.to(device) for target in targets]


def with_masks(given: ModelInput) -> ModelInput:
    """The same with an item that is shorter in text, picture and sound."""

    def shortened(stream: Modality | None) -> Modality | None:
        if stream is None or stream.context is None:
            return stream
        text, tokens = torch.ones(stream.context.shape[:2], dtype=torch.bool), torch.ones(stream.latent.shape[:2], dtype=torch.bool)
        text[-1, -5:], tokens[-1, -3:] = False, False
        return dataclasses.replace(stream, context_mask=text, token_mask=tokens)

    return dataclasses.replace(given, video=shortened(given.video), audio=shortened(given.audio))


def _typed(given: list[Modality]) -> tuple[Modality, Modality]:
    return given[0], given[1]


def loss_of(velocity: Sequence[Tensor | None], targets: Sequence[Tensor]) -> Tensor:
    return sum(((got - wanted) ** 2).mean() for got, wanted in zip(velocity, targets, strict=True) if got is not None)


def step(
    model: LTXModel, network: LoRANetwork, shape: Sequence[int] = SHAPES[0], seed: int = 0, device: str = "cpu"
) -> tuple[float, list[Tensor]]:
    """Loss and LoRA gradients of one clip."""
    given, targets = make_input(model, shape, seed, device=device)
    loss = loss_of(model(given.video, given.audio), targets)
    loss.backward()
    return loss.item(), taken_gradients(network)


@contextmanager
def watched(model: LTXModel) -> Iterator[list[ModelInput]]:
    """Collects what the model is called with, and lets it run."""
    seen: list[ModelInput] = []
    run = model.forward
    model.forward = lambda *inputs: seen.append(ModelInput(*inputs)) or run(*inputs)
    try:
        yield seen
    finally:
        del model.forward


def taken_gradients(network: LoRANetwork) -> list[Tensor]:
    gradients = [parameter.grad for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = None
    return gradients


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
