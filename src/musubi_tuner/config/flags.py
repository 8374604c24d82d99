"""Command lines from dataclasses: a default is stated once, and the help, the table of options and the parser are made from it.

A program's config is a class made by `options` whose fields are sections, made by `options` too. Each section is one group in the
help; each of its fields, made by `flag`, is one flag of the same name.
"""

import dataclasses
import difflib
import logging
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

from musubi_tuner import __version__
from musubi_tuner.config.names import ALIASES, IGNORED, OTHER_VALUES, PERCENTAGES, VALUES, answer, ours
from musubi_tuner.config.validation import HIDDEN, Secret, shortened, validated
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_toml

log = logging.getLogger(__name__)

Config = TypeVar("Config")

VERSION = f"musubi-tuner-ltxv2 {__version__}"

_WIDTH, _INDENT = 120, 36


def flag(
    help_text: str, *, default: Any = dataclasses.MISSING, common: bool = False, may_be_empty: bool = False, repeats: bool = False
) -> Any:
    """A field that is a command line flag.

    Args:
        default: without it the flag is required.
        common: shown in `--help`. A program of whose flags none is common shows them all.
        may_be_empty: an empty text is a value of it.
        repeats: of a list: given again, it adds to what was given before.
    """
    metadata = {"help": help_text, "common": common, "may_be_empty": may_be_empty, "repeats": repeats}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One flag of a program."""

    section: str
    """The config's field that it belongs to."""
    group: str
    """Title of that section."""
    key: str
    """Its field's name, and its key in a config file."""
    type: type
    """Of its value, or of the values of a list."""
    is_list: bool
    choices: tuple[str, ...]
    default: Any
    """`dataclasses.MISSING` where it is required."""
    help: str
    common: bool
    may_be_empty: bool
    repeats: bool = False
    is_secret: bool = False
    """Whether its value is shown nowhere."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names that are taken for it."""
        return tuple(f"--{name}" for name in ALIASES.get(self.key, ()))

    @property
    def name(self) -> str:
        return f"--{self.key}"

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def kind(self) -> str:
        """Its type or its choices, in words."""
        kind = " | ".join(self.choices) or {str: "text", int: "int", float: "float", bool: "on/off", Path: "path"}[self.type]
        return f"list of {kind}" if self.is_list else kind

    @property
    def default_text(self) -> str:
        if self.is_required:
            return "required"
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        if isinstance(self.default, tuple):
            return " ".join(map(str, self.default)) or "none"
        return "none" if self.default is None else str(self.default)

    @property
    def says_default(self) -> bool:
        """Whether its help tells the default, which is then not the value that stands here."""
        return "default:" in self.help

    @property
    def meaning(self) -> str:
        """Its help, with its choices."""
        return f"{self.help} ({', '.join(self.choices)})" if self.choices else self.help

    @property
    def usage(self) -> str:
        """As it is typed."""
        if self.type is bool:
            return self.name if self.default is False else f"{self.name}, --no-{self.key}"
        value = "CHOICE" if self.choices else {Path: "PATH", str: "TEXT", int: "N", float: "X"}[self.type]
        return f"{self.name} {value}" + (" ..." if self.is_list else "")


_CONFIG_FILE = Flag(
    section="", group="General", key="config_file", type=Path, is_list=False, choices=(), default=None, common=True, may_be_empty=False,
    help="TOML with flags by their names without dashes; the command line wins over it",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Beneath:
    """Values of flags that command line and config file win over."""

    where: str
    """What they come from, for messages."""
    values: Mapping[str, Any]
    """By the flags' keys."""


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    beneath: Callable[[Mapping[str, Any]], Beneath | None] = lambda given: None,
) -> Config:
    """Read `argv` (and the TOML named by `--config_file`) into `config_class`.

    Args:
        beneath: from the values that are given, unchecked, to those that stand beneath them.

    Raises:
        UserError: a flag or key that is unknown, missing, or has a value that it does not take.
        SystemExit: after `--help`, `--help_all` or `--version`.
    """
    flags = describe(config_class)
    typed, ignored = _read(argv, flags, prog=prog, description=description)
    by_key = {flag.key: flag for flag in flags}
    in_file: dict[str, Any] = {}
    if _CONFIG_FILE.key in typed:
        file = Path(_words(typed.pop(_CONFIG_FILE.key))[0])
        in_file, unused = read_config_file(file, flags)
        ignored += unused
    if ignored:
        log.info("not needed here, ignored: %s", ", ".join(dict.fromkeys(ignored)))
    values = in_file | {key: words if isinstance(words, bool) else _value(by_key[key], words) for key, words in typed.items()}
    below = beneath(values)
    if below is not None:
        values = {**below.values, **values}
    if missing := [f"{flag.name}: {flag.meaning}" for flag in flags if flag.is_required and flag.key not in values]:
        _refuse(f"missing {'; '.join(missing)}", prog)

    def naming(place: str, value: Any) -> str:
        key = place.partition("[")[0]
        if key in by_key and by_key[key].is_secret:
            return f"--{key} {HIDDEN}"
        if key not in typed:
            return f"{below.where if below is not None and key not in in_file else file}: {place} = {shortened(repr(value))}"
        return f"--{key} {shortened(' '.join(word or repr(word) for word in _words(typed[key])))}"

    sections: dict[str, dict[str, Any]] = {flag.section: {} for flag in flags}
    for flag in flags:
        if flag.key in values:
            sections[flag.section][flag.key] = values[flag.key]
    hints = typing.get_type_hints(config_class)
    return validated(config_class, {name: validated(hints[name], section, naming=naming) for name, section in sections.items()})


