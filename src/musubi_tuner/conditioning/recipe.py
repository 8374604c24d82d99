"""Conditioning recipes: which latents of a clip are conditioning and which are generated, as lists of rules for each stream.

A recipe is a TOML with `[[video]]` and `[[audio]]` tables; each names a `rule`, its `probability` and its own settings. A rule is one
class: its fields, how they are checked, and the cells that it makes conditioning. A new rule is a new class, and its name in
`VIDEO_RULES` or `AUDIO_RULES`.

Each rule is drawn independently for every clip and epoch, by a generator that is named after the rule's class; the conditioning cells of
all drawn rules are merged:

    first_frame   # . . . .      cells in time, # = conditioning: clean (sigma 0), without loss
    suffix        . . . # #
    merged        # . . # #
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from musubi_tuner.config.conditioning import ConditioningOptions
from musubi_tuner.config.validation import Between, Wording, nearest, options, validated
from musubi_tuner.ltxv2.geometry import AUDIO_LATENTS_PER_SECOND
from musubi_tuner.runtime.draws import uniform
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_toml

_WHITE = 0.5
"""A cell of which more is white is generated."""

Cells = tuple[int, ...]
"""(F, H, W) latent cells of a video, (T,) of audio."""
Range = tuple[float, float]
"""Lowest and highest value; a draw lies between them, both included."""
Frames = Annotated[Range, Between(1, whole=True)]
Part = Annotated[Range, Between(0.0, 1.0)]
Seconds = Annotated[Range, Between(0.04)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemShape:
    """What there is of an item to lay rules over."""

    video: tuple[int, int, int] | None
    """(F, H, W) latent cells"""
    audio_steps: int
    mask: Tensor | None = None
    """(F, H, W) share of white in its mask; None = it has none."""
    keyframes: tuple[int, ...] = ()
    """Pixel frames whose one-frame latents are cached."""


@options
class Rule:
    """Something that is conditioning instead of generated, in a share of the items."""

    probability: Annotated[int | float, Field(ge=0, le=1), Wording("a share from 0 to 1")] = 1.0


@options
class CellRule(Rule):
    """A rule for cells of the stream itself."""

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        """Bool of the stream's shape, True = conditioning."""
        raise NotImplementedError


@options
class FirstFrame(CellRule):
    """Image to video: the first frame."""

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        return _spans(shape, range(1))


@options
class Prefix(CellRule):
    """The beginning, and the clip goes on from it."""

    latent_frames: Frames = (1, 4)
    """n latent frames are 8n - 7 frames."""

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        return _spans(shape, range(min(_whole(self.latent_frames, generator), shape[0] - 1)))


@options
class Suffix(CellRule):
    """The end, and the clip leads up to it."""

    latent_frames: Frames = (1, 4)
    """n latent frames are 8n frames."""

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        count = min(_whole(self.latent_frames, generator), shape[0] - 1)
        return _spans(shape, range(shape[0] - count, shape[0]))


At = Annotated[
    tuple[Literal["first", "last", "interior", "random"], ...],
    Field(min_length=1),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value),
    Wording("a list of first, last, interior, random"),
    AfterValidator(lambda value: tuple(dict.fromkeys(value))),
]
"""`interior` is neither the first nor the last, `random` anywhere."""


@options
class Keyframes(CellRule):
    """`keyframes_in_place`: single latent frames, eight frames each but for the first, and the clip passes through them.

    Its draws and its name in the metadata are of before there was `KeyframesBeside`.
    """

    at: At = ("first", "last")
    count: Frames = (1, 1)
    """How many `interior` or `random` ones."""

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        return _spans(shape, _chosen(self.at, self.count, range(shape[0]), shape[0] - 1, generator))


@options
class KeyframesBeside(Rule):
    """`keyframes`: single pictures beside the clip, each at the time of its frame, of those that the dataset caches."""

    at: At = ("first", "last")
    count: Frames = (1, 1)
    """How many `interior` or `random` ones, as far as so many are cached."""

    def frames(self, cached: Sequence[int], last: int, generator: torch.Generator) -> tuple[int, ...]:
        """A draw from the pixel frames `cached`, in order; `last` is the number of the clip's last one."""
        return tuple(sorted(set(_chosen(self.at, self.count, cached, last, generator))))

    def lacking(self, cached: Sequence[int], last: int) -> list[str]:
        """What of `at` the frames `cached` have none of."""
        return [name for name in self.at if not _pool(name, cached, last)]

    def most(self, cached: Sequence[int], last: int) -> int:
        """How many it draws at most."""
        counts = [1 if name in ("first", "last") else int(self.count[1]) for name in self.at]
        pools = [len(_pool(name, cached, last)) for name in self.at]
        return min(len(cached), sum(map(min, counts, pools)))


