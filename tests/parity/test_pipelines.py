"""Whole pipelines against the official loops and conditioning (ltx-pipelines 1.0.0 on ltx-core 1.0.0): the same noise, the same latents.

The tiny 2.3 model, float32. Stages are ours (`generation.pipelines`), and each is run a second time by the official code on its inputs.
"""

import dataclasses
import importlib.machinery
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from musubi_tuner.conditioning.conditions import Conditions, KeyframeLatents, Reference, StreamConditions
from musubi_tuner.config.generation import PipelineOptions
from musubi_tuner.config.preview import GuidanceOptions
from musubi_tuner.flow.res_2s import normal_noise
from musubi_tuner.flow.schedule import STOCHASTIC_SEED_OFFSET
from musubi_tuner.generation.denoise import SampledLatents, SampleInputs, generate
from musubi_tuner.generation.encode import TEXT_ALONE, ConditioningLatents, audio_steps, mask_of_cells
from musubi_tuner.generation.pipelines import Stage, make_stages
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.prompts.prompt import ConditioningInputs, PreviewPrompt
from musubi_tuner.runtime.draws import generator_for
from tests import preview_parts as parts
from tests.parity.test_sampling_loop import official_model

TOLERANCE = 1e-5
WIDTH, HEIGHT, FRAMES = 128, 64, 17


@pytest.fixture(scope="module")
def official() -> Iterator[types.SimpleNamespace]:
    """The official parts. They import torchaudio; nothing of it is called here."""
    pytest.importorskip("ltx_core")
    module = types.ModuleType("torchaudio")
    module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    stands_in = sys.modules.setdefault("torchaudio", module) is module
    try:
        samplers = pytest.importorskip("ltx_pipelines.utils.samplers")
        from ltx_core.components import diffusion_steps, guiders
        from ltx_core.conditioning import types as conditioning
        from ltx_core.model.transformer.model import X0Model
        from ltx_core.types import VideoPixelShape
        from ltx_pipelines.utils import helpers
        from ltx_pipelines.utils.types import PipelineComponents

        yield types.SimpleNamespace(
            samplers=samplers, helpers=helpers, steps=diffusion_steps, guiders=guiders, conditioning=conditioning, X0Model=X0Model,
            VideoPixelShape=VideoPixelShape, PipelineComponents=PipelineComponents,
        )  # fmt: skip
    finally:
        if stands_in:
            sys.modules.pop("torchaudio", None)


@pytest.fixture(scope="module")
def models(tiny_family, official):
    checkpoint = open_checkpoint(tiny_family.ltx23)
    transformer = load_transformer(checkpoint, mode="av", device="cpu", dtype=torch.float32, timestep_rule="cross")  # of 1.0.0
    ours = OfficialLTXV2Wrapper(transformer, "sd3_0_1")
    return ours, official.X0Model(official_model(tiny_family.ltx23))


class OurNoise:
    """The official noiser, with our draws; tokens behind the clip that are noisy in part get ours too."""

    def __init__(self, prompt: PreviewPrompt, kind: str) -> None:
        self._prompt, self._kind, self._streams = prompt, kind, iter(("video", "audio"))

    def __call__(self, state, noise_scale: float = 1.0):
        generator = generator_for(self._prompt.seed, self._kind, next(self._streams))
        noise = torch.randn(state.latent.shape, generator=generator)
        mask = state.denoise_mask * noise_scale
        return dataclasses.replace(state, latent=noise * mask + state.latent * (1 - mask))


