"""How one prompt is sampled: its noise levels and its guidance, from the command line, the prompt and the model's version."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from musubi_tuner.config.preview import GuidanceOptions, PreviewOptions
from musubi_tuner.flow.guidance import OFF, GuidanceScales, SamplingDefaults, defaults_for
from musubi_tuner.flow.schedule import distilled_sigmas, flowmatch_discrete_sigmas, ltx2_sigmas, mu_for_tokens, shift_of_ltx2
from musubi_tuner.generation.encode import token_count
from musubi_tuner.generation.samplers import Sampler
from musubi_tuner.prompts.prompt import PreviewPrompt
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.tables import format_table

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingPlan:
    """One prompt's sampling."""

    sigmas: Tensor
    """(steps + 1,) float32, from 1 to 0"""
    sampler: Sampler = "euler"
    streams: tuple[str, ...]
    """What is made: "video", "audio" or both. A still has no sound."""
    video: GuidanceScales
    audio: GuidanceScales
    stg_blocks: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def ancestral(self) -> bool:
        return self.sampler == "ancestral"

    def scales(self, stream: str) -> GuidanceScales:
        return self.video if stream == "video" else self.audio

    @property
    def needs_negative(self) -> bool:
        return any(self.scales(stream).needs_negative for stream in self.streams)

    @property
    def needs_perturbed(self) -> bool:
        return any(self.scales(stream).needs_perturbed for stream in self.streams)

    @property
    def needs_isolated(self) -> bool:
        """Only where there are two streams to be kept separate."""
        return len(self.streams) == 2 and any(self.scales(stream).needs_isolated for stream in self.streams)


def make_plan(
    options: GuidanceOptions,
    prompt: PreviewPrompt,
    *,
    mode: str,
    version: str,
    num_layers: int,
    scales: Mapping[str, GuidanceScales] | None = None,
    steps: int | None = None,
) -> SamplingPlan:
    """The sampling of one prompt; what the prompt says wins over the command line, and that over the version's defaults.

    Args:
        scales: guidance by stream in place of the version's.
        steps: in place of the version's.

    Raises:
        UserError: a block that the model does not have.
    """
    streams = streams_of(prompt, mode)
    if isinstance(options, PreviewOptions) and options.sample_sampling_preset == "distilled":
        if (prompt.steps, prompt.video_cfg, prompt.audio_cfg) != (None, None, None):
            log.warning(
                "WARNING: %s: --sample_sampling_preset distilled has eight fixed steps and no guidance: steps and scales do not apply.",
                prompt.where,
            )
        return distilled_plan(streams, version=version)
    defaults = defaults_for(version)
    steps = prompt.steps or options.sample_steps or steps or defaults.steps
    sigmas = ltx2_sigmas(steps)
    if options.sample_scheduler == "ltx2_by_size":
        sigmas = ltx2_sigmas(steps, token_count(prompt, "video" if "video" in streams else "audio"))
    elif options.sample_scheduler == "flowmatch_discrete":
        sigmas = flowmatch_discrete_sigmas(steps, options.discrete_flow_shift or shift_of_ltx2())
    return SamplingPlan(
        sigmas=sigmas,
        streams=streams,
        video=_scales(options, "video", (scales or {}).get("video", defaults.video), prompt.video_cfg),
        audio=_scales(options, "audio", (scales or {}).get("audio", defaults.audio), prompt.audio_cfg),
        stg_blocks=_stg_blocks(options, defaults, num_layers),
    )


def streams_of(prompt: PreviewPrompt, mode: str) -> tuple[str, ...]:
    """What a mode makes of a prompt; a still has no sound."""
    if prompt.frames == 1 and mode == "av":
        return ("video",)
    return {"video": ("video",), "av": ("video", "audio"), "audio": ("audio",)}[mode]


def distilled_plan(streams: tuple[str, ...], *, version: str) -> SamplingPlan:
    """The eight fixed steps of distilled checkpoints, without guidance; from 2.5 on each but the last adds fresh noise."""
    sampler: Sampler = "ancestral" if version == "2.5" else "euler"
    return SamplingPlan(sigmas=distilled_sigmas(), sampler=sampler, streams=streams, video=OFF, audio=OFF, stg_blocks=())


