"""Sounds of the small world, at 16 kHz and as long as the pictures: a steady voice, or beats of it where something bounces.

All partials are multiples of 100 Hz and begin on a hop of 10 ms, so that their phase is the same at every hop: a spectrogram without phases
then says all that the vocoder has to know. Level and beginning vary from clip to clip, or a model would learn the few sounds by heart.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.tiny.world.scenes import FPS, FRAMES
from musubi_tuner.tiny.world.subjects import CHARACTER_PITCHES, PITCHES, CharacterSubject, Subject

RATE = 16000
SAMPLES = FRAMES * RATE // FPS
_HOP = 0.01
_HIGHEST = 7500.0
"""Hertz; partials above are left out."""
_LEVEL = 0.28
LEVELS = (0.6, 1.1)
LATEST_HOP = 12
"""Of a steady voice's beginning."""
_RISE = 0.005
"""Seconds from silence to the whole level."""
CONTACTS = (0.25, 0.75)
"""Where beats are, as shares of the clip."""
_DECAY = 9.0
_TURN = 0.125
"""Seconds of each pitch of a voice that alternates."""

Partials = tuple[tuple[float, float], ...]
"""(hertz, amplitude) each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """All that a clip's sound depends on."""

    partials: Partials
    alternate: Partials = ()
    """Of a voice that goes to and fro, those of every second turn."""
    beats: bool
    level: float
    start: float = 0.0
    """seconds, a multiple of 0.01; beats have their own places"""


def sound_of(subject: Subject | CharacterSubject, rng: random.Random) -> Sound:
    """The subject's voice; its level and its beginning are drawn."""
    beats = subject.motion == "bounces"
    level = _LEVEL * rng.uniform(*LEVELS)
    start = _HOP * rng.randrange(LATEST_HOP + 1)
    if isinstance(subject, CharacterSubject):
        low, high = (character_partials(pitch) for pitch in CHARACTER_PITCHES)
        return Sound(partials=low, alternate=high, beats=beats, level=level, start=start)
    return Sound(partials=partials_of(subject.timbre, PITCHES[subject.pitch]), beats=beats, level=level, start=start)


def partials_of(timbre: str, pitch: float) -> Partials:
    """Of `hum` (one partial), `buzz` (twelve, falling) and `reed` (odd ones, nearly even)."""
    if timbre == "hum":
        return ((pitch, 1.0),)
    if timbre == "buzz":
        numbers, share, fall = range(1, 13), 0.55, 0.7
    else:
        assert timbre == "reed", timbre
        numbers, share, fall = range(1, 8, 2), 0.7, 0.3
    return tuple((pitch * number, share / number**fall) for number in numbers if pitch * number < _HIGHEST)


def character_partials(pitch: float) -> Partials:
    return tuple((pitch * number, share) for number, share in ((1, 0.6), (2, 0.5), (4, 0.4)))


def draw_sounds(sounds: Sequence[Sound], device: torch.device | str = "cpu") -> Tensor:
    """(B, SAMPLES) float32 on `device`."""
    seconds = torch.arange(SAMPLES, dtype=torch.float64, device=device) / RATE
    wave = _tones([one.partials for one in sounds], seconds)
    if any(one.alternate for one in sounds):
        other = _tones([one.alternate or one.partials for one in sounds], seconds)
        wave = torch.where((seconds / _TURN).long() % 2 == 1, other, wave)
    start = torch.tensor([one.start for one in sounds], dtype=torch.float64, device=device)[:, None]
    steady = ((seconds - start) / _RISE).clamp(0, 1)
    share = seconds * RATE / SAMPLES
    beats = torch.stack([torch.where(share >= at, torch.exp(-_DECAY * (share - at)), 0.0) for at in CONTACTS]).amax(0)
    has_beats = torch.tensor([one.beats for one in sounds], device=device)[:, None]
    level = torch.tensor([one.level for one in sounds], dtype=torch.float64, device=device)[:, None]
    return (wave * level * torch.where(has_beats, beats, steady)).float()


def _tones(partials: Sequence[Partials], seconds: Tensor) -> Tensor:
    """(B, SAMPLES) float64 sums of sines; at 0 s each begins at 0."""
    longest = max(map(len, partials))
    table = torch.tensor([(*one, *((0.0, 0.0),) * (longest - len(one))) for one in partials], dtype=torch.float64, device=seconds.device)
    hertz, amplitude = table[..., 0, None], table[..., 1, None]
    return (amplitude * torch.sin(2 * math.pi * hertz * seconds)).sum(1)
