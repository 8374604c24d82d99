"""Conditioning recipes: what of a clip is given and what is to be generated, as lists of rules for each stream.

A recipe is a TOML with `[[video]]` and `[[audio]]` tables; each names a `rule`, its `probability` and its own settings.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, Share, nearest, options
from musubi_tuner.runtime.errors import UserError

Range = tuple[float, float]
"""Lowest and highest value; a draw lies between them, both included."""

KEYFRAMES = ("first", "last", "interior", "random")


def between(low: float, high: float, *, least: float, most: float | None = None, whole: bool = False) -> Any:
    """A field for a number or [lowest, highest], from `low` to `high` unless the recipe says otherwise."""
    return dataclasses.field(default=(low, high), metadata={"least": least, "most": most, "whole": whole})


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Something that is given instead of generated, in a share of the items."""

    probability: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstFrame(Rule):
    """Image to video: the first frame is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix(Rule):
    """The beginning is given, and the clip goes on from it."""

    latent_frames: Range = between(1, 4, least=1, whole=True)
    """n latent frames are 8n - 7 frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suffix(Rule):
    """The end is given, and the clip leads up to it."""

    latent_frames: Range = between(1, 4, least=1, whole=True)
    """n latent frames are 8n frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keyframes(Rule):
    """Single latent frames are given, and the clip passes through them."""

    at: tuple[str, ...] = ("first", "last")
    """Any of `first`, `last`, `interior` (neither of both) and `random` (anywhere)."""
    count: Range = between(1, 1, least=1, whole=True)
    """How many `interior` or `random` ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop(Rule):
    """Outpainting: a rectangle is given in every frame, and what is around it is generated."""

    size: Range = between(0.3, 0.8, least=0.0, most=1.0)
    """Sides of the rectangle, as shares of the frame's; drawn apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Box(Rule):
    """Inpainting: a rectangle is generated, and all around it is given."""

    size: Range = between(0.2, 0.6, least=0.0, most=1.0)
    """Sides of the rectangle, as shares of the frame's; drawn apart."""
    duration: Range = between(1.0, 1.0, least=0.0, most=1.0)
    """For how much of the clip, as a share of it; outside of it everything is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clean(Rule):
    """The whole stream is given: the other one is generated from it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask(Rule):
    """Inpainting by the dataset's masks: white is generated, black is given. Without this rule a mask weighs the loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference(Rule):
    """The dataset's reference is shown or played beside the clip (IC-LoRA)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundPrefix(Rule):
    """The sound's beginning is given."""

    seconds: Range = between(0.5, 2.0, least=0.04)


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundSuffix(Rule):
    """The sound's end is given."""

    seconds: Range = between(0.5, 2.0, least=0.04)


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundGap(Rule):
    """Inpainting of sound: a stretch of it is generated, and all else is given."""

    seconds: Range = between(0.5, 2.0, least=0.04)


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
                {"rule": type(rule).__name__} | {key: _plain(value) for key, value in dataclasses.asdict(rule).items()}
                for rule in getattr(self, stream)
            ]
            for stream in ("video", "audio")
        }


@options
class ConditioningOptions:
    """Conditioning."""

    conditioning_config: AnyPath | None = flag("recipe TOML: what of a clip is given and what is generated", default=None)
    first_frame_conditioning_p: Share = flag(
        "share of items whose first frame is given (image to video), added to the recipe",
        default=0.0,
        aliases=("--ltx2_first_frame_conditioning_p",),
    )


def make_recipe(options: ConditioningOptions, mode: str) -> Recipe:
    """The recipe of a run.

    Args:
        mode: `video`, `av` or `audio`; a rule for a stream that the mode lacks is refused.

    Raises:
        UserError: names file, rule, value and what is allowed.
    """
    share = options.first_frame_conditioning_p
    recipe = Recipe() if options.conditioning_config is None else load_recipe(options.conditioning_config)
    if share:
        if recipe.probability("video", FirstFrame):
            raise UserError(f"--first_frame_conditioning_p {share}: {options.conditioning_config} has a rule 'first_frame' too; keep one.")
        recipe = dataclasses.replace(recipe, video=(FirstFrame(probability=share), *recipe.video))
    _check_mode(recipe, mode, options)
    return recipe


