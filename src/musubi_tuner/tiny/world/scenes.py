"""Pictures of the small world: one soft-edged object that moves over an even ground, 17 frames of 96 x 96 at 24 frames a second.

Drawn from signed distances in float64 and rounded to bytes, so that the same scene is the same everywhere. Sizes, speeds and edges are
chosen for the video autoencoder: a cell of 32 x 32 pixels and 8 frames has 128 numbers, which do not hold sharp edges in fast motion.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.tiny.world.subjects import (
    CHARACTER_COLOR,
    CHARACTER_EYE,
    CHARACTER_SHAPE,
    COLORS,
    GROUNDS,
    CharacterSubject,
    Color,
    Subject,
)

SIZE, FRAMES, FPS = 96, 17, 24
EDGE = 2.5
"""Pixels from full cover to none."""
RADII = (19.0, 23.0)
RUN = 0.5
"""Share of the free way that a motion takes."""
_MARGIN = 3
_TOGETHER = {"cpu": 4}
"""Scenes that are drawn at once, by kind of device: few fit a processor's cache."""
_TOGETHER_ELSEWHERE = 128
_CHARACTER_SIZE = 1.06
EYE_SIZE = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """All that a clip's pictures depend on."""

    shape: str
    color: Color
    ground: Color
    radius: float
    """pixels"""
    path: tuple[tuple[float, float], ...]
    """(x, y) of the center in each frame, pixels"""
    eye: Color | None = None
    """Of a disc in the middle, where there is one."""
    eye_size: float = EYE_SIZE
    """Its radius over the object's."""


def scene_of(subject: Subject | CharacterSubject, rng: random.Random) -> Scene:
    """A scene that shows the subject; its size and its place are drawn."""
    radius = rng.uniform(*RADII)
    ground = GROUNDS[subject.ground]
    if isinstance(subject, CharacterSubject):
        radius *= _CHARACTER_SIZE
        path = draw_path(subject.motion, radius, rng)
        return Scene(shape=CHARACTER_SHAPE, color=CHARACTER_COLOR, ground=ground, radius=radius, path=path, eye=CHARACTER_EYE)
    path = draw_path(subject.motion, radius, rng)
    return Scene(shape=subject.shape, color=COLORS[subject.color], ground=ground, radius=radius, path=path)


def draw_path(motion: str, radius: float, rng: random.Random) -> tuple[tuple[float, float], ...]:
    """(x, y) in each of `FRAMES` frames; a bounce touches its ground at a quarter and at three quarters of the clip."""
    low, high = radius + _MARGIN, SIZE - radius - _MARGIN
    x, y = rng.uniform(low, high), rng.uniform(low, high)
    run = (high - low) * RUN
    first = rng.uniform(low, high - run)
    times = [frame / (FRAMES - 1) for frame in range(FRAMES)]
    forth = [first + run * t for t in times]
    back = forth[::-1]
    if motion == "moves left":
        return tuple((place, y) for place in back)
    if motion == "moves right":
        return tuple((place, y) for place in forth)
    if motion == "rises":
        return tuple((x, place) for place in back)
    if motion == "falls":
        return tuple((x, place) for place in forth)
    if motion == "bounces":
        return tuple((x, first + run * (1 - abs(math.cos(2 * math.pi * t)))) for t in times)
    assert motion == "stands still", motion
    return ((x, y),) * FRAMES


def draw_scenes(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """(B, FRAMES, SIZE, SIZE, 3) uint8 on `device`."""
    together = _TOGETHER.get(torch.device(device).type, _TOGETHER_ELSEWHERE)
    return torch.cat([_drawn(scenes[start : start + together], device) for start in range(0, len(scenes), together)])


def _drawn(scenes: Sequence[Scene], device: torch.device | str) -> Tensor:
    ground = _colors([one.ground for one in scenes], device)
    pictures = ground.expand(len(scenes), FRAMES, SIZE, SIZE, 3).clone()
    for shape in dict.fromkeys(one.shape for one in scenes):
        rows = [place for place, one in enumerate(scenes) if one.shape == shape]
        some = [scenes[place] for place in rows]
        pictures[rows] = _over(pictures[rows], covers(shape, _paths(some, device), _radii(some, device)), [one.color for one in some])
    rows = [place for place, one in enumerate(scenes) if one.eye is not None]
    if rows:
        some = [scenes[place] for place in rows]
        radii = _radii(some, device) * torch.tensor([one.eye_size for one in some], dtype=torch.float64, device=device)
        pictures[rows] = _over(
            pictures[rows], covers("circle", _paths(some, device), radii), [one.eye for one in some if one.eye is not None]
        )
    return pictures.round().to(torch.uint8)


def covers(shape: str, path: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel an object covers, 0 to 1, falling smoothly over `EDGE` pixels.

    Args:
        path: (B, F, 2) float64 centers (x, y).
        radius: (B,) float64.

    Returns:
        (B, F, SIZE, SIZE) float64
    """
    grid = torch.arange(SIZE, dtype=torch.float64, device=path.device) + 0.5
    x = grid[None, None, None, :] - path[:, :, 0, None, None]
    y = grid[None, None, :, None] - path[:, :, 1, None, None]
    x, y = torch.broadcast_tensors(x, y)
    share = (0.5 - _DISTANCES[shape](x, y, radius[:, None, None, None]) / EDGE).clamp(0, 1)
    return share * share * (3 - 2 * share)


def _over(pictures: Tensor, cover: Tensor, colors: Sequence[Color]) -> Tensor:
    """(B, F, H, W, 3) with objects of `colors` laid over by `cover` (B, F, H, W)."""
    share = cover[..., None]
    return pictures * (1 - share) + share * _colors(colors, pictures.device)


def _colors(colors: Sequence[Color], device: torch.device | str) -> Tensor:
    """(B, 1, 1, 1, 3)"""
    return torch.tensor(colors, dtype=torch.float64, device=device)[:, None, None, None, :]


def _paths(scenes: Sequence[Scene], device: torch.device | str) -> Tensor:
    return torch.tensor([one.path for one in scenes], dtype=torch.float64, device=device)


def _radii(scenes: Sequence[Scene], device: torch.device | str) -> Tensor:
    return torch.tensor([one.radius for one in scenes], dtype=torch.float64, device=device)


# Signed distances in pixels, or nearly so: negative inside. x, y from the center, y downwards; r broadcasts.


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y) - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.85 * r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    sides = math.sqrt(3) / 2 * x.abs() - 0.5 * y - 0.55 * r
    return torch.maximum(torch.maximum(sides, y - 0.6 * r), -y - 1.1 * r)


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - r, y - 0.33 * r), torch.maximum(x - 0.33 * r, y - r))


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (torch.sqrt(x * x + y * y) - 0.75 * r).abs() - 0.25 * r


def _diamond(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x.abs() + y.abs()) * math.sqrt(0.5) - 0.75 * r


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Five points: the reach falls evenly from each tip to the valleys beside it."""
    turn = torch.atan2(x, -y) * (5 / (2 * math.pi))
    from_tip = (turn - torch.round(turn)).abs() * 2
    return (torch.sqrt(x * x + y * y) - r * (1.15 - 0.72 * from_tip)) * 0.6


_DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
    "star": _star,
}