@options
class Crop(CellRule):
    """Outpainting: a rectangle of every frame, and what is around it is generated."""

    size: Part = (0.3, 0.8)
    """Sides of the rectangle, as shares of the frame's; drawn separately."""

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        return _rectangle(shape, self.size, generator)


@options
class Box(CellRule):
    """Inpainting: all around a rectangle, which is generated."""

    size: Part = (0.2, 0.6)
    """Sides of the rectangle, as shares of the frame's; drawn separately."""
    duration: Part = (1.0, 1.0)
    """For how much of the clip, as a share of it; outside of it everything is conditioning."""

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        count = _share(self.duration, shape[0], generator)
        start = _place(shape[0] - count, generator)
        return ~(_spans(shape, range(start, start + count)) & _rectangle(shape, self.size, generator))


@options
class Mask(CellRule):
    """Inpainting by the dataset's masks: white is generated, black is conditioning. Without this rule a mask weighs the loss."""

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        return torch.zeros(shape, dtype=torch.bool) if item.mask is None else item.mask <= _WHITE


@options
class Clean(Rule):
    """The whole stream: the other one is generated from it."""


@options
class Reference(Rule):
    """The dataset's reference, shown or played beside the clip (IC-LoRA)."""


@options
class SoundPrefix(CellRule):
    """The audio's beginning."""

    seconds: Seconds = (0.5, 2.0)

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        return _spans(shape, range(_steps(self.seconds, shape, generator)))


@options
class SoundSuffix(CellRule):
    """The audio's end."""

    seconds: Seconds = (0.5, 2.0)

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        return _spans(shape, range(shape[0] - _steps(self.seconds, shape, generator), shape[0]))


@options
class SoundGap(CellRule):
    """Inpainting of audio: all but a stretch, which is generated."""

    seconds: Seconds = (0.5, 2.0)

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        count = _steps(self.seconds, shape, generator)
        start = _place(shape[0] - count, generator)
        return ~_spans(shape, range(start, start + count))