def load_recipe(path: Path) -> Recipe:
    """Read a recipe TOML.

    Raises:
        UserError: names the section, the key, the value and what is allowed.
    """
    if not path.is_file():
        raise UserError(f"--conditioning_config {path}: no such file. Ready recipes are in conditioning_recipes/.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}.") from error
    known = {"video": VIDEO_RULES, "audio": AUDIO_RULES}
    for key, entries in values.items():
        if key not in known:
            raise UserError(f"{path}: unknown section '{key}'.{nearest(key, known)} There are [[video]] and [[audio]].")
        if not isinstance(entries, list):
            raise UserError(f"{path}: [{key}] must be written [[{key}]].")
    rules = {stream: tuple(_rule(path, stream, entry, kinds) for entry in values.get(stream, [])) for stream, kinds in known.items()}
    for stream, found in rules.items():
        kinds = [type(rule) for rule in found]
        if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
            raise UserError(f"{path}: [[{stream}]] has the rule '{_name_of(twice[0])}' twice; keep one.")
    recipe = Recipe(**rules)
    both = recipe.probability("video", Clean) + recipe.probability("audio", Clean)
    if both > 1:
        raise UserError(
            f"{path}: the rules 'clean' of both streams have probabilities of {both:g} together; at most 1, as one is generated."
        )
    return recipe


def _rule(path: Path, stream: str, entry: Mapping[str, Any], kinds: Mapping[str, type[Rule]]) -> Rule:
    name = entry.get("rule")
    if name not in kinds:
        hint = nearest(name, kinds) if isinstance(name, str) else ""
        raise UserError(f"{path}: [[{stream}]] rule = {name!r}: must be one of {', '.join(kinds)}.{hint}")
    fields = {field.name: field for field in dataclasses.fields(kinds[name])}
    values = {}
    for key, value in entry.items():
        if key == "rule":
            continue
        if key not in fields:
            raise UserError(f"{path}: [[{stream}]] rule '{name}': unknown key '{key}'.{nearest(key, fields)} It has {', '.join(fields)}.")
        where = f"{path}: [[{stream}]] rule '{name}': {key} = {value!r}"
        if key == "probability":
            values[key] = _number(where, value, 0.0, 1.0)
        elif key == "at":
            values[key] = _keyframes(where, value)
        else:
            values[key] = _range(where, value, fields[key])
    return kinds[name](**values)


def _number(where: str, value: Any, least: float, most: float | None) -> float:
    limits = f"from {least:g} to {most:g}" if most is not None else f"of {least:g} at least"
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < least or (most is not None and value > most):
        raise UserError(f"{where}: must be a number {limits}.")
    return value


def _range(where: str, value: Any, field: dataclasses.Field) -> Range:
    least, most, whole = (field.metadata[key] for key in ("least", "most", "whole"))
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2:
        raise UserError(f"{where}: must be a number or [lowest, highest].")
    low, high = (_number(where, one, least, most) for one in pair)
    if whole and not (isinstance(low, int) and isinstance(high, int)):
        raise UserError(f"{where}: must be whole numbers.")
    if low > high:
        raise UserError(f"{where}: the lowest comes first: [{high}, {low}].")
    return low, high


def _keyframes(where: str, value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or any(name not in KEYFRAMES for name in names):
        raise UserError(f"{where}: must be a list of {', '.join(KEYFRAMES)}.")
    return tuple(dict.fromkeys(names))


def _name_of(kind: type[Rule]) -> str:
    return next(name for rules in (VIDEO_RULES, AUDIO_RULES) for name, one in rules.items() if one is kind)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_mode(recipe: Recipe, mode: str, options: ConditioningOptions) -> None:
    where = options.conditioning_config or "--first_frame_conditioning_p"
    lacking = {"video": "audio", "audio": "video"}.get(mode)
    if lacking and getattr(recipe, lacking):
        raise UserError(f"{where}: has rules for the {lacking} stream, which --ltx_mode {mode} does not train. Give --ltx_mode av.")
    for stream in ("video", "audio"):
        if recipe.probability(stream, Clean) and mode != "av":
            raise UserError(f"{where}: the rule 'clean' gives the whole {stream} and generates the other stream. Give --ltx_mode av.")
