"""From rules to cells: which latents of an item are given. Each rule draws from a generator of its own, named by the item.

A new rule is a dataclass in `config.conditioning` and a function in the tables here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from musubi_tuner.config import conditioning as rules
from musubi_tuner.config.conditioning import Range, Recipe, Rule
from musubi_tuner.ltxv2.geometry import AUDIO_LATENTS_PER_SECOND

_WHITE = 0.5
"""A cell of which more is white is generated."""

Generators = Callable[..., torch.Generator]
"""Names -> a generator that depends on the item and these names alone."""
Cells = tuple[int, ...]
"""(F, H, W) latent cells of a video, (T,) of sound."""
AnyRule = TypeVar("AnyRule", bound=Rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemShape:
    """What there is of an item to lay rules over."""

    video: tuple[int, int, int] | None
    """(F, H, W) latent cells"""
    audio_steps: int
    mask: Tensor | None = None
    """(F, H, W) share of white in its mask; None = it has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemConditions:
    """What is given of an item."""

    video_clean: Tensor | None
    """(F, H, W) bool; None where the recipe has no rule for cells, or there is no video."""
    audio_clean: Tensor | None
    """(T,) bool"""
    video_reference: bool
    """Whether the item sees its reference."""
    audio_reference: bool


def draw_conditions(recipe: Recipe, shape: ItemShape, generators: Generators) -> ItemConditions:
    """Apply a recipe to one item.

    A rule that would leave nothing of the stream to be generated is passed over for this item: so stills take part in recipes
    that are made for clips. Clean streams are drawn together, so that one of both is always generated.
    """
    lot = _uniform(generators("one stream"))
    sees_video = shape.video is not None
    video_given = sees_video and shape.audio_steps > 0 and lot >= 1 - recipe.probability("video", rules.Clean)
    audio_given = sees_video and shape.audio_steps > 0 and lot < recipe.probability("audio", rules.Clean)
    video = audio = None
    if shape.video is not None and has_cell_rules(recipe.video):
        video = _lay(recipe.video, VIDEO_CELLS, shape.video, generators, "video", shape)
        video |= video_given
    if shape.audio_steps and has_cell_rules(recipe.audio):
        audio = _lay(recipe.audio, AUDIO_CELLS, (shape.audio_steps,), generators, "audio", shape)
        audio |= audio_given
    return ItemConditions(
        video_clean=video,
        audio_clean=audio,
        video_reference=_chosen(recipe.probability("video", rules.Reference), generators("video", "Reference")),
        audio_reference=_chosen(recipe.probability("audio", rules.Reference), generators("audio", "Reference")),
    )


def has_cell_rules(found: Sequence[Rule]) -> bool:
    """Whether any rule gives cells of the stream itself."""
    return any(not isinstance(rule, rules.Reference) for rule in found)


def _lay(found: Sequence[Rule], table: Mapping, cells: Cells, generators: Generators, stream: str, shape: ItemShape) -> Tensor:
    clean = torch.zeros(cells, dtype=torch.bool)
    for rule in found:
        if type(rule) not in table:
            continue
        generator = generators(stream, type(rule).__name__)
        if _chosen(rule.probability, generator):
            more = clean | table[type(rule)](rule, cells, generator, shape)
            clean = clean if bool(more.all()) else more
    return clean


def first_frame(rule: rules.FirstFrame, cells: Cells, generator: torch.Generator, shape: ItemShape) -> Tensor:
    return _spans(cells, range(1))


def prefix(rule: rules.Prefix, cells: Cells, generator: torch.Generator, shape: ItemShape) -> Tensor:
    return _spans(cells, range(min(_whole(rule.latent_frames, generator), cells[0] - 1)))


def suffix(rule: rules.Suffix, cells: Cells, generator: torch.Generator, shape: ItemShape) -> Tensor:
    count = min(_whole(rule.latent_frames, generator), cells[0] - 1)
    return _spans(cells, range(cells[0] - count, cells[0]))


