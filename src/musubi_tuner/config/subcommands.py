"""Programs with subcommands: each has a config of its own, and one flag whose name may be left out."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from musubi_tuner.config.flags import parse
from musubi_tuner.config.validation import nearest
from musubi_tuner.runtime.errors import UserError

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class Subcommand(Generic[Config]):
    """One of them."""

    config: type[Config]
    run: Callable[[Config], int]
    """Returns the exit code."""
    description: str
    first: str
    """The flag whose name may be left out; empty where none may."""


def run_subcommand(known: Mapping[str, Subcommand], argv: Sequence[str], *, prog: str, description: str) -> int:
    """Run the one that the first word names, with the other words.

    Raises:
        UserError: there is no such subcommand, or what `parse` raises.
    """
    name, *words = argv or ["--help"]
    if name in ("-h", "--help", "--help_all"):
        print(f"{description}\n\nusage: {prog} --help | SUBCOMMAND [flags]\n")
        for one, subcommand in known.items():
            print(f"  {one:<14}{subcommand.description}")
        print(f"\n{prog} SUBCOMMAND --help shows its flags.")
        return 0
    if name not in known:
        raise UserError(f"unknown subcommand '{name}'.{nearest(name, known)}\n{prog} --help lists them.")
    one = known[name]
    is_left_out = bool(words and one.first and not words[0].startswith("-"))
    if is_left_out:
        words.insert(0, f"--{one.first}")
    try:
        return one.run(parse(one.config, words, prog=f"{prog} {name}", description=one.description))
    except UserError as error:
        if is_left_out:
            error.args = (_as_typed(str(error), one.first, name),)
        raise


def _as_typed(text: str, flag: str, name: str) -> str:
    """A message that begins with a flag whose name was not typed, without it: `--pack a.tar: no such file` is `a.tar: no such file`."""
    return re.sub(rf"^--{re.escape(flag)}(:| (?=\S))", lambda match: f"{name}:" if match[1] == ":" else "", text)
