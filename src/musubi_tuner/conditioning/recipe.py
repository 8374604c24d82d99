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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from musubi_tuner.config.conditioning import ConditioningOptions
from musubi_tuner.config.validation import Between, Wording, nearest, options, validated
from musubi_tuner.ltxv2.geometry import AUDIO_LATENTS_PER_SECOND
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


@options
class Keyframes(CellRule):
    """Single latent frames, and the clip passes through them."""

    at: Annotated[
        tuple[Literal["first", "last", "interior", "random"], ...],
        Field(min_length=1),
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value),
        Wording("a list of first, last, interior, random"),
        AfterValidator(lambda value: tuple(dict.fromkeys(value))),
    ] = ("first", "last")
    """`interior` is neither the first nor the last, `random` anywhere."""
    count: Frames = (1, 1)
    """How many `interior` or `random` ones."""

    def cells(self, shape: Cells, generator: torch.Generator, item: ItemShape) -> Tensor:
        frames = shape[0]
        pools = {"first": range(1), "last": range(frames - 1, frames), "interior": range(1, frames - 1), "random": range(frames)}
        chosen: list[int] = []
        for name in self.at:
            pool = pools[name]
            count = _whole(self.count, generator) if name in ("interior", "random") else 1
            order = torch.randperm(len(pool), generator=generator).tolist()
            chosen += [pool[place] for place in order[:count]]
        return _spans(shape, chosen)


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
    "keyframes": Keyframes,
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


def draw_conditions(recipe: Recipe, shape: ItemShape, generators: Generators) -> ItemConditions:
    """Apply a recipe to one item.

    A rule that would leave nothing of the stream to be generated is passed over for this item: so stills take part in recipes
    that are made for clips. Clean streams are drawn together, so that one of both is always generated.
    """
    lot = _uniform(generators("one stream"))
    has_both = shape.video is not None and shape.audio_steps > 0
    video = audio = None
    if shape.video is not None and _has_cell_rules(recipe.video):
        video = _merged(recipe.video, shape.video, generators, "video", shape)
        video |= has_both and lot >= 1 - recipe.probability("video", Clean)
    if shape.audio_steps and _has_cell_rules(recipe.audio):
        audio = _merged(recipe.audio, (shape.audio_steps,), generators, "audio", shape)
        audio |= has_both and lot < recipe.probability("audio", Clean)
    return ItemConditions(
        video_clean=video,
        audio_clean=audio,
        video_reference=_uniform(generators("video", "Reference")) < recipe.probability("video", Reference),
        audio_reference=_uniform(generators("audio", "Reference")) < recipe.probability("audio", Reference),
    )


def _has_cell_rules(rules: Sequence[Rule]) -> bool:
    return any(not isinstance(rule, Reference) for rule in rules)


def _merged(rules: Sequence[Rule], cells: Cells, generators: Generators, stream: str, shape: ItemShape) -> Tensor:
    clean = torch.zeros(cells, dtype=torch.bool)
    for rule in rules:
        if isinstance(rule, CellRule):
            generator = generators(stream, type(rule).__name__)
            if _uniform(generator) < rule.probability:
                more = clean | rule.cells(cells, generator, shape)
                clean = clean if bool(more.all()) else more
    return clean


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
    wanted = round((low + (high - low) * _uniform(generator)) * AUDIO_LATENTS_PER_SECOND)
    return min(max(1, wanted), cells[0] - 1)


def _share(size: Range, cells: int, generator: torch.Generator) -> int:
    low, high = size
    return max(1, round((low + (high - low) * _uniform(generator)) * cells))


def _whole(found: Range, generator: torch.Generator) -> int:
    return int(torch.randint(int(found[0]), int(found[1]) + 1, (), generator=generator))


def _place(room: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, room + 1, (), generator=generator))


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()
