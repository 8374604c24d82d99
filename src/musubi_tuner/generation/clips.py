"""Makes clips: all that can fail is tried first, then each stage of all clips runs with one load of the model, then they are decoded.

Text encoder, encoders, transformer, upsampler and decoders follow each other on the device, and none waits there for another. What a stage
has finished lies on disk (`Unfinished`), so that a run that is stopped goes on where it was.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.generation.contexts import TextContext, TextSource, encoders_of, load_contexts
from musubi_tuner.generation.decode import decode_samples, try_decoders, write_sample
from musubi_tuner.generation.denoise import SampledLatents, SampleInputs, generate
from musubi_tuner.generation.encode import (
    ConditioningEncoders,
    ConditioningLatents,
    audio_steps,
    encode_conditioning,
    still_crf,
    token_count,
    video_cells,
)
from musubi_tuner.generation.jobs import Job, LoraUse, reference_factors
from musubi_tuner.generation.pipelines import TWO_STAGES, WITH_DISTILLED_LORA, Stage, make_stages
from musubi_tuner.generation.prepare import ModelFiles
from musubi_tuner.generation.recipe import Recipe, model_identity, recipe_of
from musubi_tuner.generation.unfinished import FOLDER, Unfinished
from musubi_tuner.generation.watching import watching
from musubi_tuner.generation.windows import WindowSize, spans_of
from musubi_tuner.ltxv2.autoencoders.upsampler import LatentUpsampler, upsampler_config
from musubi_tuner.ltxv2.geometry import AUDIO_MEL_BINS, latent_frames
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.media.audio import Waveform
from musubi_tuner.memory.card import cap_device_memory
from musubi_tuner.memory.card import free_memory as free_memory_of_card
from musubi_tuner.memory.compiling import first_line
from musubi_tuner.memory.sampling_plan import SamplingWork
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.networks.reading import newest_file
from musubi_tuner.networks.stack import NetworkStack, Strength
from musubi_tuner.placement.decoding import Need, needs_after_sampling
from musubi_tuner.placement.sampling import SamplingRequest, load_for_sampling
from musubi_tuner.prompts.prompt import PreviewPrompt
from musubi_tuner.runtime.device import compute_dtype, free_memory
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.progress import Progress

log = logging.getLogger(__name__)

_OVERLAP = 4
"""Part of a window that it shares with the next one, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all clips of a run share."""

    config: GenerateConfig
    files: ModelFiles
    texts: TextSource
    device: torch.device
    upsampler: Checkpoint | None
    """Between two stages."""
    distilled_lora: Path | None

    @property
    def model(self) -> dict[str, str]:
        """What recipes know it by."""
        return model_identity(self.files.transformer, self.files.vae, self.files.audio_vae, self.config.model.ltx_mode)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.device)


@dataclass(frozen=True, slots=True)
class Planned:
    """One clip with all that it is made from."""

    job: Job
    recipe: Recipe
    stages: tuple[Stage, ...]
    inputs: tuple[SampleInputs, ...]
    """Of each stage."""


@dataclass(frozen=True, slots=True)
class Made:
    """A clip that is there."""

    job: Job
    path: Path
    seconds: float
    """Of sampling; 0 where it was there before."""


Tell = Callable[[Job, Path | None, float], None]
"""Told of each clip that has come further: its path, None where it waits to be decoded, and the seconds of its sampling."""


def make_clips(jobs: Sequence[Job], setting: Setting, tell: Tell = lambda job, path, seconds: None) -> list[Made]:
    """The clips of `jobs`, in their order; those that are there already with the same recipe are kept.

    Args:
        tell: called when a clip is found, sampled or written.

    Raises:
        UserError: anything that cannot be used; before the transformer is loaded, where it can be known by then.
    """
    folder = setting.config.clips.output_dir
    recipes = recipes_of(jobs, setting)
    unfinished = Unfinished(folder)
    unfinished.open()
    there = {job: path for job in jobs if (path := unfinished.finished(job.stem, recipes[job])) is not None}
    for job, path in there.items():
        unfinished.remove(job.stem, recipes[job])
        tell(job, path, 0.0)
    missing = [job for job in jobs if job not in there]
    seconds: dict[Job, float] = {}
    if missing:
        cap_device_memory(setting.device, setting.config.memory.vram_gb)
        planned, needs = _prepare(missing, recipes, setting)
        for number in range(max(len(one.stages) for one in planned)):
            _run_stage(number, planned, needs, unfinished, setting, tell)
        seconds = {one.job: unfinished.seconds(one.job.stem, one.recipe, len(one.stages)) for one in planned}
        there |= _decode(planned, unfinished, setting, lambda job, path: tell(job, path, seconds[job]))
    return [Made(job, there[job], seconds.get(job, 0.0)) for job in jobs]


def recipes_of(jobs: Sequence[Job], setting: Setting) -> dict[Job, Recipe]:
    """What each clip is made from.

    Raises:
        UserError: a file that cannot be read.
    """
    model, encoders = setting.model, encoders_of({job.prompt.prompt for job in jobs}, setting.texts)
    return {job: recipe_of(job, setting.config, model, encoders[job.prompt.prompt]) for job in jobs}


def _prepare(jobs: Sequence[Job], recipes: Mapping[Job, Recipe], setting: Setting) -> tuple[list[Planned], list[Need]]:
    """Stages, contexts and conditioning of each clip, and what comes after the transformer; every file is looked at."""
    config, files = setting.config, setting.files
    transformer, version, mode = read_config(files.transformer), detect_version(files.transformer), config.model.ltx_mode
    stages = {
        job: make_stages(
            config.pipeline.pipeline, job.prompt, job.guidance, config.pipeline, mode=mode, version=version,
            num_layers=transformer.num_layers,
        )
        for job in jobs
    }  # fmt: skip
    every = [stage for of_job in stages.values() for stage in of_job]
    try_decoders(files.vae, files.audio_vae, {stream for stage in every for stream in stage.plan.streams})
    needs = _needs_after(list(stages.values()), setting)
    texts = [stage.prompt.prompt for stage in every]
    texts += [stage.prompt.negative for stage in every if stage.plan.needs_negative]
    both = transformer.video_context_width + transformer.audio_context_width
    widths = (transformer.video_context_width, both) if mode == "video" else (both,)
    contexts = load_contexts(list(dict.fromkeys(texts)), setting.texts, widths=widths)
    free_memory(setting.device)
    encoders = ConditioningEncoders(
        files.vae, files.audio_vae, setting.device, reference_factors=reference_factors(jobs), still_crf=still_crf(version)
    )
    encoded: dict[tuple[PreviewPrompt, tuple[str, ...]], ConditioningLatents] = {}
    planned = []
    for job in jobs:
        inputs = tuple(_inputs(stage, contexts, encoders, encoded, _window(config)) for stage in stages[job])
        planned.append(Planned(job, recipes[job], stages[job], inputs))
    encoders.close()
    return planned, needs


def _needs_after(stages: Sequence[tuple[Stage, ...]], setting: Setting) -> list[Need]:
    """Of upsampler and decoders, each of which has the card after the transformer; none off a GPU.

    Raises:
        UserError: one of them does not fit.
    """
    if setting.device.type != "cuda":
        return []
    config, last = setting.config, [of_job[-1] for of_job in stages]
    earlier = [stage for of_job in stages for stage in of_job[:-1]]
    room, _ = free_memory_of_card(setting.device, config.memory.vram_gb, config.memory.ram_gb)
    return needs_after_sampling(
        setting.files.vae,
        setting.files.audio_vae,
        setting.upsampler,
        sizes={video_cells(stage.prompt) for stage in last if "video" in stage.plan.streams},
        before={video_cells(stage.prompt) for stage in earlier if "video" in stage.plan.streams},
        steps=max((audio_steps(stage.prompt) for stage in last if "audio" in stage.plan.streams), default=0),
        room=room,
        dtype=setting.dtype,
    )


def _window(config: GenerateConfig) -> WindowSize | None:
    frames, overlap = config.pipeline.window_frames, config.pipeline.window_overlap
    if frames is None:
        return None
    whole = latent_frames(frames)
    return WindowSize(whole, max(1, whole // _OVERLAP) if overlap is None else latent_frames(overlap) - 1)


def _inputs(
    stage: Stage,
    contexts: Mapping[str, TextContext],
    encoders: ConditioningEncoders,
    encoded: dict[tuple[PreviewPrompt, tuple[str, ...]], ConditioningLatents],
    window: WindowSize | None,
) -> SampleInputs:
    """Prompts that differ in text, seed and guidance alone share what their files are encoded to."""
    prompt, plan = stage.prompt, stage.plan
    key = (dataclasses.replace(prompt, index=0, prompt="", negative="", seed=0, steps=None, video_cfg=None, audio_cfg=None), plan.streams)
    if key not in encoded:
        encoded[key] = encode_conditioning(prompt, plan.streams, encoders)
    return SampleInputs(
        prompt=prompt,
        plan=plan,
        positive=contexts[prompt.prompt],
        negative=contexts[prompt.negative] if plan.needs_negative else None,
        conditioning=encoded[key],
        window=window,
    )


def _run_stage(
    number: int, planned: Sequence[Planned], needs: Sequence[Need], unfinished: Unfinished, setting: Setting, tell: Tell
) -> None:
    """Sample one stage of every clip that has not come so far; clips that share their networks follow each other."""
    waiting = [one for one in planned if number < len(one.stages) and not unfinished.has(one.job.stem, one.recipe, number)]
    if not waiting:
        return
    starts = _upsampled(number, waiting, unfinished, setting) if number else {}
    wrapper, stack = _load(number, waiting, needs, setting)
    for path in dict.fromkeys(path for one in waiting for path, _ in _beside(one, number, setting)):
        stack.check(path)
    order = {networks: place for place, networks in enumerate(dict.fromkeys(_beside(one, number, setting) for one in waiting))}
    waiting.sort(key=lambda one: order[_beside(one, number, setting)])
    total = sum(one.inputs[number].plan.steps for one in waiting)
    title = "sampling" if len(planned[0].stages) == 1 else f"sampling, stage {number + 1} of {len(planned[0].stages)}"
    with Progress(title, total, unit="step") as bar:
        for one in waiting:
            stack.use(_beside(one, number, setting))
            started = time.perf_counter()
            with watching(setting.config, one.job.stem, number + 1) as watch:
                latents = generate(wrapper, one.inputs[number], start=starts.get(one.job), advance=bar.advance, watch=watch)
            unfinished.keep(one.job.stem, one.recipe, number, latents, time.perf_counter() - started)
            if number + 1 == len(one.stages):
                tell(one.job, None, unfinished.seconds(one.job.stem, one.recipe, len(one.stages)))
    del wrapper, stack
    free_memory(setting.device)


def _load(number: int, waiting: Sequence[Planned], needs: Sequence[Need], setting: Setting) -> tuple[OfficialLTXV2Wrapper, NetworkStack]:
    """Planned for the largest of these clips, and tried by a step of it; with the networks that it was tried with in memory."""
    config = setting.config
    works = {one.job: _work(one, number, setting) for one in waiting}
    largest = max(waiting, key=lambda one: (works[one.job].video_tokens + works[one.job].audio_tokens, works[one.job].passes))
    work = dataclasses.replace(
        works[largest.job],
        passes=max(one.passes for one in works.values()),
        networks_bytes=max(one.networks_bytes for one in works.values()),
        masked_tokens=max(one.masked_tokens for one in works.values()),
    )

    tried: list[NetworkStack] = []

    def trial(wrapper: OfficialLTXV2Wrapper) -> None:
        inputs = largest.inputs[number]
        one_step = dataclasses.replace(inputs.plan, sigmas=inputs.plan.sigmas[[0, -1]], sampler="euler")
        stack = NetworkStack(wrapper.transformer, setting.dtype)
        stack.use(_beside(largest, number, setting))
        generate(wrapper, dataclasses.replace(inputs, plan=one_step))
        tried.append(stack)

    request = SamplingRequest(
        checkpoint=setting.files.transformer,
        mode=config.model.ltx_mode,
        timestep_format=config.model.ltxv2_timestep_format,
        device=setting.device,
        dtype=setting.dtype,
        memory=config.memory.as_of_training(),
        work=work,
        merged=_networks(largest, number, setting) if config.loras.merge_loras else (),
        beside=tuple(need.row() for need in needs),
    )
    wrapper = load_for_sampling(request, trial)
    return wrapper, tried[0] if tried else NetworkStack(wrapper.transformer, setting.dtype)


def _work(one: Planned, number: int, setting: Setting) -> SamplingWork:
    inputs, plan = one.inputs[number], one.stages[number].plan
    frames, height, width = video_cells(inputs.prompt)
    tokens = {name: token_count(inputs.prompt, name) if name in plan.streams else 0 for name in ("video", "audio")}
    if inputs.window is not None:
        spans = spans_of(frames, audio_steps(inputs.prompt), inputs.prompt.fps, inputs.window)
        longest = {name: max(span[name].end - span[name].start for span in spans) for name in ("video", "audio")}
        tokens = {name: min(count, longest[name] * (height * width if name == "video" else 1)) for name, count in tokens.items()}
    for name in plan.streams:
        conditions = getattr(inputs.conditioning.conditions, name)
        tokens[name] += sum(
            beside.latents[0, 0].numel() for beside in (conditions.reference, conditions.keyframes) if beside is not None
        ) // (1 if name == "video" else AUDIO_MEL_BINS)
    reference = inputs.conditioning.conditions.video.reference
    return SamplingWork(
        video_tokens=tokens["video"],
        audio_tokens=tokens["audio"],
        text_tokens=inputs.positive.text.shape[1],
        passes=1 + plan.needs_negative + plan.needs_perturbed + plan.needs_isolated,
        networks_bytes=sum(path.stat().st_size for path, strength in _beside(one, number, setting) if strength != Strength(0, 0)),
        masked_tokens=0 if reference is None or reference.attention is None else tokens["video"],
    )


def _networks(one: Planned, number: int, setting: Setting) -> tuple[tuple[Path, Strength], ...]:
    stage = one.stages[number]
    uses: tuple[LoraUse, ...] = one.job.loras if stage.with_loras else ()
    networks = [(use.path, use.strength) for use in uses]
    if stage.distilled_lora:
        assert setting.distilled_lora is not None
        networks.append((setting.distilled_lora, Strength(stage.distilled_lora, stage.distilled_lora)))
    return tuple(networks)


def _beside(one: Planned, number: int, setting: Setting) -> tuple[tuple[Path, Strength], ...]:
    """Networks that are not merged: all of them or, as then all clips have the same, none."""
    return () if setting.config.loras.merge_loras else _networks(one, number, setting)


def _upsampled(number: int, waiting: Sequence[Planned], unfinished: Unfinished, setting: Setting) -> dict[Job, SampledLatents]:
    """The latents of the stage before, of the doubled size; sound as it is."""
    assert setting.upsampler is not None
    upsample = LatentUpsampler.load(setting.upsampler, setting.files.vae, device=setting.device, dtype=setting.dtype)
    found = {}
    for one in waiting:
        before = unfinished.read(one.job.stem, one.recipe, number - 1)
        assert before.video is not None
        doubled = upsample(before.video).cpu()
        if not bool(torch.isfinite(doubled).all()):
            raise UserError(
                f"--spatial_upsampler_path {setting.upsampler.path}: makes NaN or infinity of the latents of {one.job.stem}. Its file is "
                "damaged: download it again."
            )
        found[one.job] = SampledLatents(video=doubled, audio=before.audio)
    del upsample
    free_memory(setting.device)
    return found


def _decode(planned: Sequence[Planned], unfinished: Unfinished, setting: Setting, written: Callable[[Job, Path], None]) -> dict[Job, Path]:
    """
    Raises:
        TemporaryFailure: the card has no room for a decoder.
    """
    latents = [unfinished.read(one.job.stem, one.recipe, len(one.stages) - 1) for one in planned]
    paths = {}
    with Progress("decoding", len(planned), unit="clip") as bar, _kept_where_memory_fails(setting):
        decoded = decode_samples(latents, setting.files.vae, setting.files.audio_vae, setting.device)
        for one, (frames, sound) in zip(planned, decoded, strict=True):
            stem = unfinished.free_stem(one.job.stem)
            sound = _own_sound(one.job.prompt) or sound
            paths[one.job] = write_sample(stem, one.job.prompt, frames, sound, one.recipe.text)
            unfinished.remove(one.job.stem, one.recipe)
            written(one.job, paths[one.job])
            bar.advance()
    return paths


@contextmanager
def _kept_where_memory_fails(setting: Setting) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        folder = setting.config.clips.output_dir
        raise TemporaryFailure(
            f"the card ran out of memory while clips were decoded ({first_line(error)}). Nothing that was sampled is lost: it lies in "
            f"{folder / FOLDER}, and the same command goes on from there. Close other programs that hold memory of the card, or decode "
            "on the CPU with --device cpu."
        ) from error


def _own_sound(prompt: PreviewPrompt) -> Waveform | None:
    """The sound that a clip was made to, as its file has it; None where any of it was generated."""
    path = prompt.inputs.audio
    if path is None or prompt.inputs.audio_span is not None or prompt.frames == 1:
        return None
    from musubi_tuner.media.audio import read_audio
    from musubi_tuner.media.probe import probe_audio

    info = probe_audio(path)
    return read_audio(path, info, info.start, info.start + prompt.seconds)


def open_upsampler(config: GenerateConfig) -> Checkpoint | None:
    """Of a pipeline with two stages.

    Raises:
        UserError: none is given, or another file.
    """
    pipeline, path = config.pipeline.pipeline, config.pipeline.spatial_upsampler_path
    if pipeline not in TWO_STAGES:
        return None
    if path is None:
        raise UserError(
            f"--pipeline {pipeline}: needs --spatial_upsampler_path FILE, the latent upsampler (x2) of the model's release. "
            "one_stage and distilled_one_stage work without."
        )
    checkpoint = open_checkpoint(path)
    upsampler_config(checkpoint)
    return checkpoint


def find_distilled_lora(config: GenerateConfig) -> Path | None:
    """Of a pipeline whose second stage needs it.

    Raises:
        UserError: none is given, or it is not there.
    """
    pipeline, path = config.pipeline.pipeline, config.pipeline.distilled_lora
    if pipeline not in WITH_DISTILLED_LORA or config.pipeline.distilled_lora_strength == 0:
        return None
    if path is None:
        raise UserError(
            f"--pipeline {pipeline}: its second stage has three steps, which only a distilled model can do: give --distilled_lora FILE. "
            "If --ltxv2_model is distilled itself, take --pipeline distilled, or --distilled_lora_strength 0."
        )
    if not path.exists():
        raise UserError(f"--distilled_lora {path}: is not there.")
    return newest_file(path)
