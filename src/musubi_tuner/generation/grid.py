"""A grid of clips: one of each combination of its axes' values, and which of them are the same clip.

What no network of the axes changes is the base: it is made once for each combination of the other axes.
"""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.config.preview import GuidanceOptions
from musubi_tuner.config.validation import shortened, validated
from musubi_tuner.generation.axes import GUIDANCE, OF_LORAS, STRENGTHS, Axis, strength_of
from musubi_tuner.generation.jobs import Job, LoraUse
from musubi_tuner.generation.pipelines import FIXED_STEPS
from musubi_tuner.networks.stack import Strength
from musubi_tuner.prompts.prompt import PreviewPrompt
from musubi_tuner.runtime.errors import UserError

_MOST_CELLS = 10_000
_LONGEST_LABEL, _LONGEST_STEM = 40, 180
"""Bytes."""
_SHORT = {
    "strength": "s", "video_strength": "v", "audio_strength": "a", "steps": "steps", "video_cfg_scale": "cfg", "audio_cfg_scale": "acfg",
    "stg_scale": "stg", "audio_stg_scale": "astg", "rescale_scale": "rescale", "audio_rescale_scale": "arescale", "modality_scale": "mod",
    "audio_modality_scale": "amod", "discrete_flow_shift": "shift",
}  # fmt: skip
"""What stands before an axis' value in the name of a clip."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An axis as it is shown: values that differ from the base."""

    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """A place in the grid."""

    at: tuple[int | None, ...]
    """Of each axis the place of the label; None on the networks' axes: the base."""
    job: Job
    """May stand in several places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """All of it."""

    name: str
    axes: tuple[Shown, ...]
    cells: tuple[Cell, ...]

    @property
    def layout(self) -> tuple[int, int]:
        """Axes of the rows and of the columns, at first; -1 = none. Strengths stand beside each other."""
        names = [axis.name for axis in self.axes]
        of_loras = [name for name in names if name in OF_LORAS]
        column = "strength" if "strength" in names else (of_loras or names or [""])[-1]
        columns = names.index(column) if column in names else -1
        others = [place for place in range(len(names)) if place != columns]
        several = [place for place in others if len(self.axes[place].labels) > 1]
        return (several or others or [-1])[0], columns

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Each clip once, those that share networks behind each other."""
        return tuple(dict.fromkeys(cell.job for cell in self.cells))


def make_grid(config: GenerateConfig, axes: Sequence[Axis], prompts: Sequence[PreviewPrompt], loras: tuple[LoraUse, ...]) -> Grid:
    """
    Args:
        loras: of --lora; where no axis names networks, these are what the strengths are of, else they are in every cell.

    Raises:
        UserError: an axis that changes nothing, a prompt that is not there, a value that is none of guidance, or too many cells.
    """
    _check(config, axes, loras)
    values = {axis.name: axis.values for axis in axes}
    places = _prompt_places(values.get("prompt", ()), prompts)
    if "prompt" in values or len(places) > 1:
        values["prompt"] = places
    if (count := math.prod(map(len, values.values()))) > _MOST_CELLS:
        raise UserError(f"--grid: {count} cells; the most is {_MOST_CELLS}.")
    fixed = loras if "lora" in values else ()
    names = _lora_labels([use for use in values.get("lora", ()) if use is not None])
    made: dict[tuple[Any, ...], Job] = {}
    found: list[tuple[dict[str, Any], bool, Job]] = []
    for chosen in _combinations(values):
        uses = _uses(chosen, loras)
        is_base = not uses
        parts = [] if is_base else _name_of_loras(chosen, names)
        prompt, guidance, of_guidance = _varied(prompts[chosen.get("prompt", places[0])], config.guidance, chosen)
        stem = _stem("_".join([f"{config.clips.output_name}_{prompt.index:02d}_{prompt.seed}", *parts, *of_guidance]))
        key = (prompt, guidance, uses)
        job = made.setdefault(key, Job(stem=stem, prompt=prompt, loras=(*fixed, *uses), guidance=guidance))
        found.append((chosen, is_base, job))
    return _arranged(config.clips.output_name, values, found, {"lora": names, "prompt": _prompt_labels(prompts)})


