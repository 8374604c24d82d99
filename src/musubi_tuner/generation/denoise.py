"""From noise to latents: the same noise levels, positions and model inputs as in training, by the same functions."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.conditioning.apply import condition
from musubi_tuner.conditioning.conditions import each_tensor
from musubi_tuner.conditioning.tokens import TokenStream, audio_stream, model_input, video_stream
from musubi_tuner.flow.guidance import OFF, guide
from musubi_tuner.flow.path import add_noise, model_sigma, velocity_to_x0
from musubi_tuner.generation.contexts import TextContext
from musubi_tuner.generation.encode import TEXT_ALONE, ConditioningLatents, audio_steps, token_count, video_cells
from musubi_tuner.generation.samplers import Solver
from musubi_tuner.generation.samplers import sample as run_sampler
from musubi_tuner.generation.sampling import SamplingPlan
from musubi_tuner.generation.windows import Piece, WindowSize, cut, spans_of
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.transformer.modality import Perturbations
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.prompts.prompt import PreviewPrompt
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleInputs:
    """All that one sample is made from."""

    prompt: PreviewPrompt
    plan: SamplingPlan
    positive: TextContext
    negative: TextContext | None
    """None where nothing is guided away from it."""
    conditioning: ConditioningLatents = TEXT_ALONE
    """What the sample is conditioned on besides text."""
    window: WindowSize | None = None
    """What the model takes of a long clip at once; None = all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledLatents:
    """What sampling made; None = no such stream."""

    video: Tensor | None
    """(1, 128, F, h, w) float32, on the CPU"""
    audio: Tensor | None
    """(1, 8, T, 16)"""

    def tokens(self, name: str) -> Tensor:
        """(1, N, 128) of a stream that there is."""
        latents = self.video if name == "video" else self.audio
        assert latents is not None
        return geometry.patchify_video(latents) if name == "video" else geometry.patchify_audio(latents)


Watch = Callable[[int, float, str, str, Tensor], object]
"""(step, noise level, stream, what it is, values)"""


@torch.inference_mode()
def generate(
    wrapper: OfficialLTXV2Wrapper,
    sample: SampleInputs,
    *,
    start: SampledLatents | None = None,
    advance: Callable[[], object] = lambda: None,
    watch: Watch | None = None,
    solve: Solver = run_sampler,
) -> SampledLatents:
    """Latents of one sample. Depends on the prompt's seed alone, not on any global random state.

    Args:
        start: latents of the sample's size that are brought to the first noise level and refined from there; None = noise alone.
        advance: called after each step.
        watch: is told of every prediction, for diagnostics.
        solve: goes from the first noise level to the last, by the predictions that it is given.

    Raises:
        UserError: the model gave NaN or infinity; names the step, the pass and the tensor.
    """
    device = next(wrapper.parameters()).device
    streams = _make_streams(sample, device)
    sample = _guided_where_generated(sample, _frozen(streams))
    denoiser = _Denoiser(wrapper, sample, streams, _passes(wrapper, sample, streams), watch)
    predict = denoiser.predict if sample.window is None else _Windowed.of(denoiser, sample.window).predict
    prompt, plan = sample.prompt, sample.plan
    levels = model_sigma(plan.sigmas, wrapper.timestep_format).to(device)
    values = {name: _initial(prompt, stream, name, start, levels[0]) for name, stream in denoiser.streams.items()}
    keep = denoiser.keep_clean
    with wrapper.transformer.remembering_positions():
        values = solve(plan.sampler, values, levels, predict, keep, seed=prompt.seed, advance=advance)
    return SampledLatents(
        video=geometry.unpatchify_video(_own(values, "video", prompt), *video_cells(prompt)).cpu() if "video" in values else None,
        audio=geometry.unpatchify_audio(_own(values, "audio", prompt)).cpu() if "audio" in values else None,
    )


