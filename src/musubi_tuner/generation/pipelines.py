"""The pipelines by name, each a list of stages: at what size, along which noise levels, under what guidance, with which networks.

What follows the official pipelines is listed in docs/explanation/pipelines.md, with what is left out.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from musubi_tuner.config.generation import PipelineOptions
from musubi_tuner.config.preview import GuidanceOptions
from musubi_tuner.flow.guidance import GuidanceScales
from musubi_tuner.flow.schedule import ltx2_sigmas
from musubi_tuner.generation.encode import token_count
from musubi_tuner.generation.sampling import SamplingPlan, distilled_plan, make_plan, refining_plan, streams_of
from musubi_tuner.ltxv2.geometry import SPATIAL_SCALE
from musubi_tuner.prompts.prompt import ConditioningInputs, PreviewPrompt, Rectangle
from musubi_tuner.runtime.errors import UserError

Pipeline = Literal["one_stage", "two_stage", "distilled", "distilled_one_stage", "ic_lora", "keyframes", "hq"]
TWO_STAGES: frozenset[str] = frozenset({"two_stage", "distilled", "ic_lora", "keyframes", "hq"})
WITH_DISTILLED_LORA: Mapping[str, tuple[float, float]] = {"two_stage": (0.0, 1.0), "keyframes": (0.0, 1.0), "hq": (0.25, 0.5)}
"""Strength of --distilled_lora in both stages; the other pipelines run on a distilled checkpoint."""
FIXED_STEPS: frozenset[str] = frozenset({"distilled", "distilled_one_stage", "ic_lora"})
"""Eight steps, without guidance."""
_SIZE = ("sample_width", "sample_height", "sample_frames", "sample_fps")
HQ_STEPS = 15
"""Of the first stage of hq, as its guidance in place of the release's."""
HQ = {"video": GuidanceScales(cfg=3, stg=0, rescale=0.45, modality=3), "audio": GuidanceScales(cfg=7, stg=0, rescale=1, modality=3)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One pass from a noise level to clean latents, of one prompt."""

    prompt: PreviewPrompt
    """At the stage's size, with what the stage is conditioned on."""
    plan: SamplingPlan
    refines: bool = False
    """Starts from the latents of the stage before, doubled in size; else from noise."""
    with_loras: bool = True
    """The user's networks are on."""
    distilled_lora: float = 0.0
    """Strength of --distilled_lora."""


def make_stages(
    pipeline: Pipeline,
    prompt: PreviewPrompt,
    guidance: GuidanceOptions,
    options: PipelineOptions,
    *,
    mode: str,
    version: str,
    num_layers: int,
) -> tuple[Stage, ...]:
    """The stages of one prompt.

    Raises:
        UserError: a size that has no half, or inputs that the pipeline does not take.
    """
    _check_inputs(pipeline, prompt, mode)
    streams = streams_of(prompt, mode)
    if pipeline == "one_stage":
        return (Stage(prompt=prompt, plan=make_plan(guidance, prompt, mode=mode, version=version, num_layers=num_layers)),)
    if pipeline == "distilled_one_stage":
        return (Stage(prompt=prompt, plan=distilled_plan(streams, version=version)),)
    if pipeline == "keyframes":
        prompt = _all_beside(prompt)
    half = _halved(prompt)
    first, second = WITH_DISTILLED_LORA.get(pipeline, (0.0, 0.0))
    if options.distilled_lora_strength is not None:
        first, second = (options.distilled_lora_strength if strength else 0.0 for strength in (first, second))
    if pipeline in ("distilled", "ic_lora"):
        plan = distilled_plan(streams, version=version)
    elif pipeline == "hq":
        plan = _hq_plan(guidance, half, mode=mode, version=version, num_layers=num_layers)
    else:
        plan = make_plan(guidance, half, mode=mode, version=version, num_layers=num_layers)
    full = _without_reference(prompt) if pipeline == "ic_lora" else prompt
    refining = refining_plan(streams, "res_2s" if pipeline == "hq" else "euler")
    return (
        Stage(prompt=half, plan=plan, distilled_lora=first),
        Stage(prompt=full, plan=refining, refines=True, with_loras=pipeline != "ic_lora", distilled_lora=second),
    )


def without_effect(pipeline: Pipeline, prompt: PreviewPrompt, guidance: GuidanceOptions) -> list[str]:
    """Flags that are given, of a prompt or of all, and that a pipeline with fixed steps and no guidance makes nothing of."""
    if pipeline not in FIXED_STEPS:
        return []
    of_prompt = {
        "--s": prompt.steps not in (None, guidance.sample_steps),
        "--l or --al": (prompt.video_cfg, prompt.audio_cfg) != (None, None),
        "a negative prompt": prompt.negative != "",
    }
    found = [name for name, given in of_prompt.items() if given]
    for field in dataclasses.fields(GuidanceOptions):
        if field.name not in _SIZE and getattr(guidance, field.name) != field.default:
            found.append(f"--{field.name}")
    return found


def as_sampled(pipeline: Pipeline, prompt: PreviewPrompt, guidance: GuidanceOptions) -> tuple[PreviewPrompt, GuidanceOptions]:
    """Without what has no effect (`without_effect`), so that the same clip is known by the same recipe."""
    if pipeline not in FIXED_STEPS:
        return prompt, guidance
    plain = GuidanceOptions(**{name: getattr(guidance, name) for name in _SIZE})
    return dataclasses.replace(prompt, steps=None, video_cfg=None, audio_cfg=None, negative=""), plain


def _hq_plan(guidance: GuidanceOptions, prompt: PreviewPrompt, *, mode: str, version: str, num_layers: int) -> SamplingPlan:
    """res_2s along levels whose shift is that of the stage's own size; what the user sets wins here too."""
    usual = make_plan(guidance, prompt, mode=mode, version=version, num_layers=num_layers, scales=HQ, steps=HQ_STEPS)
    sigmas = usual.sigmas
    if guidance.sample_scheduler == "ltx2":
        sigmas = ltx2_sigmas(usual.steps, token_count(prompt, usual.streams[0]))
    return dataclasses.replace(usual, sigmas=sigmas, sampler="res_2s")


def _check_inputs(pipeline: Pipeline, prompt: PreviewPrompt, mode: str) -> None:
    inputs = prompt.inputs
    if pipeline == "ic_lora" and inputs.reference is None:
        raise UserError(
            f"{prompt.where}: --pipeline ic_lora shows a reference: give it by --v FILE in the prompt, or by --reference_video."
        )
    if pipeline == "keyframes" and not (inputs.keyframes or inputs.keyframes_in_place or inputs.image or inputs.end_image):
        raise UserError(f"{prompt.where}: --pipeline keyframes goes from picture to picture: give them by --k, --i or --ei in the prompt.")
    if pipeline in TWO_STAGES and mode == "audio":
        raise UserError(f"--pipeline {pipeline}: doubles the size of pictures, and --ltx_mode audio makes none. Use one_stage.")


def _all_beside(prompt: PreviewPrompt) -> PreviewPrompt:
    """Every picture beside the clip, and none in its place."""
    inputs = prompt.inputs
    pictures = dict((*inputs.keyframes_in_place, *inputs.keyframes))
    if inputs.image is not None:
        pictures[0] = inputs.image
    strengths = dict((*inputs.strengths, *inputs.strengths_beside)) | ({0: inputs.image_strength} if inputs.image is not None else {})
    beside = dataclasses.replace(
        inputs,
        image=None,
        image_strength=1.0,
        keyframes=tuple(sorted(pictures.items())),
        keyframes_in_place=(),
        strengths=tuple(sorted(strengths.items())),
        strengths_beside=(),
    )
    return dataclasses.replace(prompt, inputs=beside)


def _without_reference(prompt: PreviewPrompt) -> PreviewPrompt:
    return dataclasses.replace(prompt, inputs=dataclasses.replace(prompt.inputs, reference=None, reference_audio=None))


def _halved(prompt: PreviewPrompt) -> PreviewPrompt:
    inputs: ConditioningInputs = prompt.inputs
    whole = 2 * SPATIAL_SCALE
    areas = [("--w and --h", (prompt.width, prompt.height))]
    areas += [(flag, dataclasses.astuple(area)) for flag, area in (("--box", inputs.box), ("--crop", inputs.crop)) if area is not None]
    for flag, numbers in areas:
        if any(number % whole for number in numbers):
            raise UserError(
                f"{prompt.where}: {flag} {'x'.join(map(str, numbers)) if flag == '--w and --h' else ','.join(map(str, numbers))}: must be "
                f"multiples of {whole}, as the first of two stages works at half of it."
            )
    return dataclasses.replace(
        prompt,
        width=prompt.width // 2,
        height=prompt.height // 2,
        inputs=dataclasses.replace(inputs, box=_half(inputs.box), crop=_half(inputs.crop)),
    )


def _half(area: Rectangle | None) -> Rectangle | None:
    return None if area is None else Rectangle(*(number // 2 for number in dataclasses.astuple(area)))