def _arranged(
    name: str,
    values: Mapping[str, tuple[Any, ...]],
    found: Sequence[tuple[dict[str, Any], bool, Job]],
    labels: Mapping[str, Mapping[Any, str]],
) -> Grid:
    """Values that only ever give the base are no rows and columns; the base has its own place instead."""
    told = {
        axis: tuple(value for value in of_axis if any(not base and chosen[axis] == value for chosen, base, _ in found))
        for axis, of_axis in values.items()
        if axis in OF_LORAS
    }
    if not all(told.values()):
        told = {}
    kept = {axis: told.get(axis, of_axis) for axis, of_axis in values.items() if axis in told or axis not in OF_LORAS}
    cells: dict[tuple[int | None, ...], Job] = {}
    for chosen, is_base, job in sorted(found, key=lambda one: not one[1]):
        at = tuple(of_axis.index(chosen[axis]) if chosen[axis] in of_axis else None for axis, of_axis in kept.items())
        if is_base:
            cells.setdefault(tuple(None if axis in told else place for axis, place in zip(kept, at, strict=True)), job)
        if None not in at:
            cells[at] = job
    shown = tuple(
        Shown(
            axis,
            tuple(
                labels[axis][value] if axis in labels else f"{value:.6g}" if isinstance(value, float) else str(value) for value in of_axis
            ),
        )
        for axis, of_axis in kept.items()
    )
    return Grid(name=name, axes=shown, cells=tuple(Cell(at, job) for at, job in cells.items()))


