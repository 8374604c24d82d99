"""Rollouts from prompts: texts, seeds, samples, files; what is there already is kept."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.cache.names import prompt_path
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.cache.store import joined, read_parts, write_bytes
from musubi_tuner.config.rollouts import RolloutConfig
from musubi_tuner.encoding.jobs import choose
from musubi_tuner.encoding.text import encode_texts, list_prompt_jobs
from musubi_tuner.generation.clips import prepare
from musubi_tuner.generation.denoise import SampledLatents, generate
from musubi_tuner.generation.jobs import Job, chosen_loras, read_prompts
from musubi_tuner.generation.opening import open_setting, text_recipe
from musubi_tuner.generation.pipelines import make_stages
from musubi_tuner.generation.recipe import Recipe, file_hash
from musubi_tuner.generation.setting import Planned, Setting
from musubi_tuner.generation.stages import load_stage
from musubi_tuner.ltxv2.autoencoders.audio_vae import audio_vae_fingerprint
from musubi_tuner.ltxv2.autoencoders.video_vae import video_vae_fingerprint
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.prompts.prompt import ConditioningInputs, PreviewPrompt
from musubi_tuner.reinforcement.rewards.local import reference_sound
from musubi_tuner.reinforcement.rollouts import (
    ROLLOUTS,
    Rollouts,
    Sample,
    context_name,
    is_sound,
    list_samples,
    read_rollouts,
    sound_name,
    source_name,
)
from musubi_tuner.reinforcement.sampling import Recorder, Stochastic, choose_steps
from musubi_tuner.runtime.device import free_memory
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.runtime.progress import Progress
from musubi_tuner.runtime.tables import names_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Made:
    """For the last table."""

    rollouts: Rollouts
    made: int
    kept: int


def make_rollouts(config: RolloutConfig, group: Processes, program: str) -> Made:
    """
    Args:
        program: its name, for messages.

    Raises:
        UserError: prompts that differ in size, texts that are not cached, a folder with rollouts of other settings, or whatever sampling
            raises.
    """
    generation = config.as_of_generation()
    setting = open_setting(generation, program)
    asked = asked_prompts(config)
    prompts = [_without_sound(one) for one in asked]
    sounds = {number: one.inputs.audio for number, one in enumerate(asked) if one.inputs.audio is not None}
    folder = config.rollouts.rl_rollout_cache
    loras = chosen_loras(generation.loras)
    samples = list_samples(
        config.rollouts.rl_seed, config.rollouts.rl_round, [one.prompt for one in prompts], config.rollouts.rl_group_size
    )
    jobs = {
        sample: Job(
            stem=sample.name,
            prompt=dataclasses.replace(prompts[sample.prompt], seed=sample.seed),
            loras=loras,
            guidance=generation.guidance,
        )
        for sample in samples
    }
    rollouts = Rollouts(folder, _facts(config, setting, prompts, sounds, samples))
    if group.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        _check_earlier(rollouts)
        _cache_texts(setting, prompts, rollouts, group)
        for number, sound in sounds.items():
            _keep_sound(sound, folder / sound_name(number, sound))
    group.barrier()
    setting = dataclasses.replace(setting, texts=dataclasses.replace(setting.texts, cache_directory=folder, encode=None))
    faults = {sample: fault for sample in samples if (fault := rollouts.fault_of(sample, steps=True)) is not None}
    missing = list(faults)
    if group.is_main and (bad := [fault for fault in faults.values() if not fault.endswith("missing")]):
        log.warning("WARNING: %s: %d samples are made again: %s", folder, len(bad), names_of(bad, 3))
    mine = group.share(missing)
    group.barrier()  # nobody writes while another still looks
    if mine:
        planned, needs = prepare([jobs[sample] for sample in mine], {jobs[sample]: Recipe({}) for sample in mine}, setting)
        _sample(mine, planned, needs, setting, config, rollouts, shown=group.is_main)
    group.barrier()
    if group.is_main:
        rollouts.write()
    group.barrier()
    return Made(rollouts, made=len(missing), kept=len(samples) - len(missing))


def asked_prompts(config: RolloutConfig, named: str = "--rl_prompts") -> tuple[PreviewPrompt, ...]:
    """As they are written, each with its sound.

    Args:
        named: the flag that gives the file, for messages.

    Raises:
        UserError: a file that cannot be read, or prompts that differ in size, repeat each other or ask for what rollouts have not.
    """
    prompts = read_prompts(config.as_of_generation(), named)
    _check(prompts, config)
    return prompts


def stochastic_of(config: RolloutConfig, prompt: int, steps: int) -> Stochastic | None:
    """Which steps of a prompt's samples are drawn; None where all are the sampler's own."""
    options = config.stochastic
    if options.rl_sde_type == "none":
        return None
    streams = options.streams(config.model.ltx_mode)
    chosen = choose_steps(
        f"{config.rollouts.rl_seed}|{config.rollouts.rl_round}|{prompt}|steps", options.window, options.rl_sde_steps, steps
    )
    return Stochastic(kind=options.rl_sde_type, level=options.rl_sde_eta, streams=streams, steps=chosen)


def _sample(
    samples: Sequence[Sample],
    planned: Sequence[Planned],
    needs: Sequence[Any],
    setting: Setting,
    config: RolloutConfig,
    rollouts: Rollouts,
    *,
    shown: bool,
) -> None:
    encoders = {"latents": video_vae_fingerprint(setting.files.vae)}
    if config.model.ltx_mode == "av":
        encoders["audio"] = audio_vae_fingerprint(setting.files.audio_vae)
    wrapper, stack, _ = load_stage(0, planned, needs, setting)
    stack.use(tuple((use.path, use.strength) for use in planned[0].job.loras))
    with Progress("rollouts", len(samples), unit="sample", shown=shown) as bar:
        for sample, one in zip(samples, planned, strict=True):
            recorder = Recorder(stochastic_of(config, sample.prompt, one.inputs[0].plan.steps))
            latents: SampledLatents = generate(wrapper, one.inputs[0], solve=recorder)
            assert latents.video is not None
            audio = None if latents.audio is None else latents.audio[0]
            rollouts.write_sample(sample, latents.video[0], audio, recorder.steps(), encoders)
            bar.advance()
    del wrapper, stack
    free_memory(setting.device)


def _facts(
    config: RolloutConfig, setting: Setting, prompts: Sequence[PreviewPrompt], sounds: Mapping[int, Path], samples: Sequence[Sample]
) -> dict[str, Any]:
    options, stochastic, first = config.rollouts, config.stochastic, prompts[0]
    policy = None
    if options.rl_policy is not None:
        if not options.rl_policy.is_file():
            raise UserError(f"--rl_policy {options.rl_policy}: not found.")
        policy = {"name": options.rl_policy.name, "sha256": file_hash(options.rl_policy)}
    drawn = None
    if stochastic.rl_sde_type != "none":
        chosen = stochastic_of(config, 0, 10)
        assert chosen is not None
        drawn = {
            "kind": chosen.kind, "level": chosen.level, "streams": list(chosen.streams), "window": list(stochastic.window),
            "steps": stochastic.rl_sde_steps,
        }  # fmt: skip
    (stage,) = make_stages(
        setting.config.pipeline.pipeline,
        first,
        config.guidance,
        setting.config.pipeline,
        mode=config.model.ltx_mode,
        version=detect_version(setting.files.transformer),
        num_layers=read_config(setting.files.transformer).num_layers,
    )
    plan = stage.plan
    least = min(one.steps or plan.steps for one in prompts) if not options.rl_distilled else plan.steps
    if drawn is not None and stochastic.window[0] > least - 2:
        raise UserError(
            f"--rl_sde_window {stochastic.rl_sde_window}: none of its steps can be stochastic: of {least} steps of sampling, which count "
            "from 0, the last ends at the clean clip. Give more --sample_steps, or an earlier window."
        )
    if drawn is not None and stochastic.rl_sde_steps > (can := min(stochastic.window[1], least - 1) - stochastic.window[0]):
        log.warning(
            "WARNING: --rl_sde_steps %d: %d of %d steps of sampling can be stochastic by --rl_sde_window %s (the last never is)",
            stochastic.rl_sde_steps, can, least, stochastic.rl_sde_window,
        )  # fmt: skip
    return {
        "seed": options.rl_seed,
        "round": options.rl_round,
        "mode": config.model.ltx_mode,
        "timestep_format": config.model.ltxv2_timestep_format,
        "width": first.width,
        "height": first.height,
        "frames": first.frames,
        "fps": first.fps,
        "first_frame": first.inputs.image is not None,
        "policy": policy,
        "frozen": [
            {"name": use.path.name, "sha256": file_hash(use.path), "video": use.strength.video, "audio": use.strength.audio}
            for use in chosen_loras(config.as_of_generation().loras)
            if use.path != options.rl_policy
        ],
        "model": setting.model,
        "sampling": {
            "distilled": options.rl_distilled,
            "guided": plan.needs_negative or plan.needs_perturbed or plan.needs_isolated,
            "guidance": dataclasses.asdict(config.guidance),
            "stochastic": drawn,
        },
        "prompts": [
            {"id": number, "prompt": one.prompt, "negative": one.negative, **_files_of(number, one, sounds.get(number))}
            for number, one in enumerate(prompts)
        ],
        "samples": [dataclasses.asdict(sample) for sample in samples],
    }


def _files_of(number: int, prompt: PreviewPrompt, sound: Path | None) -> dict[str, dict[str, str]]:
    """By content: samples and scores depend on it."""
    found = {}
    if prompt.inputs.image is not None:
        found["image"] = {"name": prompt.inputs.image.name, "sha256": file_hash(prompt.inputs.image)}
    if sound is not None:
        found["audio"] = {"file": sound_name(number, sound), "name": sound.name, "sha256": file_hash(sound)}
    return found


def _without_sound(prompt: PreviewPrompt) -> PreviewPrompt:
    """As it is sampled: its sound is for rewards, and the model never hears it."""
    return dataclasses.replace(prompt, inputs=dataclasses.replace(prompt.inputs, audio=None))


def _keep_sound(given: Path, kept: Path) -> None:
    if not kept.is_file() or file_hash(kept) != file_hash(given):
        write_bytes(kept, given.read_bytes())


def _check(prompts: Sequence[PreviewPrompt], config: RolloutConfig) -> None:
    """One size for all, and no conditioning but a first frame. A sound is what rewards compare with.

    Raises:
        UserError: names the prompt.
    """
    first = prompts[0]
    for one in prompts:
        for name in ("width", "height", "frames", "fps"):
            if getattr(one, name) != getattr(first, name):
                raise UserError(
                    f"{one.where}: {name} {getattr(one, name)}, and {first.where} has {getattr(first, name)}: all rollouts of a folder are "
                    "of one size and length."
                )
        if one.inputs.audio is not None:
            if config.model.ltx_mode == "video":
                raise UserError(f"{one.where}: has a sound (--a), with which rewards compare; --ltx_mode video makes none.")
            reference_sound(one.inputs.audio)  # can be read
        if one.inputs != dataclasses.replace(ConditioningInputs(), image=one.inputs.image, audio=one.inputs.audio):
            raise UserError(f"{one.where}: rollouts start from text, or text and a first frame (--i), and from nothing else.")
        if (one.inputs.image is None) != (first.inputs.image is None):
            raise UserError(f"{one.where}: either all prompts of a folder have a first frame (--i), or none.")
        if one.frames == 1 and config.model.ltx_mode == "av":
            raise UserError(f"{one.where}: a still has no sound; give --ltx_mode video.")
    texts = [one.prompt for one in prompts]
    if len(set(texts)) < len(texts):
        again = next(one for place, one in enumerate(prompts) if one.prompt in texts[:place])
        raise UserError(f"{again.where}: the same text as another prompt's, whose samples it would repeat. Take it out.")


def _check_earlier(rollouts: Rollouts) -> None:
    """Write what is to be made, or see that the folder is of the same, or of smaller groups of the same.

    Raises:
        UserError: it holds rollouts of other settings.
    """
    if not (rollouts.folder / ROLLOUTS).is_file():
        if strange := sorted(rollouts.folder.glob("g*_k*_ltxv2*.safetensors")):
            raise UserError(
                f"{strange[0]}: is there, and no {ROLLOUTS} that says how it was made. Give another --rl_rollout_cache, or remove "
                "the folder."
            )
        rollouts.write()
        return
    earlier = read_rollouts(rollouts.folder).facts
    wanted = _plain(rollouts.facts)
    if all(sample in wanted["samples"] for sample in earlier["samples"]):
        earlier = {**earlier, "samples": wanted["samples"]}
    if any(earlier.get(name) != wanted[name] for name in wanted):
        raise UserError(
            f"{rollouts.folder}: holds rollouts {_difference(earlier, wanted)} (rollouts.json). Give another --rl_rollout_cache, or remove "
            "the folder."
        )


def _difference(earlier: Mapping[Any, Any], wanted: Mapping[Any, Any], within: str = "") -> str:
    """The first of what differs, with both values."""
    name = next(name for name in {**wanted, **(earlier if within else {})} if earlier.get(name) != wanted.get(name))
    was, now = (dict(enumerate(value)) if isinstance(value, list) else value for value in (earlier.get(name), wanted.get(name)))
    if name == "samples":
        was, now = (max(one["k"] for one in facts["samples"]) + 1 for facts in (earlier, wanted))
        return f"of larger groups: {was} samples of each prompt, not {now} as by --rl_group_size"
    if isinstance(was, dict) and isinstance(now, dict):
        return _difference(was, now, f"{within}{name}.")
    return f"with another '{within}{name}': {was!r:.80}, not {now!r:.80}"


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def _cache_texts(setting: Setting, prompts: Sequence[PreviewPrompt], rollouts: Rollouts, group: Processes) -> None:
    """All texts lie in the folder of prompts, and each prompt's beside its samples."""
    folder = rollouts.folder
    recipe = text_recipe(setting.config, setting.files.transformer)
    texts = list(dict.fromkeys(text for one in prompts for text in (one.prompt, one.negative)))
    known = setting.texts.cache_directory
    for text in texts:
        own, there = prompt_path(folder, text), prompt_path(known, text)
        if not is_sound(own) and there.is_file():
            write_bytes(own, there.read_bytes())
    if recipe is not None:
        jobs = list_prompt_jobs(folder, texts, recipe)
        todo = choose(jobs, KINDS["text"].keys, skip_existing=True)
        outcome = encode_texts(todo, recipe, Processes(index=0, count=1), batch_size=8)
        if outcome.failed:
            name, reason = outcome.failed[0]
            raise UserError(f"{name}: {reason}")
    for number, one in enumerate(prompts):
        source, target = prompt_path(folder, one.prompt), folder / context_name(number)
        if not source.is_file():
            raise UserError(
                f"the text of {one.where} is not cached. Give --text_encoder FOLDER, or --text_cache the folder that "
                "ltxv2_cache_text_encoder_outputs.py --sample_prompts has cached the same file's texts in."
            )
        if not is_sound(target):
            metadata, header, body = read_parts(source)
            write_bytes(target, joined(header, body, metadata | {"source": source_name(number)}))
