"""What autoencoders and the vocoder are trained on: the base world, and things of any shape, color and voice beside it.

Never the character: no scene has its colors, and no sound its pair of pitches.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.tiny.world.scenes import RADII, Scene, draw_path, draw_scenes, scene_of
from musubi_tuner.tiny.world.sounds import Sound, draw_sounds, partials_of, sound_of
from musubi_tuner.tiny.world.subjects import (
    CHARACTER_PITCHES,
    CHARACTER_SHAPE,
    GROUNDS,
    MOTIONS,
    SHAPES,
    TIMBRES,
    Color,
    draw_subject,
)

_OTHER_SHAPES = (*SHAPES, CHARACTER_SHAPE, CHARACTER_SHAPE, "diamond")
_PAIRS = [
    (100.0 * first, 100.0 * second)
    for first in range(1, 9)
    for second in range(1, 9)
    if first != second and {100.0 * first, 100.0 * second} != set(CHARACTER_PITCHES)
]
"""Pitches of voices that go to and fro."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """How much of what."""

    others: float = 0.5
    """Share of things that are not of the base world."""
    eyes: float = 0.4
    """Share of those that have an eye, of any color."""


def any_scene(rng: random.Random, mixture: Mixture) -> Scene:
    if rng.random() >= mixture.others:
        return scene_of(draw_subject(rng), rng)
    radius = rng.uniform(0.8 * RADII[0], 1.1 * RADII[1])
    shape, color = rng.choice(_OTHER_SHAPES), _any_color(rng)
    path = draw_path(rng.choice(MOTIONS), radius, rng)
    eye, eye_size = (_any_color(rng), rng.uniform(0.25, 0.4)) if rng.random() < mixture.eyes else (None, 0.3)
    ground = GROUNDS[rng.choice(tuple(GROUNDS))] if rng.random() < 0.7 else _any_color(rng)
    return Scene(shape=shape, color=color, ground=ground, radius=radius, path=path, eye=eye, eye_size=eye_size)


def any_frames(count: int, seed: int, mixture: Mixture = Mixture()) -> Tensor:
    """(count, 17, 96, 96, 3) uint8"""
    rng = random.Random(seed)
    return draw_scenes([any_scene(rng, mixture) for _ in range(count)])


def any_sound(rng: random.Random) -> Sound:
    """A voice of the base world, one of another pitch, two at once, or one that goes to and fro between two pitches."""
    lot = rng.random()
    known = sound_of(draw_subject(rng), rng)
    if lot < 0.45:
        return known
    level, start, beats = known.level, known.start, known.beats
    first, second = (partials_of(rng.choice(TIMBRES), 100.0 * rng.randint(1, 12)) for _ in range(2))
    if lot < 0.7:
        return Sound(partials=first, beats=beats, level=level, start=start)
    if lot < 0.82:
        both = tuple((hertz, 0.6 * share) for hertz, share in (*first, *second))
        return Sound(partials=both, beats=beats, level=level, start=start)
    low, high = (_any_partials(pitch, rng) for pitch in rng.choice(_PAIRS))
    return Sound(partials=low, alternate=high, beats=beats, level=level, start=start)


def any_waves(sounds: Sequence[Sound], rng: random.Random) -> Tensor:
    """(B, 2, SAMPLES) float32: the sounds on both channels, half of them with a little hiss."""
    waves = draw_sounds(sounds)
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    hiss = torch.tensor([0.004 * rng.random() * (rng.random() < 0.5) for _ in sounds])[:, None]
    waves = waves + hiss * torch.randn(waves.shape, generator=generator)
    return waves[:, None].expand(-1, 2, -1).contiguous()


def _any_partials(pitch: float, rng: random.Random) -> tuple[tuple[float, float], ...]:
    return tuple((pitch * number, rng.uniform(0.2, 0.7)) for number in (1, 2, 3, 4) if number == 1 or rng.random() < 0.6)


def _any_color(rng: random.Random) -> Color:
    red, green, blue = (rng.randint(15, 250) for _ in range(3))
    return red, green, blue
