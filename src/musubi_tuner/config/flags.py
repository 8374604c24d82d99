"""Flags from dataclasses: a default is stated once, and no `argparse.Namespace` leaves this file.

A program's config is a frozen dataclass whose fields are section dataclasses. Each section is one group in `--help`;
each field made by `flag` is one command line flag of the same name.
"""

import argparse
import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from musubi_tuner.runtime.errors import UserError

Config = TypeVar("Config")


def flag(help_text: str, *, default: Any = dataclasses.MISSING, aliases: tuple[str, ...] = (), choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is a command line flag. Without `default` the flag is required."""
    metadata = {"help": help_text, "aliases": aliases, "choices": choices}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True)
class FlagInfo:
    """One flag as `--help` and the generated table of options show it."""

    section: str
    """Title of its group."""
    name: str
    """With the leading dashes."""
    aliases: tuple[str, ...]
    kind: str
    """Its type or its choices, in words."""
    default: str
    """`required` where there is none."""
    help: str


def parse(config_class: type[Config], argv: Sequence[str], *, prog: str, description: str) -> Config:
    """Read `argv` (and the TOML named by `--config_file`) into `config_class`.

    Raises:
        UserError: an unknown key in the config file.
        SystemExit: argparse's own answer (exit code 2) to a malformed command line.
    """
    parser = build_parser(config_class, prog=prog, description=description)
    known = {field.name: field for section in _sections(config_class) for field in dataclasses.fields(section.type)}
    defaults = _read_config_file(argv, known)
    for action in parser._actions:
        if action.dest in defaults:
            action.required = False
    parser.set_defaults(**defaults)
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        names = [name for info in describe(config_class) for name in (info.name, *info.aliases)]
        flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}.{nearest(flags[0], names) if flags else ''}")
    sections = {
        section.name: section.type(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(section.type)})
        for section in _sections(config_class)
    }
    return config_class(**sections)


def build_parser(config_class: type, *, prog: str, description: str) -> argparse.ArgumentParser:
    """One argument group per section of `config_class`."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
    parser.add_argument("--config_file", metavar="FILE", help="TOML file with flags by name; the command line wins over it")
    for section in _sections(config_class):
        group = parser.add_argument_group(_title(section.type))
        for field in dataclasses.fields(section.type):
            _add_argument(group, section.type, field)
    return parser


def describe(config_class: type) -> tuple[FlagInfo, ...]:
    """Every flag of a program, in the order of `--help`."""
    rows = []
    for section in _sections(config_class):
        hints = typing.get_type_hints(section.type)
        for field in dataclasses.fields(section.type):
            inner, _ = _unwrap_optional(hints[field.name])
            choices = _choices(inner, field)
            kind = " | ".join(choices) if choices else _kind_name(inner)
            rows.append(
                FlagInfo(
                    section=_title(section.type),
                    name=f"--{field.name}",
                    aliases=field.metadata["aliases"],
                    kind=kind,
                    default=_default_text(field),
                    help=field.metadata["help"],
                )
            )
    return tuple(rows)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


def _sections(config_class: type) -> list[Any]:
    hints = typing.get_type_hints(config_class)
    sections = []
    for field in dataclasses.fields(config_class):
        assert dataclasses.is_dataclass(hints[field.name]), f"{config_class.__name__}.{field.name} is no section dataclass"
        sections.append(types.SimpleNamespace(name=field.name, type=hints[field.name]))
    return sections


def _title(section: type) -> str:
    return (section.__doc__ or section.__name__).strip().splitlines()[0].rstrip(".")


def _unwrap_optional(annotation: Any) -> tuple[Any, bool]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not type(None)]
        assert len(inner) == 1, f"{annotation} is no flag type"
        return inner[0], True
    return annotation, False


def _choices(inner: Any, field: dataclasses.Field) -> tuple[str, ...]:
    if typing.get_origin(inner) is Literal:
        return typing.get_args(inner)
    return tuple(field.metadata["choices"])


def _kind_name(inner: Any) -> str:
    if typing.get_origin(inner) is tuple:
        return f"list of {_kind_name(typing.get_args(inner)[0])}"
    return {str: "text", int: "int", float: "float", bool: "on/off", Path: "path"}[inner]


def _default_text(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default)) or "none"
    return str(field.default)


def _add_argument(group: Any, section: type, field: dataclasses.Field) -> None:
    hints = typing.get_type_hints(section)
    inner, _ = _unwrap_optional(hints[field.name])
    names = [f"--{field.name}", *field.metadata["aliases"]]
    required = field.default is dataclasses.MISSING
    default = None if required else field.default
    help_text = field.metadata["help"].replace("%", "%%")
    if not required and default is not None and default != ():
        help_text += f" (default: {_default_text(field)})"
    common: dict[str, Any] = {"dest": field.name, "required": required, "default": default, "help": help_text}
    if inner is bool:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
    elif typing.get_origin(inner) is tuple:
        group.add_argument(*names, nargs="*", type=typing.get_args(inner)[0], action=_TupleAction, metavar="X", **common)
    elif choices := _choices(inner, field):
        group.add_argument(*names, choices=choices, **common)
    else:
        metavar = {Path: "PATH", str: "TEXT", int: "N", float: "X"}[inner]
        group.add_argument(*names, type=inner, metavar=metavar, **common)


class _TupleAction(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _read_config_file(argv: Sequence[str], known: Mapping[str, dataclasses.Field]) -> dict[str, Any]:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config_file")
    path_text = finder.parse_known_args(list(argv))[0].config_file
    if path_text is None:
        return {}
    path = Path(path_text)
    if not path.is_file():
        raise UserError(f"--config_file {path}: no such file.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}.") from error
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown key '{key}'.{nearest(key, known)} Keys are the flags' names without dashes.")
    return {key: _from_toml(path, key, value, known[key]) for key, value in values.items()}


def _from_toml(path: Path, key: str, value: Any, field: dataclasses.Field) -> Any:
    annotation = field.type
    inner, optional = _unwrap_optional(annotation)
    choices = _choices(inner, field)
    if choices:
        if value not in choices:
            raise UserError(f"{path}: {key} = {value!r}: must be one of {', '.join(choices)}.")
        return value
    if typing.get_origin(inner) is tuple:
        if not isinstance(value, list):
            raise UserError(f"{path}: {key} = {value!r}: must be a list.")
        return tuple(typing.get_args(inner)[0](item) for item in value)
    accepted = {Path: str, float: (int, float)}.get(inner, inner)
    if not isinstance(value, accepted) or (isinstance(value, bool) and inner is not bool):
        raise UserError(f"{path}: {key} = {value!r}: must be {'empty or ' if optional else ''}of type {_kind_name(inner)}.")
    return inner(value)


def nearest(key: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """` Did you mean '...'?` with the closest valid key, or nothing where none is close."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