@dataclass(frozen=True, slots=True)
class _Denoiser:
    """Predicts the clean streams of one sample: a forward pass for the prompt and one for each guidance that is on, weighed together."""

    wrapper: OfficialLTXV2Wrapper
    sample: SampleInputs
    streams: Mapping[str, TokenStream]
    passes: Mapping[str, tuple[Tensor, Tensor | None, Perturbations | None]]
    """Text, mask and perturbations of each forward pass that one step needs, on the device: the prompt's own first."""
    watch: Watch | None

    def predict(self, values: Mapping[str, Tensor], sigma: Tensor, step: int) -> dict[str, Tensor]:
        """Guided x0 of every stream from its (1, N, C) values at noise level `sigma`; conditioning tokens stay clean."""
        inputs = {name: model_input(stream, values[name], sigma[None]) for name, stream in self.streams.items()}
        x0: dict[str, dict[str, Tensor]] = {name: {} for name in inputs}
        found = self.wrapper.passes(inputs.get("video"), inputs.get("audio"), list(self.passes.values()))
        for which, velocities in zip(self.passes, found, strict=True):
            for name, modality in inputs.items():
                own = values[name].shape[1]
                velocity = getattr(velocities, name)[:, :own].float()
                self._require_finite(velocity, step, f"{name} velocity of the {which} pass")
                if self.watch is not None:
                    self.watch(step, float(sigma), name, f"velocity, {which} pass", velocity)
                x0[name][which] = velocity_to_x0(modality.latent[:, :own].float(), velocity, modality.timesteps[:, :own, None])
        guided = {name: self.keep_clean(name, self._guided(name, of_stream)) for name, of_stream in x0.items()}
        if self.watch is not None:
            for name, value in guided.items():
                self.watch(step, float(sigma), name, "guided prediction", value)
        return guided

    def keep_clean(self, name: str, values: Tensor) -> Tensor:
        """A stream's (1, N, C) values, with its conditioning tokens as they are."""
        return _lay_clean(self.streams[name], values)

    def _guided(self, name: str, x0: Mapping[str, Tensor]) -> Tensor:
        scales = self.sample.plan.scales(name)
        wanted = {"negative": scales.needs_negative, "perturbed": scales.needs_perturbed, "isolated": scales.needs_isolated}
        return guide(x0["prompt"], scales, **{which: x0.get(which) for which, needed in wanted.items() if needed})

    def _require_finite(self, tensor: Tensor, step: int, what: str) -> None:
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{self.sample.prompt.where}: NaN or infinity in the {what}, step {step} of {self.sample.plan.steps}. "
                "A LoRA (--lora) may have diverged, or its strength be too large: a sample without it (in training, --sample_at_first) "
                "tells if the base model alone is sound. In training, lower --learning_rate and resume from an earlier state."
            )


@dataclass(frozen=True, slots=True)
class _Windowed:
    """Predicts a long clip window by window (generation/windows.py)."""

    pieces: tuple[tuple[_Denoiser, Mapping[str, Piece]], ...]

    @staticmethod
    def of(whole: _Denoiser, size: WindowSize) -> "_Windowed":
        prompt, streams = whole.sample.prompt, whole.streams
        frames, height, width = video_cells(prompt)
        per_cell = {"video": height * width, "audio": 1}
        pieces = []
        for spans in spans_of(frames, audio_steps(prompt), prompt.fps, size):
            cuts = {
                name: cut(stream, spans[name], tokens=token_count(prompt, name), per_cell=per_cell[name])
                for name, stream in streams.items()
            }
            own = {name: piece.stream for name, piece in cuts.items()}
            pieces.append((dataclasses.replace(whole, streams=own), cuts))
        return _Windowed(tuple(pieces))

    def predict(self, values: Mapping[str, Tensor], sigma: Tensor, step: int) -> dict[str, Tensor]:
        totals = {name: torch.zeros_like(value) for name, value in values.items()}
        weights = {name: torch.zeros_like(value[..., :1]) for name, value in values.items()}
        for denoiser, cuts in self.pieces:
            index = {name: piece.index[piece.index < values[name].shape[1]] for name, piece in cuts.items()}
            found = denoiser.predict({name: values[name][:, own] for name, own in index.items()}, sigma, step)
            for name, x0 in found.items():
                weight = cuts[name].weights[: len(index[name])]
                totals[name][:, index[name]] += weight * x0
                weights[name][:, index[name]] += weight
        return {name: total / weights[name] for name, total in totals.items()}


def _passes(
    wrapper: OfficialLTXV2Wrapper, sample: SampleInputs, streams: Mapping[str, TokenStream]
) -> dict[str, tuple[Tensor, Tensor | None, Perturbations | None]]:
    plan, device = sample.plan, next(iter(streams.values())).clean.device
    text, mask = sample.positive.text.to(device), sample.positive.mask_on(device)
    passes: dict[str, tuple[Tensor, Tensor | None, Perturbations | None]] = {"prompt": (text, mask, None)}
    if plan.needs_negative:
        assert sample.negative is not None
        negative = sample.negative.text.to(device)
        passes["negative"] = (_without_frozen(wrapper, streams, text, negative), sample.negative.mask_on(device), None)
    if plan.needs_perturbed:
        blocks = {name: dict.fromkeys(plan.stg_blocks if plan.scales(name).needs_perturbed else (), True) for name in ("video", "audio")}
        passes["perturbed"] = (text, mask, Perturbations(skip_video_self=blocks["video"], skip_audio_self=blocks["audio"]))
    if plan.needs_isolated:
        passes["isolated"] = (text, mask, Perturbations.isolated())
    return passes