def run_official(official, model, widths, stage: Stage, inputs: SampleInputs, items: list, start: SampledLatents | None) -> SampledLatents:
    prompt, plan, helpers = stage.prompt, stage.plan, official.helpers
    (video, audio), negative = inputs.positive.text.split(widths, dim=-1), (None, None)
    if inputs.negative is not None:
        negative = inputs.negative.text.split(widths, dim=-1)
    if plan.needs_negative or plan.needs_perturbed or plan.needs_isolated:
        params = [
            official.guiders.MultiModalGuiderParams(
                cfg_scale=scales.cfg, stg_scale=scales.stg, rescale_scale=scales.rescale, modality_scale=scales.modality,
                stg_blocks=list(plan.stg_blocks),
            )
            for scales in (plan.video, plan.audio)
        ]  # fmt: skip
        guiders = [official.guiders.MultiModalGuider(one, context) for one, context in zip(params, negative, strict=True)]
        predict = helpers.multi_modal_guider_denoising_func(*guiders, v_context=video, a_context=audio, transformer=model)
    else:
        predict = helpers.simple_denoising_func(video, audio, model)

    def loop(sigmas, video_state, audio_state, stepper):
        if plan.sampler != "res_2s":
            return official.samplers.euler_denoising_loop(sigmas, video_state, audio_state, stepper, predict)
        draws = {
            (half, name): generator_for(prompt.seed + STOCHASTIC_SEED_OFFSET, "res_2s", half, name)
            for half in ("middle", "end")
            for name in ("video", "audio")
        }
        ours = ((half, name) for _ in range(plan.steps) for half in ("middle", "end") for name in ("video", "audio"))
        return official.samplers.res2s_audio_video_denoising_loop(
            sigmas, video_state, audio_state, stepper, predict, model_dtype=torch.float32,
            new_noise_fn=lambda latent, _: normal_noise(latent.shape, draws[next(ours)]),
        )  # fmt: skip

    stepper = official.steps.Res2sDiffusionStep() if plan.sampler == "res_2s" else official.steps.EulerDiffusionStep()
    states = helpers.denoise_audio_video(
        output_shape=official.VideoPixelShape(batch=1, frames=prompt.frames, width=prompt.width, height=prompt.height, fps=prompt.fps),
        conditionings=items,
        noiser=OurNoise(prompt, "preview" if start is None else "refine"),
        sigmas=plan.sigmas,
        stepper=stepper,
        denoising_loop_fn=loop,
        components=official.PipelineComponents(dtype=torch.float32, device=torch.device("cpu")),
        dtype=torch.float32,
        device=torch.device("cpu"),
        noise_scale=float(plan.sigmas[0]),
        initial_video_latent=None if start is None else start.video,
        initial_audio_latent=None if start is None else start.audio,
    )
    return SampledLatents(video=states[0].latent, audio=states[1].latent)


def inputs_of(wrapper, stage: Stage, conditioning: ConditioningLatents) -> SampleInputs:
    negative = parts.context(wrapper, 1) if stage.plan.needs_negative else None
    return SampleInputs(
        prompt=stage.prompt, plan=stage.plan, positive=parts.context(wrapper, 0), negative=negative, conditioning=conditioning
    )