VIDEO_RULES: dict[str, type[Rule]] = {
    "first_frame": FirstFrame,
    "prefix": Prefix,
    "suffix": Suffix,
    "keyframes": KeyframesBeside,
    "keyframes_in_place": Keyframes,
    "crop": Crop,
    "box": Box,
    "clean": Clean,
    "mask": Mask,
    "reference": Reference,
}
AUDIO_RULES: dict[str, type[Rule]] = {
    "prefix": SoundPrefix,
    "suffix": SoundSuffix,
    "gap": SoundGap,
    "clean": Clean,
    "reference": Reference,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The rules of both streams, in order. Without any, everything is generated from the text."""

    video: tuple[Rule, ...] = ()
    audio: tuple[Rule, ...] = ()

    def probability(self, stream: str, kind: type[Rule]) -> float:
        """Of the stream's rule of that kind, 0 where it has none."""
        return next((rule.probability for rule in getattr(self, stream) if type(rule) is kind), 0.0)

    @property
    def masks_weigh(self) -> bool:
        """Whether the dataset's masks weigh the loss, as no rule uses them."""
        return not self.probability("video", Mask)

    @property
    def keyframes(self) -> KeyframesBeside | None:
        """Its rule for pictures beside the clip; None where it has none, or never draws it."""
        return next((rule for rule in self.video if isinstance(rule, KeyframesBeside) and rule.probability), None)

    def with_most_keyframes(self) -> "Recipe":
        """Every item is shown as many as there may be."""

        def most(rule: Rule) -> Rule:
            if not isinstance(rule, KeyframesBeside) or not rule.probability:
                return rule
            return dataclasses.replace(rule, probability=1.0, count=(rule.count[1], rule.count[1]))

        return dataclasses.replace(self, video=tuple(most(rule) for rule in self.video))

    def describe(self) -> dict[str, list[dict[str, Any]]]:
        """As plain JSON values, for metadata and for comparing a resumed run."""
        return {
            stream: [
                {"rule": type(rule).__name__}
                | {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(rule).items()}
                for rule in getattr(self, stream)
            ]
            for stream in ("video", "audio")
        }


def make_recipe(options: ConditioningOptions, mode: str) -> Recipe:
    """The recipe of a run.

    Args:
        mode: `video`, `av` or `audio`; a rule for a stream that the mode lacks is refused.

    Raises:
        UserError: names file, rule, value and what is allowed.
    """
    share, path = options.first_frame_conditioning_p, options.conditioning_config
    recipe = Recipe() if path is None else load_recipe(path)
    if share:
        if recipe.probability("video", FirstFrame):
            raise UserError(f"--first_frame_conditioning_p {share}: {path} has a rule 'first_frame' too; keep one.")
        recipe = dataclasses.replace(recipe, video=(FirstFrame(probability=share), *recipe.video))
    where = path or "--first_frame_conditioning_p"
    lacking = {"video": "audio", "audio": "video"}.get(mode)
    if lacking and getattr(recipe, lacking):
        raise UserError(f"{where}: has rules for the {lacking} stream, which --ltx_mode {mode} does not train. Give --ltx_mode av.")
    for stream, other in (("video", "audio"), ("audio", "video")):
        if recipe.probability(stream, Clean) and mode != "av":
            raise UserError(f"{where}: the rule 'clean' takes the whole {stream} and generates the {other} from it. Give --ltx_mode av.")
    return recipe


def load_recipe(path: Path) -> Recipe:
    """Read a recipe TOML.

    Raises:
        UserError: names the section, the key, the value and what is allowed.
    """
    values = read_toml(path, named="--conditioning_config", remedy="Ready recipes are in conditioning_recipes/.")
    known = {"video": VIDEO_RULES, "audio": AUDIO_RULES}
    for key, entries in values.items():
        if key not in known:
            raise UserError(f"{path}: unknown section '{key}'.{nearest(key, known)} There are [[video]] and [[audio]].")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: [{key}] must be written [[{key}]].")
    rules = {}
    for stream, kinds in known.items():
        names = [entry.get("rule") for entry in values.get(stream, [])]
        rules[stream] = tuple(_rule(path, stream, entry, kinds) for entry in values.get(stream, []))
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: [[{stream}]] has the rule '{twice[0]}' twice; keep one.")
    recipe = Recipe(**rules)
    both = recipe.probability("video", Clean) + recipe.probability("audio", Clean)
    if both > 1:
        raise UserError(
            f"{path}: the rules 'clean' of both streams have probabilities of {both:g} together; at most 1, as one is generated."
        )
    return recipe


def _rule(path: Path, stream: str, entry: Mapping[str, Any], kinds: Mapping[str, type[Rule]]) -> Rule:
    name = entry.get("rule")
    if not isinstance(name, str) or name not in kinds:
        hint = nearest(name, kinds) if isinstance(name, str) else ""
        raise UserError(f"{path}: [[{stream}]] rule = {name!r}: must be one of {', '.join(kinds)}.{hint}")
    settings = {key: value for key, value in entry.items() if key != "rule"}
    return validated(kinds[name], settings, where=f"{path}: [[{stream}]] rule '{name}'")


def _chosen(at: Sequence[str], count: Range, frames: Sequence[int], last: int, generator: torch.Generator) -> list[int]:
    """Of the ascending `frames`, those of each name of `at`; the same frame may be in it twice."""
    chosen: list[int] = []
    for name in at:
        pool = _pool(name, frames, last)
        wanted = _whole(count, generator) if name in ("interior", "random") else 1
        order = torch.randperm(len(pool), generator=generator).tolist()
        chosen += [pool[place] for place in order[:wanted]]
    return chosen


def _pool(name: str, frames: Sequence[int], last: int) -> list[int]:
    """Those of `frames` that are first (0), last, between them or, by `random`, any."""
    fits = {"first": lambda frame: frame == 0, "last": lambda frame: frame == last, "interior": lambda frame: 0 < frame < last}
    return [frame for frame in frames if name == "random" or fits[name](frame)]


def _spans(cells: Cells, places: Sequence[int]) -> Tensor:
    """True at `places` of the first axis, which is time."""
    inside = torch.zeros(cells, dtype=torch.bool)
    inside[list(places)] = True
    return inside


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
    wanted = round((low + (high - low) * uniform(generator)) * AUDIO_LATENTS_PER_SECOND)
    return min(max(1, wanted), cells[0] - 1)


def _share(size: Range, cells: int, generator: torch.Generator) -> int:
    low, high = size
    return max(1, round((low + (high - low) * uniform(generator)) * cells))


def _whole(found: Range, generator: torch.Generator) -> int:
    return int(torch.randint(int(found[0]), int(found[1]) + 1, (), generator=generator))


def _place(room: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, room + 1, (), generator=generator))
