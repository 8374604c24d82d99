"""Making a clip again from the recipe in it.

A recipe is what another machine may have written: each value is checked as a flag would be, and files are found by size and SHA-256
among those that the user names, never by a path.
"""

import dataclasses
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from musubi_tuner.config.flags import Beneath
from musubi_tuner.config.generation import GenerateConfig, LoraStrength
from musubi_tuner.config.preview import GuidanceOptions, Steps
from musubi_tuner.config.validation import FrameRate, Frames, Seed, Share, Side, Text, Wording, options, shortened, validated
from musubi_tuner.generation.contexts import encoders_of
from musubi_tuner.generation.jobs import LoraUse, chosen_loras, split_lora
from musubi_tuner.generation.recipe import Recipe, file_hash, read_recipe
from musubi_tuner.generation.setting import Setting
from musubi_tuner.generation.used import changed_defaults, changed_format
from musubi_tuner.networks.stack import Strength
from musubi_tuner.prompts.prompt import ConditioningInputs, PreviewPrompt, Rectangle, Span
from musubi_tuner.prompts.sample_prompts import check_prompt
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

_LONGEST_NAME = 140
"""Bytes."""
_FLAGS = {
    "mode": "ltx_mode",
    "timestep_format": "ltxv2_timestep_format",
    "weight_format": "weight_format",
    "pipeline": "pipeline",
    "distilled_lora_strength": "distilled_lora_strength",
    "merge_loras": "merge_loras",
    "max_length": "max_length",
}
"""What a recipe says -> the flag that says it."""
_OF_PROMPT = {
    "width": "sample_width", "height": "sample_height", "frames": "sample_frames", "fps": "sample_fps", "steps": "sample_steps",
    "seed": "seed", "negative": "negative_prompt",
}  # fmt: skip
_WINDOWS = ("window_frames", "window_overlap")
_MODEL = {"fingerprint": "--ltxv2_model", "vae": "--vae", "audio_vae": "--audio_vae"}
_BESIDE = ("spatial_upsampler_path", "distilled_lora")
_KNOWN = {
    *_FLAGS, *_BESIDE, "prompt", "inputs", "model", "windows", "guidance", "loras", "versions", "text_encoder", "reference_factors",
    "text_projection", "written", "used",
}  # fmt: skip
_GIVEN = {"image": "image", "reference": "reference_video", "audio": "audio"}
"""Input -> the flag that gives it."""


@options
class _Prompt:
    """As a recipe has it."""

    prompt: Text
    negative: Text
    width: Side
    height: Side
    frames: Frames
    fps: FrameRate
    seed: Seed
    steps: Steps | None


@options
class _File:
    """One that a clip was made with."""

    name: Text
    size: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), Wording("64 hexadecimal digits in lower case")]

    def __str__(self) -> str:
        return f"{shortened(repr(self.name))} ({self.size:,} bytes, sha256 {self.sha256})"


@options
class _Lora(_File):
    video: LoraStrength
    audio: LoraStrength


@options
class _Keyframe(_File):
    frame: Annotated[int, Field(ge=0, le=100_000)]


@options
class _KeyframeStrength:
    frame: Annotated[int, Field(ge=0, le=100_000)]
    strength: Share


@options
class _Number:
    value: Share


@options
class _Span:
    start: Annotated[float, Field(ge=0)]
    end: Annotated[float | None, Field(gt=0)]


_Factor = Annotated[int, Field(ge=1, le=1000)]


@options
class _Factors:
    space: _Factor
    time: _Factor


_Edge = Annotated[int, Field(ge=0, multiple_of=32), Wording("a multiple of 32")]


@options
class _Rectangle:
    left: _Edge
    top: _Edge
    width: Side
    height: Side


@dataclass(frozen=True, slots=True)
class Again:
    """A clip that is to be made again."""

    recipe: Recipe
    prompt: PreviewPrompt
    loras: tuple[LoraUse, ...]
    reference_factors: tuple[int, int] | None
    """None = as its networks say."""


def flags_of(clip: Path) -> Beneath:
    """Flags that the recipe of a clip says; those that the user gives win over them.

    Raises:
        UserError: no recipe, or one that is damaged.
    """
    facts = read_recipe(clip).facts
    where = f"{clip}: its recipe"
    if unknown := sorted(set(facts) - _KNOWN):
        raise UserError(f"{where}: holds '{shortened(unknown[0])}', which this version does not know.")
    prompt = validated(_Prompt, _table(facts, "prompt", where), where=f"{where}, prompt")
    values = {**_table(facts, "guidance", where), **{flag: facts.get(name) for name, flag in _FLAGS.items()}}
    values |= {flag: getattr(prompt, name) for name, flag in _OF_PROMPT.items()}
    used = _table(facts, "used", where) if "used" in facts else {}
    values |= changed_defaults(used, values, facts.get("pipeline")) | changed_format(used, values["weight_format"])
    known = {field.name for field in dataclasses.fields(GuidanceOptions)} | {
        *_FLAGS.values(),
        *_OF_PROMPT.values(),
        *_WINDOWS,
    }
    values |= dict(zip(_WINDOWS, _list(facts, "windows", where)))
    if unknown := sorted(set(values) - known):
        raise UserError(f"{where}: holds '{shortened(unknown[0])}', which this version does not know.")
    values["output_name"] = f"{_as_name(clip.stem)}_again"
    return Beneath(where=where, values={key: value for key, value in values.items() if value is not None})