def compare(official, models, stages: list[Stage], conditioned: list[tuple[ConditioningLatents, list]]) -> None:
    """Both run each stage from what ours made of the stage before, doubled plainly: the upsampler has a test of its own."""
    wrapper, model = models
    widths = (wrapper.config.video_context_width, wrapper.config.audio_context_width)
    before = None
    for stage, (conditioning, items) in zip(stages, conditioned, strict=True):
        inputs = inputs_of(wrapper, stage, conditioning)
        start = None
        if stage.refines:
            assert before is not None
            start = SampledLatents(video=before.video.repeat_interleave(2, -1).repeat_interleave(2, -2), audio=before.audio)
        ours = generate(wrapper, inputs, start=start)
        with torch.inference_mode():
            theirs = run_official(official, model, widths, stage, inputs, items, start)
        for name in ("video", "audio"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert (mine - other).abs().max() <= TOLERANCE * other.abs().max().clamp(min=1), (stage.prompt.width, name)
        before = ours


def prompt(**inputs: object) -> PreviewPrompt:
    return parts.prompt(width=WIDTH, height=HEIGHT, frames=FRAMES, inputs=ConditioningInputs(**inputs))


def stages_of(pipeline: str, wrapper, of_prompt: PreviewPrompt, steps: int) -> list[Stage]:
    found = make_stages(
        pipeline, of_prompt, GuidanceOptions(sample_steps=steps), PipelineOptions(), mode="av", version="2.3",
        num_layers=wrapper.config.num_layers,
    )  # fmt: skip
    return list(found)


@pytest.mark.parametrize(("pipeline", "steps"), [("one_stage", 8), ("two_stage", 8), ("distilled", 8), ("hq", 4)])
def test_pipelines_from_text(official, models, pipeline, steps):
    stages = stages_of(pipeline, models[0], prompt(), steps)
    compare(official, models, stages, [(TEXT_ALONE, [])] * len(stages))


def picture(stage: Stage, seed: int) -> torch.Tensor:
    shape = (1, 128, 1, stage.prompt.height // 32, stage.prompt.width // 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("pipeline", ["two_stage", "hq"])
def test_a_first_image_in_place(official, models, pipeline, strength):
    stages, conditioned = stages_of(pipeline, models[0], prompt(), 4), []
    for stage in stages:
        latents = torch.zeros(1, 128, 3, stage.prompt.height // 32, stage.prompt.width // 32)
        latents[:, :, :1] = picture(stage, 5)
        tokens = latents[0, 0].numel() // 3
        clean = (torch.arange(3 * tokens) < tokens)[None]
        own = StreamConditions(clean=clean, strength=torch.full(clean.shape, strength))
        item = official.conditioning.VideoConditionByLatentIndex(latent=picture(stage, 5), strength=strength, latent_idx=0)
        conditioned.append((ConditioningLatents(video=latents, conditions=Conditions(video=own)), [item]))
    compare(official, models, stages, conditioned)


class OnePicture:
    """A keyframe that lasts one frame, as in v1.2; in 1.0.0 all after the first last eight."""

    def __init__(self, item) -> None:
        self._item = item

    def apply_to(self, latent_state, latent_tools):
        state = self._item.apply_to(latent_state, latent_tools)
        times = state.positions[:, 0, latent_state.latent.shape[1] :]
        times[..., 1] = times[..., 0] + 1 / latent_tools.fps
        return state


def test_keyframes_beside_the_clip(official, models):
    """Frame 0 at full strength, the last one at half of it."""
    stages, conditioned = stages_of("two_stage", models[0], prompt(), 4), []
    for stage in stages:
        pictures = [picture(stage, seed) for seed in (6, 7)]
        frames, strengths = torch.tensor([[0, FRAMES - 1]]), torch.tensor([[1.0, 0.5]])
        beside = KeyframeLatents(latents=torch.cat(pictures, dim=2), frames=frames, fps=torch.tensor([24.0]), strengths=strengths)
        items = [
            OnePicture(official.conditioning.VideoConditionByKeyframeIndex(keyframes=one, frame_idx=int(frame), strength=float(share)))
            for one, frame, share in zip(pictures, frames[0], strengths[0], strict=True)
        ]
        conditioned.append((ConditioningLatents(conditions=Conditions(video=StreamConditions(keyframes=beside))), items))
    compare(official, models, stages, conditioned)


@pytest.mark.parametrize(("factor", "strength"), [(1, 1.0), (2, 0.7)])
def test_a_reference_of_an_ic_lora(official, models, factor, strength):
    stages = [dataclasses.replace(stage) for stage in stages_of("distilled", models[0], prompt(), 8)]
    first, second = stages
    size = (1, 128, 3, first.prompt.height // 32 // factor or 1, first.prompt.width // 32 // factor)
    latents = torch.randn(size, generator=torch.Generator().manual_seed(8))
    reference = Reference(latents=latents, fps=torch.tensor([24.0]), spatial_factor=factor, strength=strength)
    item = official.conditioning.VideoConditionByReferenceLatent(latent=latents, downscale_factor=factor, strength=strength)
    shown = ConditioningLatents(conditions=Conditions(video=StreamConditions(reference=reference)))
    compare(official, models, [first, second], [(shown, [item]), (TEXT_ALONE, [])])


@pytest.mark.parametrize("by_token", [False, True])
def test_how_strongly_a_reference_is_attended_to(official, models, by_token):
    """With a keyframe before it, which does not see it; strengths of 0, too."""
    first, second = stages_of("distilled", models[0], prompt(), 8)
    latents = torch.randn(1, 128, 3, 1, 2, generator=torch.Generator().manual_seed(8))
    strength = torch.rand(1, 6, generator=torch.Generator().manual_seed(9)) if by_token else torch.full((1, 6), 0.3)
    strength[:, 3:4] *= not by_token
    beside = KeyframeLatents(latents=picture(first, 6), frames=torch.tensor([[0]]), fps=torch.tensor([24.0]))
    items = [
        OnePicture(official.conditioning.VideoConditionByKeyframeIndex(keyframes=picture(first, 6), frame_idx=0, strength=1.0)),
        official.conditioning.ConditioningItemAttentionStrengthWrapper(
            official.conditioning.VideoConditionByReferenceLatent(latent=latents, downscale_factor=1, strength=1.0),
            attention_mask=strength if by_token else 0.3,
        ),
    ]
    reference = Reference(latents=latents, fps=torch.tensor([24.0]), attention=strength)
    shown = ConditioningLatents(conditions=Conditions(video=StreamConditions(reference=reference, keyframes=beside)))
    compare(official, models, [first, second], [(shown, items), (TEXT_ALONE, [])])


def test_a_mask_of_pixels_becomes_one_of_tokens(official):
    from ltx_core.types import VideoLatentShape
    from ltx_pipelines.ic_lora import ICLoraPipeline

    frames = torch.randint(0, 256, (17, 70, 130, 3), generator=torch.Generator().manual_seed(11), dtype=torch.uint8)
    for cells in ((3, 2, 4), (2, 1, 2), (1, 2, 4)):
        mask = (frames.float() / 255).mean(dim=-1)[None, None]
        shape = VideoLatentShape(batch=1, channels=128, frames=cells[0], height=cells[1], width=cells[2])
        theirs = ICLoraPipeline._downsample_mask_to_latent(mask, shape)
        assert (mask_of_cells(frames, cells).flatten()[None] - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("pipeline", ["one_stage", "two_stage"])
def test_sound_that_pictures_are_made_to(official, models, monkeypatch, pipeline):
    """As v1.2: a stream that is frozen has noise level 0 in everything, and the negative pass keeps its prompt."""
    wrapper, model = models
    plain = official.helpers.modality_from_latent_state

    def frozen_at_zero(state, context, sigma, enabled=True):
        return plain(state, context, sigma * bool(state.denoise_mask.any()), enabled)

    monkeypatch.setattr(official.helpers, "modality_from_latent_state", frozen_at_zero)
    widths = (wrapper.config.video_context_width, wrapper.config.audio_context_width)
    stages, before = stages_of(pipeline, wrapper, prompt(), 4), None
    steps = audio_steps(stages[0].prompt)
    sound = torch.randn(1, 8, steps, 16, generator=torch.Generator().manual_seed(10))
    conditioning = ConditioningLatents(
        audio=sound, conditions=Conditions(audio=StreamConditions(clean=torch.ones(1, steps, dtype=torch.bool)))
    )
    for stage in stages:
        inputs = inputs_of(wrapper, stage, conditioning)
        start = None
        if stage.refines:
            start = SampledLatents(video=before.video.repeat_interleave(2, -1).repeat_interleave(2, -2), audio=sound)
        ours = generate(wrapper, inputs, start=start)
        with torch.inference_mode():
            theirs = official_from_sound(official, model, widths, stage, inputs, sound, start)
        assert torch.equal(ours.audio, sound)
        assert (ours.video - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp(min=1), stage.prompt.width
        before = ours


def official_from_sound(official, model, widths, stage: Stage, inputs: SampleInputs, sound, start: SampledLatents | None):
    prompt, scales, helpers = stage.prompt, stage.plan.video, official.helpers
    video, audio = inputs.positive.text.split(widths, dim=-1)
    predict = helpers.simple_denoising_func(video, audio, model)
    if inputs.negative is not None:
        guiders, none = official.guiders, official.guiders.MultiModalGuiderParams()
        params = guiders.MultiModalGuiderParams(
            cfg_scale=scales.cfg, stg_scale=scales.stg, rescale_scale=scales.rescale, modality_scale=scales.modality,
            stg_blocks=list(stage.plan.stg_blocks),
        )  # fmt: skip
        both = [guiders.MultiModalGuider(params, inputs.negative.text.split(widths, dim=-1)[0]), guiders.MultiModalGuider(none)]
        predict = helpers.multi_modal_guider_denoising_func(*both, v_context=video, a_context=audio, transformer=model)
    state = helpers.denoise_video_only(
        output_shape=official.VideoPixelShape(batch=1, frames=prompt.frames, width=prompt.width, height=prompt.height, fps=prompt.fps),
        conditionings=[],
        noiser=OurNoise(prompt, "preview" if start is None else "refine"),
        sigmas=stage.plan.sigmas,
        stepper=official.steps.EulerDiffusionStep(),
        denoising_loop_fn=lambda sigmas, v, a, stepper: official.samplers.euler_denoising_loop(sigmas, v, a, stepper, predict),
        components=official.PipelineComponents(dtype=torch.float32, device=torch.device("cpu")),
        dtype=torch.float32,
        device=torch.device("cpu"),
        noise_scale=float(stage.plan.sigmas[0]),
        initial_video_latent=None if start is None else start.video,
        initial_audio_latent=sound,
    )
    return state.latent


def test_the_upsampler(official, tiny_family):
    """diffusers' network in our statistics against the official one in its own."""
    from ltx_core.model.upsampler.model import LatentUpsampler as Theirs

    from musubi_tuner.ltxv2.autoencoders.components import MEAN, STD
    from musubi_tuner.ltxv2.autoencoders.upsampler import LatentUpsampler
    from musubi_tuner.ltxv2.autoencoders.video_vae import vae_names

    checkpoint, vae = open_checkpoint(tiny_family.upsampler), open_checkpoint(tiny_family.ltx23)
    theirs = Theirs(in_channels=128, mid_channels=32, num_blocks_per_stage=1, rational_resampler=True)
    theirs.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names()}, strict=True)
    names = vae_names(vae)
    mean, std = (vae.tensor(names[name]).float().view(1, -1, 1, 1, 1) for name in (MEAN, STD))
    latents = torch.randn(1, 128, 3, 2, 4, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        wanted = (theirs.eval()(latents * std + mean) - mean) / std
    found = LatentUpsampler.load(checkpoint, vae, device="cpu", dtype=torch.float32)(latents)
    assert found.shape == (1, 128, 3, 4, 8)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)