def keyframes(rule: rules.Keyframes, cells: Cells, generator: torch.Generator, shape: ItemShape) -> Tensor:
    frames = cells[0]
    pools = {"first": range(1), "last": range(frames - 1, frames), "interior": range(1, frames - 1), "random": range(frames)}
    chosen: list[int] = []
    for name in rule.at:
        pool = pools[name]
        count = _whole(rule.count, generator) if name in ("interior", "random") else 1
        order = torch.randperm(len(pool), generator=generator).tolist()
        chosen += [pool[place] for place in order[:count]]
    return _spans(cells, chosen)


def crop(rule: rules.Crop, cells: Cells, generator: torch.Generator, shape: ItemShape) -> Tensor:
    return _rectangle(cells, rule.size, generator)


def box(rule: rules.Box, cells: Cells, generator: torch.Generator, shape: ItemShape) -> Tensor:
    count = _share(rule.duration, cells[0], generator)
    start = _place(cells[0] - count, generator)
    return ~(_spans(cells, range(start, start + count)) & _rectangle(cells, rule.size, generator))


def mask(rule: rules.Mask, cells: Cells, generator: torch.Generator, shape: ItemShape) -> Tensor:
    return torch.zeros(cells, dtype=torch.bool) if shape.mask is None else shape.mask <= _WHITE


def sound_prefix(rule: rules.SoundPrefix, cells: Cells, generator: torch.Generator, shape: ItemShape) -> Tensor:
    return _spans(cells, range(_steps(rule.seconds, cells, generator)))


def sound_suffix(rule: rules.SoundSuffix, cells: Cells, generator: torch.Generator, shape: ItemShape) -> Tensor:
    return _spans(cells, range(cells[0] - _steps(rule.seconds, cells, generator), cells[0]))


def sound_gap(rule: rules.SoundGap, cells: Cells, generator: torch.Generator, shape: ItemShape) -> Tensor:
    count = _steps(rule.seconds, cells, generator)
    start = _place(cells[0] - count, generator)
    return ~_spans(cells, range(start, start + count))


CellRule = Callable[[AnyRule, Cells, torch.Generator, ItemShape], Tensor]
"""(rule, cells, generator, item) -> bool of the shape `cells`: True = given."""
VIDEO_CELLS: dict[type[Rule], CellRule] = {
    rules.FirstFrame: first_frame,
    rules.Prefix: prefix,
    rules.Suffix: suffix,
    rules.Keyframes: keyframes,
    rules.Crop: crop,
    rules.Box: box,
    rules.Mask: mask,
}
AUDIO_CELLS: dict[type[Rule], CellRule] = {
    rules.SoundPrefix: sound_prefix,
    rules.SoundSuffix: sound_suffix,
    rules.SoundGap: sound_gap,
}


def _spans(cells: Cells, places: Sequence[int]) -> Tensor:
    """True at `places` of the first axis, which is time."""
    given = torch.zeros(cells, dtype=torch.bool)
    given[list(places)] = True
    return given


def _rectangle(cells: Cells, size: Range, generator: torch.Generator) -> Tensor:
    """True in a rectangle of every frame, of random sides at a random place."""
    frames, height, width = cells
    rows, columns = _share(size, height, generator), _share(size, width, generator)
    top, left = _place(height - rows, generator), _place(width - columns, generator)
    inside = torch.zeros(cells, dtype=torch.bool)
    inside[:, top : top + rows, left : left + columns] = True
    return inside


def _steps(seconds: Range, cells: Cells, generator: torch.Generator) -> int:
    """Latent steps of a drawn length; one less than all at most."""
    low, high = seconds
    wanted = round((low + (high - low) * _uniform(generator)) * AUDIO_LATENTS_PER_SECOND)
    return min(max(1, wanted), cells[0] - 1)


def _share(size: Range, cells: int, generator: torch.Generator) -> int:
    low, high = size
    return max(1, round((low + (high - low) * _uniform(generator)) * cells))


def _whole(found: Range, generator: torch.Generator) -> int:
    return int(torch.randint(int(found[0]), int(found[1]) + 1, (), generator=generator))


def _place(room: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, room + 1, (), generator=generator))


def _chosen(probability: float, generator: torch.Generator) -> bool:
    return _uniform(generator) < probability


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()
