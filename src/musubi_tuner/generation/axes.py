"""The axes of a grid: what varies from cell to cell, from --grid and --grid_file."""

import glob
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.config.generation import GridOptions
from musubi_tuner.config.validation import nearest, shortened
from musubi_tuner.generation.jobs import LoraUse, is_there, parse_lora, split_lora
from musubi_tuner.networks.formats import CONNECTORS_ENDING
from musubi_tuner.networks.reading import network_metadata
from musubi_tuner.networks.scales import PEFT_FILE
from musubi_tuner.networks.stack import Strength
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_toml

STRENGTHS = ("strength", "video_strength", "audio_strength")
OF_LORAS = ("lora", *STRENGTHS)
GUIDANCE = {
    "steps": "sample_steps",
    **{
        name: name
        for name in (
            "video_cfg_scale", "audio_cfg_scale", "stg_scale", "audio_stg_scale", "rescale_scale", "audio_rescale_scale", "modality_scale",
            "audio_modality_scale", "discrete_flow_shift",
        )
    },
}  # fmt: skip
"""Axis -> the flag that it varies."""
AXES = (*OF_LORAS, "prompt", "seed", *GUIDANCE)
_WHOLE = ("prompt", "seed", "steps")
_WHOLE_NUMBER = re.compile(r"[+-]?\d{1,20}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,20}\.?\d{0,20}|\.\d{1,20})(e[+-]?\d{1,2})?", re.ASCII | re.IGNORECASE)
_LARGEST_STRENGTH = 100
NONE, ALL = "none", "all"
_STEP = re.compile(r"(.*?)[-_. ]*(?:step|epoch|e)?[-_]?(\d+)?", re.IGNORECASE)
_SAVE = re.compile(r"(.+)-(step\d{8}|\d{6})")
"""Of a run of this trainer (`training.checkpoint.lora_path`)."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One of them."""

    name: str
    values: tuple[Any, ...]
    """`LoraUse` or None (without), or numbers; of `prompt`, empty is all."""


def read_axes(options: GridOptions) -> tuple[Axis, ...]:
    """In the order in which they are given; those of the file first.

    Raises:
        UserError: an axis that is unknown or given twice, a value that it does not take, or a wildcard that nothing matches.
    """
    in_file: dict[str, Axis] = {}
    if options.grid_file is not None:
        for name, values in read_toml(options.grid_file, named="--grid_file").items():
            where = f"{options.grid_file}: {name}"
            words = values if isinstance(values, list) else [values]
            if any(isinstance(value, bool) or not isinstance(value, str | int | float) for value in words):
                raise UserError(f"{where}: must be a list of numbers or texts, such as [0, 0.6, 1].")
            in_file[name] = _axis(name, [str(value) for value in words], where, options.grid_file.parent)
    typed: dict[str, Axis] = {}
    for text in options.grid:
        name, equals, values = text.partition("=")
        if not equals:
            raise UserError(f"--grid {shortened(text)}: must be AXIS=VALUE,VALUE,..., such as strength=0,0.6,1.")
        if name in typed:
            raise UserError(f"--grid {name}: is given twice; write all its values behind one, parted by commas.")
        words = _words_of_files(values) if name == "lora" else values.split(",")
        typed[name] = _axis(name, words, f"--grid {name}", Path())
    return tuple((in_file | typed).values())


def _axis(name: str, words: Sequence[str], where: str, folder: Path) -> Axis:
    if name not in AXES:
        raise UserError(f"{where}: unknown axis.{nearest(name, AXES)} Axes are {', '.join(AXES)}.")
    words = [word.strip() for word in words]
    if not words or "" in words:
        raise UserError(f"{where}: {'an empty value' if words else 'no value'}; write values parted by single commas.")
    if name == "lora":
        found = [use for word in words for use in loras_of(word, where, folder)]
        return Axis(name, tuple(dict.fromkeys(found)))
    if name == "prompt" and words == [ALL]:
        return Axis(name, ())
    values = tuple(_number(name, word, where) for word in words)
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise UserError(f"{where}: {twice[0]} is there twice.")
    return Axis(name, values)


def _number(name: str, word: str, where: str) -> float | int:
    """Ranges of guidance are those of its flags, which it is checked against when cells are made."""
    if name in _WHOLE:
        if not _WHOLE_NUMBER.fullmatch(word):
            raise UserError(f"{where}: {shortened(word)}: must be a whole number{' or all' if name == 'prompt' else ''}.")
        return int(word)
    if not _NUMBER.fullmatch(word):
        raise UserError(f"{where}: {shortened(word)}: must be a number, such as 0.6.")
    value = float(word)
    if name in STRENGTHS and abs(value) > _LARGEST_STRENGTH:
        raise UserError(f"{where}: {shortened(word)}: must be between -{_LARGEST_STRENGTH} and {_LARGEST_STRENGTH}.")
    return value


