"""From noise to latents: the same noise levels, positions and model inputs as in training, by the same functions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from musubi_tuner.conditioning.apply import condition
from musubi_tuner.conditioning.conditions import each_tensor
from musubi_tuner.conditioning.tokens import TokenStream, audio_stream, model_input, video_stream
from musubi_tuner.flow.guidance import guide
from musubi_tuner.flow.path import model_sigma, velocity_to_x0
from musubi_tuner.flow.schedule import STOCHASTIC_SEED_OFFSET, ancestral_euler_step, euler_step
from musubi_tuner.generation.contexts import TextContext
from musubi_tuner.generation.given import TEXT_ALONE, Given, audio_steps, video_cells
from musubi_tuner.generation.sampling import SamplingPlan
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.transformer.modality import Perturbations
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.prompts.sample_prompts import PreviewPrompt
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """All that one preview is made from."""

    prompt: PreviewPrompt
    plan: SamplingPlan
    positive: TextContext
    negative: TextContext | None
    """None where nothing is guided away from it."""
    given: Given = TEXT_ALONE
    """What the prompt gives of it besides text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewLatents:
    """What sampling made; None = no such stream."""

    video: Tensor | None
    """(1, 128, F, h, w) float32, on the CPU"""
    audio: Tensor | None
    """(1, 8, T, 16)"""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One run of the model within a step."""

    name: str
    context: TextContext
    perturbations: Perturbations | None


@torch.inference_mode()
def generate(wrapper: OfficialLTXV2Wrapper, sample: Sample, *, advance: Callable[[], object] = lambda: None) -> PreviewLatents:
    """Latents of one sample. Depends on the prompt's seed alone, not on any global random state.

    Args:
        advance: called after each step.

    Raises:
        UserError: the model gave NaN or infinity; names the step, the pass and the tensor.
    """
    device = next(wrapper.parameters()).device
    plan, seed = sample.plan, sample.prompt.seed
    streams = _make_streams(sample, device)
    values = {name: _initial(sample, stream, name) for name, stream in streams.items()}
    passes = _passes(sample)
    levels = model_sigma(plan.sigmas, wrapper.timestep_format).to(device)
    fresh = {name: generator_for(seed + STOCHASTIC_SEED_OFFSET, "preview", name) for name in streams}
    for number, (sigma, following) in enumerate(pairwise(levels), start=1):
        clean = _predict(wrapper, sample, streams, values, sigma, passes, number)
        for name, x0 in clean.items():
            if plan.ancestral:
                noise = torch.randn(x0.shape, generator=fresh[name]).to(device)
                values[name] = ancestral_euler_step(values[name], x0, sigma, following, noise)
            else:
                values[name] = euler_step(values[name], x0, sigma, following)
        advance()
    return _to_latents(sample, values)


def _make_streams(sample: Sample, device: torch.device) -> dict[str, TokenStream]:
    """The streams before noise: empty but for what is given, which is laid over them as in training."""
    prompt, given = sample.prompt, each_tensor(sample.given, lambda tensor: tensor.to(device))
    streams = {}
    if "video" in sample.plan.streams:
        latents = torch.zeros(1, geometry.LATENT_CHANNELS, *video_cells(prompt), device=device) if given.video is None else given.video
        streams["video"] = video_stream(latents, torch.tensor([prompt.fps], device=device))
    if "audio" in sample.plan.streams:
        shape = (1, geometry.AUDIO_CHANNELS, audio_steps(prompt), geometry.AUDIO_MEL_BINS)
        streams["audio"] = audio_stream(torch.zeros(shape, device=device) if given.audio is None else given.audio, None)
    return condition(streams, given.conditions)


def _tokens(sample: Sample, name: str) -> int:
    """Tokens of the sample itself; what a stream has behind them is reference."""
    return audio_steps(sample.prompt) if name == "audio" else math.prod(video_cells(sample.prompt))


def _initial(sample: Sample, stream: TokenStream, name: str) -> Tensor:
    """(1, N, C) float32 noise, drawn on the CPU so that every device starts from the same; clean tokens as they are."""
    shape = (1, _tokens(sample, name), stream.clean.shape[2])
    noise = torch.randn(shape, generator=generator_for(sample.prompt.seed, "preview", name)).to(stream.clean.device)
    return _lay_clean(stream, noise)


def _lay_clean(stream: TokenStream, values: Tensor) -> Tensor:
    own = values.shape[1]
    return values if stream.noisy is None else torch.where(stream.noisy[:, :own, None], values, stream.clean[:, :own])


def _passes(sample: Sample) -> list[_Pass]:
    """The model runs that one step needs: the prompt's own first."""
    plan = sample.plan
    passes = [_Pass("prompt", sample.positive, None)]
    if plan.needs_negative:
        assert sample.negative is not None
        passes.append(_Pass("negative", sample.negative, None))
    if plan.needs_perturbed:
        passes.append(_Pass("perturbed", sample.positive, Perturbations.self_attention(plan.stg_blocks)))
    if plan.needs_isolated:
        passes.append(_Pass("isolated", sample.positive, Perturbations.isolated()))
    return passes


def _predict(
    wrapper: OfficialLTXV2Wrapper,
    sample: Sample,
    streams: Mapping[str, TokenStream],
    values: Mapping[str, Tensor],
    sigma: Tensor,
    passes: list[_Pass],
    number: int,
) -> dict[str, Tensor]:
    """Guided clean predictions (1, N, C) of every stream; clean tokens as they are."""
    inputs = {name: model_input(stream, values[name], sigma[None]) for name, stream in streams.items()}
    found: dict[str, dict[str, Tensor]] = {name: {} for name in streams}
    for run in passes:
        velocity = wrapper(
            inputs.get("video"),
            inputs.get("audio"),
            run.context.text.to(sigma.device),
            run.context.mask_on(sigma.device),
            run.perturbations,
        )
        for name, modality in inputs.items():
            own = values[name].shape[1]
            predicted = getattr(velocity, name)[:, :own].float()
            _require_finite(predicted, sample, number, f"{name} velocity of the {run.name} pass")
            found[name][run.name] = velocity_to_x0(modality.latent[:, :own].float(), predicted, modality.timesteps[:, :own, None])
    guided = {}
    for name, weaker in found.items():
        scales = sample.plan.scales(name)
        x0 = guide(
            weaker["prompt"],
            scales,
            negative=weaker.get("negative") if scales.needs_negative else None,
            perturbed=weaker.get("perturbed") if scales.needs_perturbed else None,
            isolated=weaker.get("isolated") if scales.needs_isolated else None,
        )
        guided[name] = _lay_clean(streams[name], x0)
    return guided


def _require_finite(tensor: Tensor, sample: Sample, number: int, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"preview of {sample.prompt.where}: NaN or infinity in the {what}, step {number} of {sample.plan.steps}. "
            "The LoRA may have diverged: lower --learning_rate and resume from an earlier state. "
            "A preview by --sample_at_first tells whether the base model alone is sound."
        )


def _to_latents(sample: Sample, values: Mapping[str, Tensor]) -> PreviewLatents:
    prompt = sample.prompt
    video = audio = None
    if "video" in values:
        video = geometry.unpatchify_video(values["video"], *video_cells(prompt)).cpu()
    if "audio" in values:
        audio = geometry.unpatchify_audio(values["audio"]).cpu()
    return PreviewLatents(video=video, audio=audio)
