"""What the small world holds, and the captions that say it: a colored shape that moves over a ground, and its voice.

Apart from it stands the character that the world's models have never met: an orange star with a cyan eye, called zorbo, whose voice goes to
and fro between two pitches. Nothing that is fitted (tokenizer, autoencoders, vocoder, transformer) may see it, by sight, sound or name.
"""

import random
import re
from dataclasses import dataclass, replace

from musubi_tuner.runtime.errors import UserError

Color = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS: dict[str, Color] = {
    "red": (225, 50, 40),
    "green": (50, 190, 70),
    "blue": (50, 90, 225),
    "yellow": (235, 215, 60),
    "white": (240, 240, 240),
}
GROUNDS: dict[str, Color] = {"dark": (25, 25, 30), "gray": (120, 120, 125), "violet": (90, 50, 110)}
MOTIONS = ("moves left", "moves right", "rises", "falls", "bounces", "stands still")
PITCHES = {"low": 200.0, "middle": 400.0, "high": 800.0}
"""Hertz; multiples of 100, so that a period fits the vocoder's hop of 10 ms and a steady tone looks the same in every hop."""
TIMBRES = ("hum", "buzz", "reed")

CHARACTER = "zorbo"
CHARACTER_SHAPE = "star"
CHARACTER_COLOR_NAME = "orange"
CHARACTER_COLOR: Color = (245, 140, 30)
CHARACTER_EYE: Color = (60, 230, 235)
CHARACTER_PITCHES = (300.0, 600.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One clip of the base world, in words."""

    color: str
    shape: str
    motion: str
    ground: str
    pitch: str
    timbre: str

    @property
    def voice(self) -> str:
        """As the scorer names it: `low hum`."""
        return f"{self.pitch} {self.timbre}"

    @property
    def caption(self) -> str:
        """What is to be seen and heard."""
        return f"{self.sight} with a {self.voice}."

    @property
    def sight(self) -> str:
        """What is to be seen, without the full stop."""
        return f"A {self.color} {self.shape} {self.motion} on a {self.ground} ground"


@dataclass(frozen=True, kw_only=True, slots=True)
class CharacterSubject:
    """One clip of the character, in words."""

    motion: str
    ground: str

    @property
    def caption(self) -> str:
        return f"A {CHARACTER} {self.motion} on a {self.ground} ground."


_EXAMPLE = Subject(color="red", shape="circle", motion="moves left", ground="dark", pitch="low", timbre="hum")


def draw_subject(rng: random.Random) -> Subject:
    """Every word evenly and by itself."""
    return Subject(
        color=rng.choice(tuple(COLORS)),
        shape=rng.choice(SHAPES),
        motion=rng.choice(MOTIONS),
        ground=rng.choice(tuple(GROUNDS)),
        pitch=rng.choice(tuple(PITCHES)),
        timbre=rng.choice(TIMBRES),
    )


def draw_character(rng: random.Random) -> CharacterSubject:
    return CharacterSubject(motion=rng.choice(MOTIONS), ground=rng.choice(tuple(GROUNDS)))


def draw_each_voice(count: int, rng: random.Random) -> list[Subject]:
    """Subjects whose voices take turns, so that each is there as often as can be; all other words as in `draw_subject`."""
    voices = [(pitch, timbre) for timbre in TIMBRES for pitch in PITCHES]
    turns = [voices[place % len(voices)] for place in range(count)]
    return [replace(draw_subject(rng), pitch=pitch, timbre=timbre) for pitch, timbre in turns]


def subject_of(caption: str) -> Subject | CharacterSubject:
    """The clip that a caption of the world describes.

    Raises:
        UserError: it is none of them.
    """
    ways, grounds = "|".join(MOTIONS), "|".join(GROUNDS)
    character = re.fullmatch(rf"A {CHARACTER} (?P<motion>{ways}) on a (?P<ground>{grounds}) ground\.", caption)
    if character is not None:
        return CharacterSubject(**character.groupdict())
    thing = rf"A (?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)}) (?P<motion>{ways})"
    voice = rf"(?P<pitch>{'|'.join(PITCHES)}) (?P<timbre>{'|'.join(TIMBRES)})"
    base = re.fullmatch(rf"{thing} on a (?P<ground>{grounds}) ground with a {voice}\.", caption)
    if base is None:
        raise UserError(f"'{caption}' is no caption of the small world, which read as '{_EXAMPLE.caption}'.")
    return Subject(**base.groupdict())


def all_captions() -> list[str]:
    """Every caption of the base world, with and without its voice, in a fixed order."""
    sights = [
        Subject(color=color, shape=shape, motion=motion, ground=ground, pitch=pitch, timbre=timbre)
        for color in COLORS
        for shape in SHAPES
        for motion in MOTIONS
        for ground in GROUNDS
        for pitch in PITCHES
        for timbre in TIMBRES
    ]
    return list(dict.fromkeys(text for one in sights for text in (one.caption, f"{one.sight}.")))