def describe(config_class: type) -> tuple[Flag, ...]:
    """Every flag of a program, in the order of its help."""
    found = []
    for section, section_class in typing.get_type_hints(config_class).items():
        group = (section_class.__doc__ or "").strip().splitlines()[0].rstrip(".")
        hints = typing.get_type_hints(section_class)
        for field in dataclasses.fields(section_class):
            inner = hints[field.name]
            if typing.get_origin(inner) in (Union, types.UnionType):
                (inner,) = (part for part in typing.get_args(inner) if part is not type(None))
            if is_list := typing.get_origin(inner) is tuple:
                inner = typing.get_args(inner)[0]
            choices = typing.get_args(inner) if typing.get_origin(inner) is Literal else ()
            kind = str if choices or inner is Secret else inner
            found.append(
                Flag(
                    section=section, group=group, key=field.name, type=kind, is_list=is_list, choices=choices, default=field.default,
                    help=field.metadata["help"], common=field.metadata["common"], may_be_empty=field.metadata["may_be_empty"],
                    repeats=field.metadata["repeats"], is_secret=inner is Secret,
                )
            )  # fmt: skip
    return tuple(found)


def without_secrets(argv: Sequence[str], config_class: type) -> list[str]:
    """A command line that can be shown: what follows the flags of secrets is hidden."""
    secret = {name for flag in describe(config_class) if flag.is_secret for name in (flag.name, *flag.aliases)}
    shown: list[str] = []
    for word in argv:
        name, equals, _ = word.partition("=")
        if shown and shown[-1] in secret:
            word = HIDDEN
        elif name in secret and equals:
            word = f"{name}={HIDDEN}"
        shown.append(word)
    return shown


def read_config_file(path: Path, flags: Sequence[Flag]) -> tuple[dict[str, Any], list[str]]:
    """Values of a TOML by the keys of their flags, whose tables are for the eye alone; and its keys that nothing here needs.

    An empty text is no value, as in files that interfaces write; `may_be_empty` flags aside.

    Raises:
        UserError: a key that is unknown, or given twice.
    """
    by_key = {flag.key: flag for flag in flags}
    values: dict[str, Any] = {}
    ignored, unknown = [], []
    for key, value in _entries(read_toml(path, named="--config_file")):
        flag = by_key.get(ours(key))
        if flag is None:
            is_off = value in (False, "", [])
            if key in IGNORED or is_off and answer(key):
                ignored.append(key)
            else:
                says = answer(key)
                near = f"{_near(key, by_key)} Keys are the flags' names without dashes."
                unknown.append(f"{path}: unknown key '{key}'{f': {says}.' if says else f'.{near}'}")
        elif value == "" and not flag.may_be_empty:
            ignored.append(f"{key} (empty)")
        elif flag.key in values:
            unknown.append(f"{path}: '{key}' is given twice, or is another name of a key that is given too.")
        else:
            values[flag.key] = _meant(flag, value) if isinstance(value, str) else value
    if unknown:
        raise UserError("\n".join(unknown))
    return values, ignored


