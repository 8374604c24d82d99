"""One stage of all clips: one load of the model, tried for the largest of them, and every clip that has not come so far is sampled."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from musubi_tuner.generation.denoise import SampledLatents, generate
from musubi_tuner.generation.encode import (
    audio_steps,
    token_count,
    video_cells,
)
from musubi_tuner.generation.jobs import Job, LoraUse
from musubi_tuner.generation.setting import Planned, Setting, Tell
from musubi_tuner.generation.unfinished import Unfinished
from musubi_tuner.generation.watching import watching
from musubi_tuner.generation.windows import spans_of
from musubi_tuner.ltxv2.autoencoders.upsampler import LatentUpsampler
from musubi_tuner.ltxv2.geometry import AUDIO_MEL_BINS
from musubi_tuner.memory.sampling_plan import SamplingWork
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.networks.stack import NetworkStack, Strength
from musubi_tuner.placement.adapters import stored_linears
from musubi_tuner.placement.decoding import Need
from musubi_tuner.placement.sampling import SamplingRequest, load_for_sampling
from musubi_tuner.runtime.device import free_memory
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.progress import Progress

log = logging.getLogger(__name__)


def run_stage(number: int, planned: Sequence[Planned], needs: Sequence[Need], unfinished: Unfinished, setting: Setting, tell: Tell) -> None:
    """Sample one stage of every clip that has not come so far; clips that share their networks follow each other."""
    waiting = [one for one in planned if number < len(one.stages) and not unfinished.has(one.job.stem, one.recipe, number)]
    if not waiting:
        return
    title = "sampling" if len(planned[0].stages) == 1 else f"sampling, stage {number + 1} of {len(planned[0].stages)}"
    if already := sum(number < len(one.stages) for one in planned) - len(waiting):
        log.info("%s: %d of %d clips are sampled already, by an earlier run", title, already, already + len(waiting))
    starts = _upsampled(number, waiting, unfinished, setting) if number else {}
    wrapper, stack, weight_format = load_stage(number, waiting, needs, setting)
    for path in dict.fromkeys(path for one in waiting for path, _ in networks_beside(one, number, setting)):
        stack.check(path)
    order = {networks: place for place, networks in enumerate(dict.fromkeys(networks_beside(one, number, setting) for one in waiting))}
    waiting.sort(key=lambda one: order[networks_beside(one, number, setting)])
    total = sum(one.inputs[number].plan.steps for one in waiting)
    with Progress(title, total, unit="step") as bar:
        for one in waiting:
            stack.use(networks_beside(one, number, setting))
            started = time.perf_counter()
            with watching(setting.config, one.job.stem, number + 1) as watch:
                latents = generate(wrapper, one.inputs[number], start=starts.get(one.job), advance=bar.advance, watch=watch)
            unfinished.keep(one.job.stem, one.recipe, number, latents, time.perf_counter() - started, weight_format)
            if number + 1 == len(one.stages):
                tell(one.job, None, unfinished.seconds(one.job.stem, one.recipe, len(one.stages)))
    del wrapper, stack
    free_memory(setting.device)


def load_stage(
    number: int, waiting: Sequence[Planned], needs: Sequence[Need], setting: Setting
) -> tuple[OfficialLTXV2Wrapper, NetworkStack, str]:
    """Planned for the largest of these clips, and tried by a step of it; with the networks that it was tried with in memory, and the format
    of the weights.

    Raises:
        UserError: no plan fits, or none held.
    """
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
    linears = stored_linears(setting.files.transformer)

    def trial(wrapper: OfficialLTXV2Wrapper) -> None:
        inputs = largest.inputs[number]
        one_step = dataclasses.replace(inputs.plan, sigmas=inputs.plan.sigmas[[0, -1]], sampler="euler")
        stack = NetworkStack(wrapper.transformer, setting.dtype, linears)
        stack.use(networks_beside(largest, number, setting))
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
    wrapper, weight_format = load_for_sampling(request, trial)
    return wrapper, tried[0] if tried else NetworkStack(wrapper.transformer, setting.dtype, linears), weight_format


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
        networks_bytes=sum(path.stat().st_size for path, strength in networks_beside(one, number, setting) if strength != Strength(0, 0)),
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


def networks_beside(one: Planned, number: int, setting: Setting) -> tuple[tuple[Path, Strength], ...]:
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
