"""What a clip was made from, in its own file: prompt, seed, pipeline, guidance, and every file by name and hash.

It lies in the `comment` of an mp4, in a text chunk of a png, and beside a wav, which has no place for it. No path is in it: what another
machine wrote is never followed.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from musubi_tuner import __version__
from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.generation.contexts import EncodedBy
from musubi_tuner.generation.jobs import Job, reference_factors
from musubi_tuner.generation.pipelines import as_sampled
from musubi_tuner.ltxv2.versions import transformer_names
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.networks.reading import newest_file
from musubi_tuner.networks.stack import Strength
from musubi_tuner.prompts.prompt import PreviewPrompt
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import parse_json, read_text

KEY = "ltxv2_recipe"
_FORMAT = 1
_OF_PROMPT = ("prompt", "negative", "width", "height", "frames", "fps", "seed")
_BY_PROMPT = ("sample_width", "sample_height", "sample_frames", "sample_fps", "sample_steps", "video_cfg_scale", "audio_cfg_scale")
"""Flags that hold where a prompt names nothing else: what came of both is in the recipe, so that it is the same however it was said."""
TEXT_PROJECTION = "text_projection"
_NOT_IN_THE_DIGEST = ("name", "versions", "written", "used", TEXT_PROJECTION)
"""The last is compared beside it (`Recipe.has_projection`), as recipes did not always say it."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Of one clip."""

    facts: Mapping[str, Any]

    @property
    def text(self) -> str:
        return json.dumps({KEY: _FORMAT, **self.facts}, ensure_ascii=False, sort_keys=True)

    @property
    def digest(self) -> str:
        """The same for clips that are made from the same."""
        return hashlib.sha256(json.dumps(_without_names(self.facts), sort_keys=True).encode()).hexdigest()[:16]

    def has_projection(self, other: Any) -> bool:
        """Whether its prompt goes through the same text projection and connectors, as far as both are known."""
        own = self.facts.get(TEXT_PROJECTION)
        return own is None or other is None or own == other


def model_identity(transformer: Checkpoint, vae: Checkpoint, audio_vae: Checkpoint, mode: str) -> dict[str, str]:
    """A transformer's name, and the fingerprints of its tensors and of the autoencoders of a mode.

    Raises:
        UserError: a file that holds another part.
    """
    from musubi_tuner.ltxv2.autoencoders.audio_vae import audio_vae_names
    from musubi_tuner.ltxv2.autoencoders.video_vae import vae_names

    found = {"name": transformer.path.name, "fingerprint": transformer.fingerprint(transformer_names(transformer))}
    if mode != "audio":
        found["vae"] = vae.fingerprint(vae_names(vae))
    if mode != "video":
        found["audio_vae"] = audio_vae.fingerprint(audio_vae_names(audio_vae))
    return found


def recipe_of(job: Job, config: GenerateConfig, model: Mapping[str, str], text: EncodedBy, factors: tuple[int, int]) -> Recipe:
    """Of a clip that is to be made.

    Args:
        model: its `model_identity`.
        text: what its prompt's context is made by.
        factors: how many times smaller and slower its reference is.

    Raises:
        UserError: a file that cannot be read.
    """
    pipeline = config.pipeline
    prompt, guidance = as_sampled(pipeline.pipeline, job.prompt, job.guidance)
    uses = [use for use in job.loras if use.strength != Strength(0, 0)]
    own = {"video_cfg_scale": prompt.video_cfg, "audio_cfg_scale": prompt.audio_cfg}
    facts: dict[str, Any] = {
        "prompt": {name: getattr(prompt, name) for name in _OF_PROMPT} | {"steps": prompt.steps or guidance.sample_steps},
        "inputs": _inputs(prompt),
        "model": dict(model),
        "mode": config.model.ltx_mode,
        "timestep_format": config.model.ltxv2_timestep_format,
        "weight_format": config.memory.weight_format,
        "pipeline": pipeline.pipeline,
        "distilled_lora_strength": pipeline.distilled_lora_strength,
        "windows": [pipeline.window_frames, pipeline.window_overlap],
        "guidance": {name: value for name, value in dataclasses.asdict(guidance).items() if name not in _BY_PROMPT}
        | {name: getattr(guidance, name) if value is None else value for name, value in own.items()},
        "loras": [{**_file(use.path), "video": use.strength.video, "audio": use.strength.audio} for use in uses],
        "versions": {"musubi-tuner-ltxv2": __version__, "torch": torch.__version__},
    }
    if config.loras.merge_loras:
        facts["merge_loras"] = True
    if prompt.inputs.reference is not None and factors != reference_factors(uses):  # the base of a run with IC-LoRAs
        facts["reference_factors"] = dict(zip(("space", "time"), factors, strict=True))
    named = {"text_encoder": text.encoder, TEXT_PROJECTION: text.projection, "max_length": text.max_length}
    facts |= {name: value for name, value in named.items() if value is not None}
    if prompt.written:
        facts["written"] = prompt.written
    for name in ("spatial_upsampler_path", "distilled_lora"):
        if (path := getattr(pipeline, name)) is not None:
            facts[name] = _file(newest_file(path), f"--{name} ")
    return Recipe(json.loads(json.dumps(facts)))


def read_recipe(clip: Path) -> Recipe:
    """From a clip that was made here.

    Raises:
        UserError: another file, or one whose recipe is of a newer version.
    """
    text = _stored_text(clip)
    if text is None:
        raise UserError(f"{clip}: holds no recipe; 'ltxv2 generate' writes one into each clip, and other programs may strip it.")
    facts = parse_json(text, f"{clip}: its recipe")
    if not isinstance(facts, dict) or facts.pop(KEY, None) != _FORMAT:
        raise UserError(f"{clip}: its recipe is not of this version of the program.")
    return Recipe(facts)


@functools.lru_cache(maxsize=1024)
def file_hash(path: Path) -> str:
    """SHA-256 of all of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recipe_path(wav: Path) -> Path:
    """Where a wav's recipe lies."""
    return wav.with_name(f"{wav.name}.json")


def _stored_text(clip: Path) -> str | None:
    suffix = clip.suffix.lower()
    if suffix == ".png":
        from musubi_tuner.media.picture import picture_texts

        return picture_texts(clip).get(KEY)
    if suffix == ".wav":
        beside = recipe_path(clip)
        return read_text(beside) if beside.is_file() else None
    from musubi_tuner.media.probe import container_comment

    return container_comment(clip)


def _inputs(prompt: PreviewPrompt) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(prompt.inputs):
        value = getattr(prompt.inputs, field.name)
        if value == field.default:
            continue
        if isinstance(value, Path):
            found[field.name] = _file(value)
        elif isinstance(value, tuple):
            found[field.name] = [{"frame": frame, **(_file(one) if isinstance(one, Path) else {"strength": one})} for frame, one in value]
        elif isinstance(value, float):
            found[field.name] = value
        else:
            numbers = dataclasses.asdict(value).items()
            found[field.name] = {name: None if math.isinf(number) else number for name, number in numbers}
    return found


def _file(path: Path, named: str = "") -> dict[str, str | int]:
    try:
        return {"name": path.name, "size": path.stat().st_size, "sha256": file_hash(path)}
    except OSError as error:
        raise UserError(f"{named}{path}: cannot be read ({error.strerror}).") from error


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_names(one) for key, one in value.items() if key not in _NOT_IN_THE_DIGEST}
    return [_without_names(one) for one in value] if isinstance(value, list) else value