def _words_of_files(text: str) -> list[str]:
    """Parted at commas, but for those in the name of a file that is there."""
    words: list[str] = []
    parts = text.split(",")
    while parts:
        length = next((n for n in range(len(parts), 1, -1) if _is_there(",".join(parts[:n]))), 1)
        words.append(",".join(parts[:length]))
        parts = parts[length:]
    return words


def _is_there(text: str) -> bool:
    try:
        return is_there(Path(split_lora(text)[0]))
    except UserError:  # of two numbers
        return False


def loras_of(word: str, where: str, folder: Path) -> list[LoraUse | None]:
    """What a value stands for: no network, or what `files_of` finds."""
    return [None] if word == NONE else [*files_of(word, where, folder, or_else=f", or {NONE}")]


def files_of(word: str, where: str, folder: Path, *, or_else: str = "") -> list[LoraUse]:
    """A file, all files of a folder, or those that a wildcard matches, by their steps.

    Args:
        or_else: what else could have been given, for the message.

    Raises:
        UserError: there is none, or one that cannot be read.
    """
    try:
        pattern, numbers = split_lora(word, where)
        behind = "".join(f":{number:g}" for number in numbers)
        for base in dict.fromkeys((Path(), folder)):  # a path counts from here, else from the file's folder
            place = base / pattern
            if place.is_dir() and not (place / PEFT_FILE).is_file():
                paths = by_step(_networks(place.glob("*.safetensors")))
            elif place.exists():
                paths = [place]
            else:
                paths = by_step(_networks(map(Path, glob.glob(str(place), recursive=True))))  # noqa: PTH207 - takes absolute ones too
            if paths:
                uses = [parse_lora(f"{path}{behind}", where) for path in paths]
                for use in uses:
                    network_metadata(use.path)  # which can be read
                return uses
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: {shortened(repr(word))}: must be a path ({error}).") from error
    raise UserError(f"{where}: {shortened(word)}: no such LoRA. Give files, folders or wildcards such as output/*.safetensors{or_else}.")


def _networks(paths: Any) -> list[Path]:
    return [path for path in paths if path.suffix == ".safetensors" and path.is_file() and not path.name.endswith(CONNECTORS_ENDING)]


def by_step(paths: Sequence[Path]) -> list[Path]:
    """As a run saved them: a-9 before a-10, and a itself, the last of its run, behind them. Saves of a run of this trainer that all say
    for how many steps they were trained are sorted by that, those of epochs and of steps together.

    Raises:
        UserError: a file that cannot be read.
    """
    runs = {(path.parent, match[1]) for path in paths if (match := _SAVE.fullmatch(path.stem))}

    def run_and_number(path: Path) -> tuple[tuple[Path, str], float]:
        if (path.parent, path.stem) in runs:  # its last save, whose name may end in a number of its own
            return (path.parent, path.stem), float("inf")
        match = _SAVE.fullmatch(path.stem) or _STEP.fullmatch(path.stem)
        assert match is not None
        return (path.parent, match[1]), float((match[2] or "inf").removeprefix("step"))

    found = {path: run_and_number(path) for path in paths}
    trained = {path: _trained_steps(path) if run in runs else None for path, (run, _) in found.items()}
    untold = {run for path, (run, _) in found.items() if trained[path] is None}

    def key(path: Path) -> tuple[Any, ...]:
        run, number = found[path]
        steps = 0 if run in untold else trained[path]
        return _natural(str(path.parent)), _natural(run[1]), steps, number, path.name

    return sorted(paths, key=key)


def _trained_steps(path: Path) -> int | None:
    said = network_metadata(path).get("ss_steps", "")
    return int(said) if _WHOLE_NUMBER.fullmatch(said) else None


def _natural(text: str) -> tuple[tuple[bool, int, str], ...]:
    """Numbers within a text count as numbers."""
    parts = [part for part in re.split(r"(\d+)", text.casefold()) if part]
    return tuple((False, int(part), "") if part.isdecimal() else (True, 0, part) for part in parts)


def strength_of(use: LoraUse, strength: float, video: float, audio: float) -> LoraUse:
    """The network at what its file was given with, times what the axes say."""
    own = use.strength
    return LoraUse(use.path, Strength(own.video * strength * video, own.audio * strength * audio))