def _entries(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values, those of tables too."""
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield key, value


def read_words(argv: Sequence[str], flags: Sequence[Flag], *, prog: str, description: str) -> dict[str, list[str] | bool]:
    """The words that follow each flag, or whether it is on, by its key. Of a flag given twice the last one counts, but for lists that
    repeat.

    Raises:
        UserError: an unknown flag, or one that has no value or too many.
        SystemExit: after `--help`, `--help_all` or `--version`.
    """
    return _read(argv, flags, prog=prog, description=description)[0]


def _read(argv: Sequence[str], flags: Sequence[Flag], *, prog: str, description: str) -> tuple[dict[str, list[str] | bool], list[str]]:
    """What `read_words` gives, and the flags that are read over."""
    named = {name: flag for flag in (*flags, _CONFIG_FILE) for name in (flag.name, *flag.aliases)}
    switched_off = {f"--no-{name[2:]}": flag for name, flag in named.items() if flag.type is bool}
    answers = {"-h": False, "--help": False, "--help_all": True}
    found: dict[str, list[str] | bool] = {}
    ignored, unknown = [], []
    words, name = list(argv), prog

    def values_after(most: int) -> list[str]:
        values = []
        while len(values) < most and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        return values

    while words:
        before, (name, equals, value) = name, words.pop(0).partition("=")
        if name == "--version" or name in answers:
            print(VERSION if name == "--version" else "\n".join(_help(flags, prog, description, everything=answers[name])))
            raise SystemExit(0)
        if not name.startswith("--"):
            _refuse(f"unexpected '{name}{equals}{value}' after {before}", prog)
        flag, key = named.get(name) or switched_off.get(name), name[2:]
        if flag is None and key in IGNORED:
            values_after(0 if equals else IGNORED[key].values)
            ignored.append(name)
            continue
        if flag is None:
            values_after(len(words))
            says = answer(key)
            unknown.append(f"unknown flag '{name}'{f': {says}' if says else f'.{_near(name, [*named, *switched_off, *answers])}'}")
            continue
        if flag.type is bool and equals:
            _refuse(f"{name}={value}: takes no value; {flag.name} is on, --no-{flag.key} is off", prog)
        values = [value] if equals else values_after(0 if flag.type is bool else len(words) if flag.is_list else 1)
        if not values and flag.type is not bool and not flag.is_list:
            _refuse(f"{name}: needs a value ({flag.help})", prog)
        before_it = found.get(flag.key) if flag.repeats else None
        found[flag.key] = name in named if flag.type is bool else [*(_words(before_it) if before_it else ()), *values]
    if unknown:
        unneeded = [f"not needed here, and ignored: {', '.join(ignored)}"] if ignored else []
        _refuse("\n".join(unneeded + unknown), prog)
    return found, ignored


def _near(name: str, known: Iterable[str]) -> str:
    """A suggestion for a slip of the pen; what only looks alike is none."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    return f" Did you mean '{close[0]}'?" if close else ""


def _refuse(text: str, prog: str) -> NoReturn:
    raise UserError(f"{text}{'' if text.endswith(('.', '?')) else '.'}\n{prog} --help shows the usual flags, --help_all all of them.")


def _words(found: list[str] | bool) -> list[str]:
    return [] if isinstance(found, bool) else found


def _value(flag: Flag, words: Sequence[str]) -> Any:
    """The words as the flag's type; a word that is none stays text, which the type then refuses."""

    def one(word: str) -> Any:
        meant = _meant(flag, word)
        try:
            return {int: int, float: float}.get(flag.type, str)(meant)
        except ValueError:
            return word

    return tuple(map(one, words)) if flag.is_list else one(words[0])


def _meant(flag: Flag, word: str) -> Any:
    """A word of musubi-tuner's or a percentage, as the flag takes it; any other as it is.

    Raises:
        UserError: a word that means something else here, or an empty one.
    """
    if word in OTHER_VALUES.get(flag.key, {}):
        raise UserError(f"{flag.name} {word}: must be one of {', '.join(flag.choices)}; {OTHER_VALUES[flag.key][word]}.")
    if not word and flag.type is str and not flag.is_list and not flag.may_be_empty:
        raise UserError(f"{flag.name} '': needs a value ({flag.help}).")
    if flag.key in PERCENTAGES and (percent := re.fullmatch(r"(\d{1,2}(?:\.\d+)?)%", word, re.ASCII)):
        return float(percent[1]) / 100
    return VALUES.get(flag.key, {}).get(word, word)


def _help(flags: Sequence[Flag], prog: str, description: str, *, everything: bool) -> Iterator[str]:
    shown = [flag for flag in flags if everything or flag.common] or list(flags)
    yield from textwrap.wrap(description, _WIDTH)
    yield f"\nusage: {prog} {' '.join(flag.usage for flag in flags if flag.is_required)} [flags]"
    groups: Mapping[str, list[Flag]] = {flag.group: [] for flag in shown}
    for flag in shown:
        groups[flag.group].append(flag)
    for group, members in groups.items():
        yield f"\n{group}"
        for flag in members:
            names = ", ".join([flag.usage, *(flag.aliases if everything else ())])
            default = "" if flag.is_required or flag.default in (None, ()) or flag.says_default else f" [{flag.default_text}]"
            yield from _row(names, flag.meaning + default)
    yield f"\n{_CONFIG_FILE.group}"
    yield from _row(_CONFIG_FILE.usage, _CONFIG_FILE.help)
    if len(shown) < len(flags):
        yield from _row("--help_all", f"all {len(flags)} flags")
    yield from _row("--version", "the version of this program")


def _row(names: str, text: str) -> Iterator[str]:
    lines = textwrap.wrap(text, _WIDTH - _INDENT)
    first = f"  {names}".ljust(_INDENT)
    if len(first) > _INDENT:
        yield first
        first = " " * _INDENT
    yield first + lines[0]
    yield from (" " * _INDENT + line for line in lines[1:])