def _combinations(values: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """The networks' axes vary slowest, so that a file is read once."""
    names = sorted(values, key=lambda name: (*OF_LORAS, name).index(name))
    for chosen in itertools.product(*(values[name] for name in names)):
        yield dict(zip(names, chosen, strict=True))


def _uses(chosen: Mapping[str, Any], loras: tuple[LoraUse, ...]) -> tuple[LoraUse, ...]:
    """Networks of a combination; none of strength 0."""
    varied = ((chosen["lora"],) if chosen["lora"] is not None else ()) if "lora" in chosen else loras
    if not any(name in chosen for name in OF_LORAS):
        return loras
    uses = [strength_of(use, *(chosen.get(name, 1.0) for name in STRENGTHS)) for use in varied]
    return tuple(use for use in uses if use.strength != Strength(0, 0))


def _varied(
    prompt: PreviewPrompt, guidance: GuidanceOptions, chosen: Mapping[str, Any]
) -> tuple[PreviewPrompt, GuidanceOptions, list[str]]:
    """The prompt and the guidance of a combination, and what their values are called in the clip's name."""
    if "seed" in chosen:
        prompt = dataclasses.replace(prompt, seed=chosen["seed"])
    given = {name: chosen[name] for name in GUIDANCE if name in chosen}
    if given:
        fields = {field.name: getattr(guidance, field.name) for field in dataclasses.fields(guidance)}
        axes = {flag: axis for axis, flag in GUIDANCE.items()}
        guidance = validated(
            GuidanceOptions,
            fields | {GUIDANCE[name]: value for name, value in given.items()},
            naming=lambda key, value: f"--grid {axes.get(key, key)}={shortened(str(value))}",
        )
        prompt = dataclasses.replace(
            prompt,
            steps=given.get("steps", prompt.steps),
            video_cfg=None if "video_cfg_scale" in given else prompt.video_cfg,
            audio_cfg=None if "audio_cfg_scale" in given else prompt.audio_cfg,
        )
    return prompt, guidance, [f"{_SHORT[name]}{value:.6g}" for name, value in given.items()]


def _check(config: GenerateConfig, axes: Sequence[Axis], loras: Sequence[LoraUse]) -> None:
    names = [axis.name for axis in axes]
    if not axes:
        raise UserError(f"{config.grid.grid_file}: names no axis.")
    pipeline, mode, scheduler = config.pipeline.pipeline, config.model.ltx_mode, config.guidance.sample_scheduler
    of_other = {"video": "audio_", "audio": "video_"}.get(mode)
    for name in names:
        if name in OF_LORAS and config.loras.merge_loras:
            raise UserError(
                f"--grid {name}: its cells have different LoRAs, and --merge_loras merges those that all clips share. Leave it out, "
                "or give --no-merge_loras where a recipe has it: LoRAs beside the model are switched without loading it again."
            )
        if name in STRENGTHS and "lora" not in names and not loras:
            raise UserError(f"--grid {name}: is of LoRAs, and there is none: give --grid lora=FILES, or --lora FILE.")
        if name in GUIDANCE and pipeline in FIXED_STEPS:
            raise UserError(f"--grid {name}: --pipeline {pipeline} has fixed steps and no guidance, so every cell would be the same.")
        if of_other is not None and name.startswith(of_other):
            raise UserError(f"--grid {name}: --ltx_mode {mode} makes nothing that it changes.")
        if name == "discrete_flow_shift" and scheduler != "flowmatch_discrete":
            raise UserError(f"--grid {name}: is of --sample_scheduler flowmatch_discrete, not of {scheduler}.")
    for axis in axes:
        if axis.name == "seed" and (wrong := [seed for seed in axis.values if not -(2**63) <= seed < 2**64]):
            raise UserError(f"--grid seed={wrong[0]}: must be from -2^63 to 2^64 - 1.")


def _prompt_places(chosen: Sequence[int], prompts: Sequence[PreviewPrompt]) -> tuple[int, ...]:
    if outside := [place for place in chosen if not 0 <= place < len(prompts)]:
        there = f"0 to {len(prompts) - 1}" if len(prompts) > 1 else "0 alone"
        raise UserError(f"--grid prompt={outside[0]}: no such prompt; there are {there}.")
    return tuple(chosen) or tuple(range(len(prompts)))


def _prompt_labels(prompts: Sequence[PreviewPrompt]) -> dict[int, str]:
    return {place: f"{prompt.index}: {prompt.prompt}" for place, prompt in enumerate(prompts)}


def _lora_labels(uses: Sequence[LoraUse]) -> dict[LoraUse, str]:
    """Names that tell the networks of a grid from each other, as short as that allows; a file system that knows no capitals has to too."""
    found: dict[LoraUse, str] = {}
    for use in uses:
        stem, strength = use.path.stem, use.strength
        own = "" if strength == Strength(1, 1) else f"-s{strength.video:.6g}"
        own += f"-a{strength.audio:.6g}" if strength.audio != strength.video else ""
        candidates = (f"{stem}{own}", f"{use.path.parent.name}-{stem}{own}", f"{stem}{own}-{_hash(str(use.path))}")
        taken = {_slug(label).casefold() for label in found.values()}
        found[use] = next((label for label in candidates if _slug(label).casefold() not in taken), candidates[-1])
    return found


def _name_of_loras(chosen: Mapping[str, Any], names: Mapping[LoraUse, str]) -> list[str]:
    parts = [_slug(names[chosen["lora"]])] if "lora" in chosen else []
    return [*parts, *(f"{_SHORT[name]}{chosen[name]:.6g}" for name in STRENGTHS if name in chosen)]


def _slug(label: str) -> str:
    """Of signs that every file system takes, and short: the end of a name, where the step stands, is kept."""
    text = re.sub(r"[^\w.-]+", "-", label).strip("-.") or _hash(label)
    size = len(text.encode())
    if size <= _LONGEST_LABEL:
        return text
    half = (_LONGEST_LABEL - 7) // 2
    return f"{_cut(text, half)}~{_hash(text)[:4]}~{_cut(text[::-1], half)[::-1]}"


def _stem(text: str) -> str:
    return text if len(text.encode()) <= _LONGEST_STEM else f"{_cut(text, _LONGEST_STEM - 9)}~{_hash(text)}"


def _cut(text: str, size: int) -> str:
    while len(text.encode()) > size:
        text = text[:-1]
    return text


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
