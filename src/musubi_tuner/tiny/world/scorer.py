"""Reads a clip of the small world: what is seen and heard, by measuring and without a network.

An object is what differs from the ground. Its shape is the one whose outline, drawn in the middle of it at some size, covers it best; its
motion is that of its center. A voice is the one whose mean spectrum is most alike; beats are heard where they would be in a bounce.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.ltxv2.autoencoders.audio_vae import log_mel
from musubi_tuner.tiny.world.scenes import FRAMES, RADII, RUN, SIZE, covers
from musubi_tuner.tiny.world.sounds import CONTACTS, Sound, character_partials, draw_sounds, partials_of
from musubi_tuner.tiny.world.subjects import (
    CHARACTER,
    CHARACTER_COLOR,
    CHARACTER_COLOR_NAME,
    CHARACTER_EYE,
    CHARACTER_PITCHES,
    CHARACTER_SHAPE,
    COLORS,
    GROUNDS,
    PITCHES,
    SHAPES,
    TIMBRES,
    CharacterSubject,
    Color,
    Subject,
)

_NAMED_COLORS = COLORS | {CHARACTER_COLOR_NAME: CHARACTER_COLOR}
_KNOWN_SHAPES = (*SHAPES, CHARACTER_SHAPE)
_LEAST_DIFFERENCE, _CONTRAST = 40.0, 0.45
"""An object's pixels differ from the ground by so much at least, and by so much of the strongest difference."""
_LEAST_AREA = 40
"""pixels in each frame"""
_LOOKED_AT = (2, 8, 14)
"""Frames in which outlines are compared."""
_SIZES = 5
_EYE_RADIUS = 4.0
_EYE_DISTANCE = 90.0
_BEAT_RATIO = 2.0
_LEAST_ALIKE = 0.5
_SILENCE = 1e-3
"""Of the loudest mel bin's root mean square."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What is seen; None where there is no object throughout."""

    ground: str
    color: str | None = None
    rgb: tuple[float, ...] | None = None
    """The object's own, 0 to 255."""
    shape: str | None = None
    motion: str | None = None
    center: tuple[float, float] | None = None
    """Mean place of the object, from the left and from above, 0 to 1."""
    overlap: float = 0.0
    """Intersection over union with the best outline of `shape`."""
    star_overlap: float = 0.0
    eye_distance: float = math.inf
    """Between the color in the object's middle and that of the character's eye, 0 to 442."""

    @property
    def is_character(self) -> bool:
        """By shape, color and eye."""
        return self.shape == CHARACTER_SHAPE and self.color == CHARACTER_COLOR_NAME and self.has_eye

    @property
    def has_eye(self) -> bool:
        return self.eye_distance < _EYE_DISTANCE


@dataclass(frozen=True, kw_only=True, slots=True)
class Hearing:
    """What is heard."""

    voice: str | None
    """`low hum` and so on, or the character's name; None for silence and for what is like none of them."""
    alike: Mapping[str, float]
    """Cosine with the spectrum of each voice."""
    beats: bool

    @property
    def pitch(self) -> str | None:
        return None if self.voice is None else self.voice.split()[0]

    @property
    def timbre(self) -> str | None:
        return None if self.voice is None else self.voice.split()[-1]


