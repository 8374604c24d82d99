"""Flags of every program by their types, as words and in a `--config_file`; and words in places where none belongs."""

import json
from collections.abc import Iterator
from typing import get_type_hints

from musubi_tuner.config.flags import Flag, describe
from tests.malformed.base import ADOPT, ARGUMENTS, CONFIGS, DOCTOR, DRY, LATENTS, SOUND, TEXT, TINY, Malformed, writes
from tests.malformed.values import Value, fields_of, odd_for, wrong_for

PROGRAMS = {module.__name__.rpartition(".")[2]: config for module, config in CONFIGS.items()}
_PLANNING = (LATENTS, SOUND, TEXT, ADOPT)

WRONG_WORDS = {
    int: ("nan", "inf", "five", "", " ", "1e999", "1e3", "1.5", "0x10", "100000000000000000000", "1" * 5000, "true", "[1]"),
    float: ("nan", "-inf", "inf", "five", "", " ", "1e999", "1" * 5000, "true", "[1]", "1/2"),
    str: (),
}
_WRONG_PATHS = ("", " ", "n" * 300, "n/" * 3000)
ODD_WORDS = {
    int: ("-1", "0", "2147483648", "1000000000", "5", "33", "1_0", "\u0661"),
    float: ("-1", "0", "-0.0", "1e308", "-1e308", "1e-320", "5", "1_0", "0.999999999"),
    str: ("", " ", "..", ".", "../a/b", "n" * 250, "n" * 5000, "a\nb", "\x1b[31m", "\u202eabc", "\U0001f600", "\udcff", "%s{0}{x}", "loop",
          "/dev/null", "clips", "recipe.toml", "recipe.toml/x", "https://a.b/c", "lora.safetensors", "state"),
}  # fmt: skip
_TAKES_LONG = {
    "max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "max_data_loader_n_workers", "sample_steps", "sample_frames",
}  # fmt: skip
"""Of which a large number is a long run, which nothing is wrong with."""
_NOT_GIVEN = '""'
"""An empty text in a file is no value, as interfaces write it for what was left out."""
_DEVICES = (
    "foo",
    "CPU",
    "",
    "cuda:-1",
    "cuda:99",
    "cuda:x",
    "cpu:7",
    "meta",
    "mps",
    "xla:0",
    "vulkan",
    "cpu:",
    ":0",
    "cuda:0:0",
    "hpu",
    "\udcff",
)


def systematic() -> Iterator[Malformed]:
    for program, config in PROGRAMS.items():
        if program != TINY:
            yield Malformed(id=f"flags/{program}/as they are", program=program, more=_short(program), expect="accepted")
        yield from _misplaced(program)
        for flag in describe(config):
            yield from as_words(program, flag)
        if program != DOCTOR:  # which has the trainer's
            yield from _in_file(program, config)
        if any(flag.key == "device" for flag in describe(config)):
            for device in _DEVICES:
                odd = device in ("cuda:99", "cpu:7", "mps", "xla:0", "hpu", "vulkan", "CPU")
                yield Malformed(
                    id=f"flags/{program}/--device {device!a}", program=program, more=(*_short(program), "--device", device),
                    expect="any" if odd or program == DOCTOR else "refused", names=() if program == DOCTOR else ("device",),
                )  # fmt: skip


def _short(program: str) -> tuple[str, ...]:
    """What keeps a run short."""
    return DRY if program in _PLANNING else ()


def _misplaced(program: str) -> Iterator[Malformed]:
    key = next(flag.key for flag in describe(PROGRAMS[program]))
    cases = {
        "unknown flag": ("--no_such_flag", "1"),
        "one letter off": (f"--{key}x", "1"),
        "one dash": ("-w",),
        "a stray word": ("--output_dir", "a", "stray"),
        "a word alone": ("",),
        "two dashes": ("--",),
        "three dashes": (f"---{key}", "1"),
        "no value": (f"--{key}",),
        "nothing is off": (f"--no-{key}",),
        "surrogate flag": ("--\udcff",),
        "config file twice over": ("--config_file", "flags.toml", "--config_file", "clips"),
    }
    for label, words in cases.items():
        yield Malformed(id=f"flags/{program}/{label}", program=program, more=words, expect="refused")