def read_again(config: GenerateConfig) -> Again:
    """The prompt and the networks of --recreate, with the files of the user.

    Raises:
        UserError: files that are not found, by name and hash; a prompt that does not fit the flags that are given besides.
    """
    clip = config.clips.recreate
    assert clip is not None
    recipe, where = read_recipe(clip), f"{clip}: its recipe"
    _tell_given(config, flags_of(clip))
    stored_loras = [validated(_Lora, one, where=f"{where}, loras") for one in _list(recipe.facts, "loras", where)]
    stored = _read_inputs(_table(recipe.facts, "inputs", where), where)
    lacking: list[str] = []
    loras = _find_loras(config, stored_loras, lacking)
    inputs = _find_inputs(config, stored, lacking)
    if lacking:
        raise UserError("\n".join(f"{clip} was made with {line}" for line in lacking))
    text = validated(_Prompt, _table(recipe.facts, "prompt", where), where=f"{where}, prompt").prompt
    guidance = config.guidance
    assert config.clips.seed is not None
    prompt = PreviewPrompt(
        index=0, prompt=text, negative=config.clips.negative_prompt or "", width=guidance.sample_width, height=guidance.sample_height,
        frames=guidance.sample_frames, fps=guidance.sample_fps, seed=config.clips.seed, steps=guidance.sample_steps, video_cfg=None,
        audio_cfg=None, where=where, inputs=inputs,
    )  # fmt: skip
    check_prompt(prompt)
    factors = None
    if "reference_factors" in recipe.facts:
        stored_factors = validated(_Factors, recipe.facts["reference_factors"], where=f"{where}, reference_factors")
        factors = (stored_factors.space, stored_factors.time)
    return Again(recipe, prompt, loras, factors)


def tell_differences(again: Again, setting: Setting) -> None:
    """Warn of model files and versions that are not those of the recipe."""
    recipe, text = again.recipe, again.prompt.prompt
    stored, model = recipe.facts.get("model"), setting.model
    stored = stored if isinstance(stored, dict) else {}
    for key, flag in _MODEL.items():
        if key in model and stored.get(key) != model[key]:
            log.warning(
                "WARNING: %s: another model than the clip was made with (%s), so another clip comes out.",
                flag, shortened(repr(stored.get("name"))) if key == "fingerprint" else "by its tensors",
            )  # fmt: skip
    for name in _BESIDE:
        path, before = getattr(setting.config.pipeline, name), recipe.facts.get(name)
        if path is not None and isinstance(before, dict) and before.get("sha256") != file_hash(path):
            log.warning("WARNING: --%s %s: another file than the clip was made with (%s).", name, path, shortened(repr(before.get("name"))))
    encoder, now = recipe.facts.get("text_encoder"), encoders_of([text], setting.texts)[text]
    if not recipe.has_projection(now.projection):
        log.warning(
            "WARNING: its prompt goes through another text projection or other connectors than the clip was made with, so another clip "
            "comes out: give the --ltxv2_model that has them, or texts that were cached for it by --text_cache."
        )
    ours = now.encoder
    if isinstance(encoder, str) and ours is not None and ours != encoder:
        log.warning(
            "WARNING: its prompt is encoded by another text encoder than the clip was made with (fingerprint %s, now %s), so another clip "
            "comes out. Give that one by --text_encoder, or texts that were cached with it by --text_cache.", shortened(encoder), ours,
        )  # fmt: skip
    import torch

    from musubi_tuner import __version__

    versions = recipe.facts.get("versions")
    for name, ours in (("musubi-tuner-ltxv2", __version__), ("torch", torch.__version__)):
        theirs = versions.get(name) if isinstance(versions, dict) else None
        if theirs != ours:
            log.warning("WARNING: the clip was made with %s %s, this is %s: its bits may differ.", name, shortened(str(theirs)), ours)


def _tell_given(config: GenerateConfig, below: Beneath) -> None:
    now = {
        field.name: getattr(section, field.name)
        for section in (config.clips, config.pipeline, config.loras, config.guidance, config.model, config.memory)
        for field in dataclasses.fields(section)
    }
    for key, value in below.values.items():
        before = tuple(value) if isinstance(value, list) else value
        if key != "output_name" and now[key] != before:
            log.info("--%s %s: in place of %s, which the recipe has", key, now[key], before)