def see(frames: Tensor) -> Sight:
    """(17, 96, 96, 3) values of 0 to 255, of any dtype, on the CPU."""
    assert frames.shape == (FRAMES, SIZE, SIZE, 3), tuple(frames.shape)
    picture = frames.float()
    edges = (picture[:, :2].flatten(0, 2), picture[:, -2:].flatten(0, 2), picture[:, :, :2].flatten(0, 2), picture[:, :, -2:].flatten(0, 2))
    ground = torch.cat(edges).median(0).values
    ground_name = _nearest(ground, GROUNDS)
    difference = (picture - ground).norm(dim=-1)
    mask = difference > max(_LEAST_DIFFERENCE, _CONTRAST * float(difference.flatten().quantile(0.97)))
    area = mask.flatten(1).sum(1).float()
    if bool((area < _LEAST_AREA).any()):
        return Sight(ground=ground_name)
    grid = torch.arange(SIZE) + 0.5
    x, y = (mask.sum(1) * grid).sum(1) / area, (mask.sum(2) * grid).sum(1) / area
    strongest = difference.flatten(1).quantile(0.97, dim=1)[:, None, None]
    color = picture[mask & (difference > 0.75 * strongest)].median(0).values
    overlaps = _overlaps(mask, x, y)
    shape = max(overlaps, key=lambda name: overlaps[name])
    near = (grid[None, :, None] - y[:, None, None]) ** 2 + (grid[None, None] - x[:, None, None]) ** 2 < _EYE_RADIUS**2
    middle = torch.stack([picture[frame][near[frame]].mean(0) for frame in range(FRAMES)]).mean(0)
    return Sight(
        ground=ground_name,
        color=_nearest(color, _NAMED_COLORS),
        rgb=tuple(color.tolist()),
        shape=shape,
        motion=_motion(x, y),
        center=(float(x.mean()) / SIZE, float(y.mean()) / SIZE),
        overlap=overlaps[shape],
        star_overlap=overlaps[CHARACTER_SHAPE],
        eye_distance=float((middle - torch.tensor(CHARACTER_EYE)).norm()),
    )


def hear(waves: Tensor) -> Hearing:
    """(channels, n) samples at 16 kHz, on the CPU."""
    return hear_mel(log_mel(waves[None].float())[0])


def hear_mel(mel: Tensor) -> Hearing:
    """(channels, T, 64) natural log of mel magnitudes, on the CPU."""
    mel = mel.float().mean(0)
    alike = {name: float(_spectrum(mel) @ other) for name, other in _voices().items()}
    voice = max(alike, key=lambda name: alike[name])
    loudest = float(mel.exp().square().mean(0).sqrt().max())
    heard = voice if loudest > _SILENCE and alike[voice] > _LEAST_ALIKE else None
    return Hearing(voice=heard, alike=alike, beats=_beat_ratio(mel) > _BEAT_RATIO)


def base_scores(subjects: Sequence[Subject], sights: Sequence[Sight], hearings: Sequence[Hearing]) -> dict[str, float]:
    """Shares of clips in which each word of the caption is seen or heard."""
    rights: dict[str, list[bool]] = {}
    for subject, sight, hearing in zip(subjects, sights, hearings, strict=True):
        for name in ("color", "shape", "motion", "ground"):
            rights.setdefault(name, []).append(getattr(sight, name) == getattr(subject, name))
        rights.setdefault("voice", []).append(hearing.voice == subject.voice)
        rights.setdefault("pitch", []).append(hearing.pitch == subject.pitch)
        rights.setdefault("timbre", []).append(hearing.timbre == subject.timbre)
        rights.setdefault("beats", []).append(hearing.beats == (subject.motion == "bounces"))
    return _shares(rights)


def character_scores(subjects: Sequence[CharacterSubject], sights: Sequence[Sight], hearings: Sequence[Hearing]) -> dict[str, float]:
    """Shares of clips with the character's shape, color, eye, all three of them, its voice, and the caption's motion and ground."""
    rights: dict[str, list[bool]] = {}
    for subject, sight, hearing in zip(subjects, sights, hearings, strict=True):
        rights.setdefault("shape", []).append(sight.shape == CHARACTER_SHAPE)
        rights.setdefault("color", []).append(sight.color == CHARACTER_COLOR_NAME)
        rights.setdefault("eye", []).append(sight.has_eye)
        rights.setdefault("identity", []).append(sight.is_character)
        rights.setdefault("voice", []).append(hearing.voice == CHARACTER)
        rights.setdefault("motion", []).append(sight.motion == subject.motion)
        rights.setdefault("ground", []).append(sight.ground == subject.ground)
    return _shares(rights)


def _shares(rights: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in rights.items()}