def refining_plan(streams: tuple[str, ...], sampler: Sampler = "euler") -> SamplingPlan:
    """The three fixed steps of a second stage, without guidance."""
    return SamplingPlan(sigmas=distilled_sigmas(2), sampler=sampler, streams=streams, video=OFF, audio=OFF, stg_blocks=())


def describe_plans(
    options: PreviewOptions,
    prompts: Sequence[PreviewPrompt],
    plans: Sequence[SamplingPlan],
    timestep_sampling: str,
    training_shift: float | None = None,
) -> str:
    """A table of what each preview does; under it mu and shift, beside those that training has at the same size.

    Args:
        training_shift: mu that training takes at every size; None = from the size.
    """
    fixed = {"uniform": "uniform noise levels", "logit_normal": "the same at every size"}.get(timestep_sampling)
    rows, levels = [], []
    for prompt, plan in zip(prompts, plans, strict=True):
        size = f"{prompt.width}x{prompt.height}x{prompt.frames} @{prompt.fps:g}"
        if plan.streams == ("audio",):
            size = f"{prompt.seconds:.2f} s"
        mus = {stream: mu_for_tokens(token_count(prompt, stream)) if training_shift is None else training_shift for stream in plan.streams}
        of_training = fixed or ", ".join(f"{stream} {_mu_text(mu)}" for stream, mu in mus.items())
        rows.append(
            (
                f"{prompt.index} {prompt.prompt[:24]!r}",
                size,
                plan.steps,
                _each(plan, "cfg"),
                f"{_each(plan, 'stg')} at {','.join(map(str, plan.stg_blocks))}" if plan.needs_perturbed else "off",
                _each(plan, "rescale"),
                _each(plan, "modality") if len(plan.streams) == 2 else "off",
            )
        )
        levels.append(f"{prompt.index}: {_preview_mu(options, prompt, plan)} in the preview; in training at this size {of_training}")
    headers = ("prompt", "size", "steps", "cfg", "stg", "rescale", "modality")
    return "\n".join([format_table(rows, headers), "", "mu (shift) of the noise levels, by prompt:", *levels])


def _scales(options: GuidanceOptions, stream: str, defaults: GuidanceScales, cfg_of_prompt: float | None) -> GuidanceScales:
    """None is "not set"; 0 is a value. The sound has what both have, unless it has its own."""
    scales: dict[str, float | None] = {"stg": options.stg_scale, "rescale": options.rescale_scale, "modality": options.modality_scale}
    cfg = options.video_cfg_scale
    if stream == "audio":
        own = {"stg": options.audio_stg_scale, "rescale": options.audio_rescale_scale, "modality": options.audio_modality_scale}
        scales |= {name: value for name, value in own.items() if value is not None}
        cfg = options.audio_cfg_scale
    scales["cfg"] = cfg if cfg_of_prompt is None else cfg_of_prompt
    return dataclasses.replace(defaults, **{name: value for name, value in scales.items() if value is not None})


def _stg_blocks(options: GuidanceOptions, defaults: SamplingDefaults, num_layers: int) -> tuple[int, ...]:
    """The blocks that were asked for, or the version's; a model with fewer blocks than the released ones takes its last one."""
    for block in options.stg_blocks:
        if not 0 <= block < num_layers:
            raise UserError(f"--stg_blocks {block}: this model's blocks are 0 to {num_layers - 1}.")
    return options.stg_blocks or tuple(min(block, num_layers - 1) for block in defaults.stg_blocks)


def _mu_text(mu: float) -> str:
    return f"{mu:.2f} ({math.exp(mu):.2f})"


def _preview_mu(options: PreviewOptions, prompt: PreviewPrompt, plan: SamplingPlan) -> str:
    if options.sample_sampling_preset == "distilled":
        return "fixed levels"
    if options.sample_scheduler == "ltx2_by_size":
        return _mu_text(mu_for_tokens(token_count(prompt, plan.streams[0])))
    shift = shift_of_ltx2()
    if options.sample_scheduler == "flowmatch_discrete":
        shift = options.discrete_flow_shift or shift
    return _mu_text(math.log(shift))


def _each(plan: SamplingPlan, name: str) -> str:
    return "/".join(f"{getattr(plan.scales(stream), name):g}" for stream in plan.streams)