def _read_inputs(facts: Mapping[str, Any], where: str) -> dict[str, Any]:
    """By the names of `ConditioningInputs`."""
    found: dict[str, Any] = {}
    known = {field.name for field in dataclasses.fields(ConditioningInputs)}
    for name, value in facts.items():
        at = f"{where}, inputs, {shortened(name)}"
        if name not in known:
            raise UserError(f"{at}: this version does not know it.")
        if name in ("keyframes", "keyframes_in_place"):
            found[name] = [validated(_Keyframe, one, where=at) for one in _list(facts, name, where)]
        elif name in ("strengths", "strengths_beside"):
            strengths = [validated(_KeyframeStrength, one, where=at) for one in _list(facts, name, where)]
            found[name] = tuple((one.frame, one.strength) for one in strengths)
        elif name in ("image_strength", "reference_strength", "reference_attention"):
            found[name] = validated(_Number, {"value": value}, where=at).value
        elif name in ("video_span", "audio_span"):
            span = validated(_Span, value, where=at)
            found[name] = Span(span.start, float("inf") if span.end is None else span.end)
        elif name in ("box", "crop"):
            found[name] = Rectangle(**dataclasses.asdict(validated(_Rectangle, value, where=at)))
        else:
            found[name] = validated(_File, value, where=at)
    return found


class _Files:
    """Those of the user, by their sizes; hashed where one of that size is looked for."""

    def __init__(self, given: Iterable[Path], folder: Path | None, flag: str) -> None:
        if folder is not None and not folder.is_dir():
            raise UserError(f"{flag} {folder}: no such folder.")
        self._by_size: dict[int, list[Path]] = defaultdict(list)
        for path in given:
            self._add(path)
        for place, folders, names in os.walk(folder) if folder is not None else ():
            folders.sort()
            for name in sorted(names):
                self._add(Path(place) / name)

    def find(self, file: _File) -> Path | None:
        return next((path for path in self._by_size[file.size] if _hash_of(path) == file.sha256), None)

    def _add(self, path: Path) -> None:
        try:
            if path.is_file():
                self._by_size[path.stat().st_size].append(path)
        except OSError:  # a link into nowhere
            return


def _hash_of(path: Path) -> str | None:
    try:
        return file_hash(path)
    except OSError:  # of another user
        return None


def _find_loras(config: GenerateConfig, stored: list[_Lora], lacking: list[str]) -> tuple[LoraUse, ...]:
    """Those of the recipe, at the strengths that are given or else its own, and behind them what --lora adds."""
    given = chosen_loras(config.loras)
    with_strength = [bool(split_lora(text)[1]) for text in config.loras.lora]
    with_strength += [place < len(config.loras.lora_multiplier) for place in range(len(config.loras.lora_weight))]
    files = _Files([use.path for use in given], config.clips.lora_folder, "--lora_folder")
    uses: list[LoraUse] = []
    added = dict(zip(given, with_strength, strict=True))
    for file in stored:
        path, strength = files.find(file), Strength(file.video, file.audio)
        if path is None:
            lacking.append(f"the LoRA {file}, which is neither a --lora nor in --lora_folder: give its file or a folder that it is in.")
            continue
        for use in [one for one in added if _is(one.path, file)]:
            if added.pop(use) and use.strength != strength:
                log.info("--lora %s: its strength is in place of %g, which the recipe has", use.path, strength.video)
                strength = use.strength
        uses.append(LoraUse(path, strength))
    for use in added:
        log.info("--lora %s: is added; the recipe has no such LoRA", use.path)
    return (*uses, *added)


def _is(path: Path, file: _File) -> bool:
    return path.stat().st_size == file.size and _hash_of(path) == file.sha256


def _find_inputs(config: GenerateConfig, stored: Mapping[str, Any], lacking: list[str]) -> ConditioningInputs:
    given = {name: path for name, flag in _GIVEN.items() if (path := getattr(config.clips, flag)) is not None}
    for name, path in given.items():
        if not path.is_file():
            raise UserError(f"--{_GIVEN[name]} {path}: not found.")
    files = _Files(given.values(), config.clips.input_folder, "--input_folder")
    needed = [one for value in stored.values() for one in (value if isinstance(value, list) else [value]) if isinstance(one, _File)]
    winning = {name: path for name, path in given.items() if not any(_is(path, file) for file in needed)}
    for name, path in winning.items():
        log.info("--%s %s: in place of what the recipe has", _GIVEN[name], path)

    def find(name: str, file: _File) -> Path:
        path = files.find(file)
        if path is None:
            lacking.append(f"the file {file} as its {name}, which is not in --input_folder: give a folder that it is in.")
        return path or Path()

    found: dict[str, Any] = dict(winning)
    for name, value in stored.items():
        if name not in winning:
            if isinstance(value, list):
                value = tuple((one.frame, find(name, one)) for one in value)
            found[name] = find(name, value) if isinstance(value, _File) else value
    return ConditioningInputs(**found)


def _table(facts: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = facts.get(key)
    if not isinstance(value, dict):
        raise UserError(f"{where}: has no '{key}'; it is damaged.")
    return value


def _list(facts: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = facts.get(key)
    if not isinstance(value, list):
        raise UserError(f"{where}: has no '{key}'; it is damaged.")
    return value


def _as_name(stem: str) -> str:
    """Of signs that `FileName` takes, and short."""
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", stem.encode("utf-8", "replace").decode())
    while len(os.fsencode(name)) > _LONGEST_NAME:
        name = name[:-1]
    return name