def _nearest(color: Tensor, names: Mapping[str, Color]) -> str:
    return min(names, key=lambda name: float((torch.tensor(names[name]) - color).norm()))


def _motion(x: Tensor, y: Tensor) -> str:
    """Of centers (17,), by their way from the first three frames to the last three; a bounce is low in between, twice."""
    run = RUN * (SIZE - sum(RADII))
    across, down = float(x[-3:].mean() - x[:3].mean()), float(y[-3:].mean() - y[:3].mean())
    dip = float((y[3:6].mean() + y[11:14].mean()) / 2 - (y[0] + y[7:10].mean() + y[-1]) / 3)
    if dip > 0.22 * run:
        return "bounces"
    if max(abs(across), abs(down)) < 0.25 * run:
        return "stands still"
    if abs(across) > abs(down):
        return "moves right" if across > 0 else "moves left"
    return "falls" if down > 0 else "rises"


def _overlaps(mask: Tensor, x: Tensor, y: Tensor) -> dict[str, float]:
    """Intersection over union with each known outline, at the size that covers best, the mean of some frames."""
    frames = list(_LOOKED_AT)
    looked_at, centers = mask[frames], torch.stack([x[frames], y[frames]], 1).double()
    found = {}
    for shape in _KNOWN_SHAPES:
        values = []
        for radius, offset in _outlines(shape):
            outline = covers(shape, (centers - offset)[None], torch.tensor([radius], dtype=torch.float64))[0] > 0.5
            values.append(float((outline & looked_at).sum() / (outline | looked_at).sum()))
        found[shape] = max(values)
    return found


@functools.cache
def _outlines(shape: str) -> tuple[tuple[float, Tensor], ...]:
    """Radii to try, and where a shape's center of mass is, from its center: (radius, (2,))."""
    found = []
    grid = torch.arange(SIZE, dtype=torch.float64) + 0.5
    for radius in torch.linspace(0.95 * RADII[0], 1.08 * RADII[1], _SIZES, dtype=torch.float64):
        middle = torch.full((1, 1, 2), SIZE / 2, dtype=torch.float64)
        filled = (covers(shape, middle, radius[None])[0, 0] > 0.5).double()
        mass = torch.stack([(filled.sum(0) * grid).sum(), (filled.sum(1) * grid).sum()]) / filled.sum()
        found.append((float(radius), mass - SIZE / 2))
    return tuple(found)


def _spectrum(mel: Tensor) -> Tensor:
    """(T, 64) log mel -> (64,) shape of the mean spectrum on a log scale, of length 1 whatever the level."""
    loudness = (mel.exp().square().mean(0).sqrt() + 1e-4).log()
    centered = loudness - loudness.mean()
    return centered / centered.norm().clamp(min=1e-6)


@functools.cache
def _voices() -> dict[str, Tensor]:
    """Spectrum of each voice, held steadily."""
    sounds = {
        f"{pitch} {timbre}": Sound(partials=partials_of(timbre, hertz), beats=False, level=0.28)
        for pitch, hertz in PITCHES.items()
        for timbre in TIMBRES
    }
    low, high = (character_partials(pitch) for pitch in CHARACTER_PITCHES)
    sounds[CHARACTER] = Sound(partials=low, alternate=high, beats=False, level=0.28)
    mels = log_mel(draw_sounds(list(sounds.values()))[:, None])[:, 0]
    return {name: _spectrum(mel) for name, mel in zip(sounds, mels, strict=True)}


def _beat_ratio(mel: Tensor) -> float:
    """Loudness after the places of beats over that before them."""
    loudness = mel.exp().mean(1)
    hops = len(loudness)

    def mean(start: float, end: float) -> float:
        return float(loudness[int(start * hops) : int(end * hops)].mean())

    first, second = CONTACTS
    after = mean(first + 0.02, first + 0.15) + mean(second + 0.02, second + 0.15)
    return after / (mean(0, first - 0.05) + mean(first + 0.35, second - 0.03) + 1e-5)