def _frozen(streams: Mapping[str, TokenStream]) -> set[str]:
    """Streams that are given as a whole."""
    return {name for name, stream in streams.items() if stream.noisy is not None and not bool(stream.noisy.any())}


def _guided_where_generated(sample: SampleInputs, frozen: set[str]) -> SampleInputs:
    """Nothing is guided in a stream that is given as a whole."""
    plan = sample.plan
    video, audio = (OFF if name in frozen else plan.scales(name) for name in ("video", "audio"))
    return dataclasses.replace(sample, plan=dataclasses.replace(plan, video=video, audio=audio))


def _without_frozen(wrapper: OfficialLTXV2Wrapper, streams: Mapping[str, TokenStream], text: Tensor, negative: Tensor) -> Tensor:
    """The negative text, but the prompt's for a stream that is given as a whole: as the official pipeline from sound to pictures has it,
    which steers the pictures alone."""
    frozen = _frozen(streams)
    if not frozen or text.shape != negative.shape:
        return negative
    pairs = zip(("video", "audio"), wrapper.split_text(text), wrapper.split_text(negative), strict=True)
    return torch.cat([own if name in frozen else other for name, own, other in pairs if own is not None and other is not None], dim=-1)


def _make_streams(sample: SampleInputs, device: torch.device) -> dict[str, TokenStream]:
    """The streams before noise: empty but for the conditioning, which is laid over them as in training."""
    prompt, conditioning = sample.prompt, each_tensor(sample.conditioning, lambda tensor: tensor.to(device))
    streams = {}
    if "video" in sample.plan.streams:
        latents = (
            torch.zeros(1, geometry.LATENT_CHANNELS, *video_cells(prompt), device=device)
            if conditioning.video is None
            else conditioning.video
        )
        streams["video"] = video_stream(latents, torch.tensor([prompt.fps], device=device))
    if "audio" in sample.plan.streams:
        shape = (1, geometry.AUDIO_CHANNELS, audio_steps(prompt), geometry.AUDIO_MEL_BINS)
        streams["audio"] = audio_stream(torch.zeros(shape, device=device) if conditioning.audio is None else conditioning.audio, None)
    return condition(streams, conditioning.conditions)


def _initial(prompt: PreviewPrompt, stream: TokenStream, name: str, start: SampledLatents | None, sigma: Tensor) -> Tensor:
    """(1, N, C) float32 at level `sigma`: noise, drawn on the CPU so that every device starts from the same, on top of `start`;
    conditioning tokens clean."""
    kind = "preview" if start is None else "refine"
    count = token_count(prompt, name)
    generator = generator_for(prompt.seed, kind, name)
    noise = torch.randn((1, count, stream.clean.shape[2]), generator=generator)
    if stream.share is not None:  # what lies behind the clip is noisy in part
        noise = torch.cat([noise, torch.randn((1, stream.clean.shape[1] - count, noise.shape[2]), generator=generator)], dim=1)
    noise = values = noise.to(stream.clean.device)
    if start is not None:
        values = torch.cat([add_noise(start.tokens(name).to(noise), noise[:, :count], sigma), noise[:, count:]], dim=1)
    if stream.share is not None:
        share = stream.share.of_tokens()
        values = torch.where(share < 1, add_noise(stream.clean, noise, share * sigma), values)
    return _lay_clean(stream, values, blend=False)


def _own(values: Mapping[str, Tensor], name: str, prompt: PreviewPrompt) -> Tensor:
    """Without tokens of keyframes and references."""
    return values[name][:, : token_count(prompt, name)]


def _lay_clean(stream: TokenStream, values: Tensor, *, blend: bool = True) -> Tensor:
    """
    Args:
        blend: tokens that are conditioning in part are drawn towards it by their strength, as the official code does with predictions.
    """
    own = values.shape[1]
    if stream.noisy is None:
        return values
    if stream.share is not None and blend:
        share = stream.share.of_tokens()[:, :own]
        values = torch.where(share < 1, share * values + (1 - share) * stream.clean[:, :own], values)
    return torch.where(stream.noisy[:, :own, None], values, stream.clean[:, :own])
