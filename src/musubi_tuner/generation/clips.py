"""Makes clips: all that can fail is tried first, then each stage of all clips runs with one load of the model, then they are decoded.

Text encoder, encoders, transformer, upsampler and decoders follow each other on the device, and none waits there for another. What a stage
has finished lies on disk (`Unfinished`), so that a run that is stopped goes on where it was.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.generation.contexts import TextContext, encoders_of, load_contexts
from musubi_tuner.generation.decode import decode_samples, try_decoders, write_sample
from musubi_tuner.generation.denoise import SampleInputs
from musubi_tuner.generation.encode import (
    ConditioningEncoders,
    ConditioningLatents,
    audio_steps,
    encode_conditioning,
    generated_spans,
    still_crf,
    video_cells,
)
from musubi_tuner.generation.jobs import Job
from musubi_tuner.generation.networks import check_networks
from musubi_tuner.generation.pipelines import Stage, make_stages, without_effect
from musubi_tuner.generation.recipe import Recipe, recipe_of
from musubi_tuner.generation.setting import Planned, Setting, Tell
from musubi_tuner.generation.stages import run_stage
from musubi_tuner.generation.unfinished import FOLDER, Unfinished
from musubi_tuner.generation.used import used_by
from musubi_tuner.generation.windows import WindowSize
from musubi_tuner.ltxv2.geometry import latent_frames
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.media.audio import Waveform
from musubi_tuner.memory.card import cap_device_memory
from musubi_tuner.memory.card import free_memory as free_memory_of_card
from musubi_tuner.memory.compiling import first_line
from musubi_tuner.placement.decoding import Need, needs_after_sampling
from musubi_tuner.prompts.prompt import PreviewPrompt
from musubi_tuner.runtime.device import free_memory
from musubi_tuner.runtime.errors import TemporaryFailure
from musubi_tuner.runtime.progress import Progress

log = logging.getLogger(__name__)

_OVERLAP = 4
"""Part of a window that it shares with the next one, where nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class Made:
    """A clip that is there."""

    job: Job
    path: Path
    seconds: float
    """Of sampling; 0 where it was there before."""


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
        planned, needs = prepare(missing, recipes, setting, setting.factors_of(jobs))
        with _told_when_interrupted(unfinished):
            for number in range(max(len(one.stages) for one in planned)):
                run_stage(number, planned, needs, unfinished, setting, tell)
        seconds = {one.job: unfinished.seconds(one.job.stem, one.recipe, len(one.stages)) for one in planned}
        with _told_when_interrupted(unfinished):
            there |= _decode(planned, unfinished, setting, lambda job, path: tell(job, path, seconds[job]))
    return [Made(job, there[job], seconds.get(job, 0.0)) for job in jobs]


def recipes_of(jobs: Sequence[Job], setting: Setting) -> dict[Job, Recipe]:
    """What each clip is made from.

    Args:
        jobs: all of a run.

    Raises:
        UserError: a file that cannot be read.
    """
    model, encoders = setting.model, encoders_of({job.prompt.prompt for job in jobs}, setting.texts)
    factors = setting.factors_of(jobs)
    return {job: recipe_of(job, setting.config, model, encoders[job.prompt.prompt], factors) for job in jobs}


def prepare(
    jobs: Sequence[Job], recipes: Mapping[Job, Recipe], setting: Setting, factors: tuple[int, int] = (1, 1)
) -> tuple[list[Planned], list[Need]]:
    """Stages, contexts and conditioning of each clip, and what comes after the transformer; every file is looked at.

    Args:
        factors: how many times smaller and slower references are.

    Raises:
        UserError: anything that cannot be used.
    """
    config, files = setting.config, setting.files
    transformer, version, mode = read_config(files.transformer), detect_version(files.transformer), config.model.ltx_mode
    stages = {
        job: make_stages(
            config.pipeline.pipeline, job.prompt, job.guidance, config.pipeline, mode=mode, version=version,
            num_layers=transformer.num_layers,
        )
        for job in jobs
    }  # fmt: skip
    check_networks(stages, setting)
    for line in dict.fromkeys(f"{job.prompt.where}: generated are {span}" for job in jobs for span in generated_spans(job.prompt)):
        log.info(line)
    pipeline = config.pipeline.pipeline
    idle = {tuple(without_effect(pipeline, job.prompt, job.guidance)): job.prompt.where for job in reversed(jobs)}
    for flags, where in idle.items():
        if flags:
            log.warning("WARNING: %s: --pipeline %s has fixed steps and no guidance; without effect: %s", where, pipeline, ", ".join(flags))
    every = [stage for of_job in stages.values() for stage in of_job]
    try_decoders(files.vae, files.audio_vae, {stream for stage in every for stream in stage.plan.streams})
    needs = _needs_after(list(stages.values()), setting)
    texts = [stage.prompt.prompt for stage in every]
    texts += [stage.prompt.negative for stage in every if stage.plan.needs_negative]
    both = transformer.video_context_width + transformer.audio_context_width
    widths = (transformer.video_context_width, both) if mode == "video" else (both,)
    contexts = load_contexts(list(dict.fromkeys(texts)), setting.texts, widths=widths)
    free_memory(setting.device)
    encoders = ConditioningEncoders(files.vae, files.audio_vae, setting.device, reference_factors=factors, still_crf=still_crf(version))
    encoded: dict[tuple[PreviewPrompt, tuple[str, ...]], ConditioningLatents] = {}
    planned = []
    for job in jobs:
        inputs = tuple(_inputs(stage, contexts, encoders, encoded, _window(config)) for stage in stages[job])
        layers = transformer.num_layers
        used = used_by(stages[job], pipeline, version=version, num_layers=layers, dtype=setting.dtype)
        planned.append(Planned(job, Recipe({**recipes[job].facts, "used": used}), stages[job], inputs))
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
            formats = unfinished.weight_formats(one.job.stem, one.recipe, len(one.stages))
            recipe = Recipe({**one.recipe.facts, "used": {**one.recipe.facts["used"], "weight_formats": formats}})
            paths[one.job] = write_sample(stem, one.job.prompt, frames, sound, recipe.text)
            unfinished.remove(one.job.stem, one.recipe)
            written(one.job, paths[one.job])
            bar.advance()
    return paths


@contextmanager
def _told_when_interrupted(unfinished: Unfinished) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        kept = unfinished.folder / FOLDER
        if kept.is_dir() and any(kept.iterdir()):
            log.info("stopped; clips that are done stay, and stages that are sampled are kept in %s: the same command goes on there", kept)
        else:
            log.info("stopped; clips that are done stay. The stage that was being sampled is begun again by the same command")
        raise


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
    return read_audio(path, info, info.origin, info.origin + prompt.seconds)