def as_words(program: str, flag: Flag) -> Iterator[Malformed]:
    def made(word: str, expect: str) -> Malformed:
        shown = word if len(word) < 40 else f"{word[:10]} x {len(word)}"
        return Malformed(
            id=f"flags/{program}/{flag.name} {shown!a}", program=program, more=(*_short(program), f"{flag.name}={word}"),
            expect=expect, names=names_of(flag.key, word) if expect == "refused" else (),
        )  # fmt: skip

    if flag.type is bool:
        yield made("yes", "refused")
        return
    if flag.choices:
        yield from (made(word, "refused") for word in ("no such choice", "", "\udcff", flag.choices[0].upper() + "x"))
        return
    if flag.type in (int, float):
        yield from (made(word, "refused") for word in WRONG_WORDS[flag.type])
        yield from (made(word, "any") for word in ODD_WORDS[flag.type] if not (flag.key in _TAKES_LONG and len(word) > 2))
        return
    if flag.type is not str:
        yield from (made(word, "refused") for word in _WRONG_PATHS)
    if program != TINY:
        yield from (made(word, "any") for word in ODD_WORDS[str])
    elif flag.key == "output_dir":
        yield from (made(word, "refused") for word in ("recipe.toml", "recipe.toml/x", "loop", "/dev/null"))


def names_of(key: str, text: str) -> tuple[str, ...]:
    """A message names the flag or the value, which paths and screens write in ways of their own."""
    forms = {text, text.encode("utf-8", "backslashreplace").decode(), text.removeprefix("https://"), ascii(text)[1:-1], text[:80]}
    return (key, *sorted(form for form in forms if form.strip()))


def _in_file(program: str, config: type) -> Iterator[Malformed]:
    """The same in TOML, by the declared types."""
    for section in get_type_hints(config).values():
        for key, kinds in fields_of(section).items():
            for value in wrong_for(kinds):
                yield _file_with(program, key, value, "any" if value.toml == _NOT_GIVEN else "refused")
            if program != TINY:
                yield from (_file_with(program, key, value, "any") for value in odd_for(kinds) if not _is_long(key, value))
    for label, text in (
        ("unknown key", "no_such_key = 1"),
        ("table", "[section]\na = 1"),
        ("no TOML", "seed = "),
        ("key twice", "a = 1\na = 1"),
    ):
        yield Malformed(
            id=f"config/{program}/{label}", program=program, more=("--config_file", "flags.toml"), prepare=writes("flags.toml", text),
            expect="refused", names=("flags.toml",),
        )  # fmt: skip


def _is_long(key: str, value: Value) -> bool:
    return key in _TAKES_LONG and value.toml is not None and len(value.toml) > 3


def _file_with(program: str, key: str, value: Value, expect: str) -> Malformed:
    """The key in the file, and not among the words, which would win."""
    words = ARGUMENTS[program]
    text = f"{key} = {value.toml}\n"
    dropped = {place for place, word in enumerate(words) if word == f"--{key}" for place in (place, place + 1)}
    written = (value.json or "").startswith('"')
    names = (*names_of(key, json.loads(value.json or '""') if written else ""), "flags.toml") if expect == "refused" else ()
    return Malformed(
        id=f"config/{program}/{key} = {value.label}", program=program, base=tuple(w for i, w in enumerate(words) if i not in dropped),
        more=(*(word for word in _short(program) if word != f"--{key}"), "--config_file", "flags.toml"),
        prepare=writes("flags.toml", text), expect=expect, names=names,
    )  # fmt: skip
