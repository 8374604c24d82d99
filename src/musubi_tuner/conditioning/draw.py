"""A recipe's rules -> what is conditioning of one item: its cells, its keyframes, whether it sees its reference.

Each rule is drawn by a generator that is named after its class; the cells of all drawn rules are merged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.conditioning.recipe import CellRule, Clean, ItemShape, Recipe, Reference, Rule
from musubi_tuner.ltxv2.geometry import TEMPORAL_SCALE
from musubi_tuner.runtime.draws import uniform

Generators = Callable[..., torch.Generator]
"""Names -> a generator that depends on the item and these names alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemConditions:
    """What is conditioning of an item."""

    video_clean: Tensor | None
    """(F, H, W) bool; None where the recipe has no rule for cells, or there is no video."""
    audio_clean: Tensor | None
    """(T,) bool"""
    video_reference: bool
    """Whether the item sees its reference."""
    audio_reference: bool
    keyframes: tuple[int, ...] = ()
    """Pixel frames that it is shown beside the clip."""


def draw_conditions(recipe: Recipe, shape: ItemShape, generators: Generators) -> ItemConditions:
    """Apply a recipe to one item.

    A rule that would leave nothing of the stream to be learned is passed over for this item: so stills take part in recipes
    that are made for clips, and where a mask weighs the loss, some of what it leaves white is generated. Clean streams are
    drawn together, so that one of both is always generated.
    """
    lot = uniform(generators("one stream"))
    has_both = shape.video is not None and shape.audio_steps > 0
    video = audio = None
    if shape.video is not None and _has_cell_rules(recipe.video):
        learned = shape.mask > 0 if shape.mask is not None and recipe.masks_weigh else torch.ones(shape.video, dtype=torch.bool)
        video = _merged(recipe.video, learned, generators, "video", shape)
        video |= has_both and lot >= 1 - recipe.probability("video", Clean)
    if shape.audio_steps and _has_cell_rules(recipe.audio):
        audio = _merged(recipe.audio, torch.ones(shape.audio_steps, dtype=torch.bool), generators, "audio", shape)
        audio |= has_both and lot < recipe.probability("audio", Clean)
    keyframes: tuple[int, ...] = ()
    if shape.video is not None and (rule := recipe.keyframes) is not None and not (video is not None and bool(video.all())):
        generator = generators("video", "KeyframesBeside")
        if uniform(generator) < rule.probability:
            keyframes = rule.frames(shape.keyframes, (shape.video[0] - 1) * TEMPORAL_SCALE, generator)
    return ItemConditions(
        video_clean=video,
        audio_clean=audio,
        video_reference=uniform(generators("video", "Reference")) < recipe.probability("video", Reference),
        audio_reference=uniform(generators("audio", "Reference")) < recipe.probability("audio", Reference),
        keyframes=keyframes,
    )


def _has_cell_rules(rules: Sequence[Rule]) -> bool:
    return any(isinstance(rule, CellRule | Clean) for rule in rules)


def _merged(rules: Sequence[Rule], learned: Tensor, generators: Generators, stream: str, shape: ItemShape) -> Tensor:
    """Bool of the stream's cells, as `learned` is: those that the loss weighs as long as they are generated."""
    clean = torch.zeros_like(learned)
    for rule in rules:
        if isinstance(rule, CellRule):
            generator = generators(stream, type(rule).__name__)
            if uniform(generator) < rule.probability:
                more = clean | rule.cells(tuple(learned.shape), generator, shape)
                clean = more if bool((learned & ~more).any()) else clean
    return clean
