"""Types that what a user writes is checked against, and the one place where a broken rule becomes a message.

`@options` makes a frozen, keyword-only dataclass that pydantic checks strictly: no '5' or true for 5, no 1 for true, no nan, no
inf, no unknown key; only a whole number counts as a number too. `dataclasses.fields`, `replace` and `asdict` work on it as on any
other (why it is a dataclass and no BaseModel: flags, defaults and copies are made from the fields), and `replace` checks again.
The types below add ranges; a rule over several fields is a `model_validator(mode="after")` that raises `UserError`. A file's or a
command line's values become an object by `validated`, which words all errors alike: `<file or section>: <key> = <value>: must be ...`.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import ErrorDetails, core_schema

from musubi_tuner.runtime.errors import UserError

Options = TypeVar("Options")

_LONGEST_SIDE, _LARGEST_COUNT, _LONGEST_SHOWN = 16384, 10**9, 100
_MOST_LINES = 20
HIDDEN = "(hidden)"
"""In the place of a secret."""
_LONGEST_NAME = 150
"""Bytes; what is added to it, and to a temporary file's name, finds room in the 255 that file systems take."""
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(cls: type[Options]) -> type[Options]:
    """A class of checked fields, frozen and keyword-only."""
    return checked_dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)(cls)  # pyrefly: ignore[bad-return] - it is the same class


@dataclass(frozen=True, slots=True)
class Wording:
    """In `Annotated`: whatever is wrong with the value, the message says `must be` and this."""

    rule: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.custom_error_schema(
            handler(source), custom_error_type="worded", custom_error_message="{rule}", custom_error_context={"rule": self.rule}
        )


class Secret:
    """A text that is shown nowhere: not in a log, a page, a tracker or a file."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return HIDDEN

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        text = core_schema.no_info_after_validator_function(cls, core_schema.str_schema(min_length=1, strict=True))
        return core_schema.union_schema([core_schema.is_instance_schema(cls), text])


def as_path(value: Any) -> Any:
    """Text as a path; anything else as it is.

    Raises:
        ValueError: text that no file system takes as a path.
    """
    if not isinstance(value, str):
        return value
    path = Path(value)
    if not value.strip() or "\0" in value or len(value) > 4096 or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise ValueError("must be a path")
    return path


def _in_utf8(value: str) -> str:
    if value.encode("utf-8", "replace").decode() != value:
        raise ValueError("must be text in UTF-8")
    return value


def _as_file_name(value: str) -> str:
    if not value.strip() or value in (".", "..") or any(sign in '/\\:*?"<>|\x00' for sign in value):
        raise ValueError('must be a file name without / \\ : * ? " < > |; the folder is --output_dir')
    if len(os.fsencode(value)) > _LONGEST_NAME:
        raise ValueError(f"must be at most {_LONGEST_NAME} bytes long, as steps and endings are added to it")
    return value


def multiple_of_32(value: int) -> int:
    """The value, where it is one.

    Raises:
        ValueError: it is none; names the nearest ones.
    """
    if value > _LONGEST_SIDE:
        raise ValueError(f"must be at most {_LONGEST_SIDE}")
    if value < 32 or value % 32:
        low = max(32, value // 32 * 32)
        raise ValueError(f"must be a multiple of 32; the nearest are {low} and {low + 32}")
    return value


def _8n_plus_1(value: int) -> int:
    if value < 1 or value % 8 != 1:
        low = max(1, (value - 1) // 8 * 8 + 1)
        raise ValueError(f"must be 8n+1 frames (1, 9, 17, 25, ...), as the model takes them; the nearest are {low} and {low + 8}")
    return value


AnyPath = Annotated[Path, BeforeValidator(as_path)]
"""A path, or text that is one."""
Text = Annotated[str, AfterValidator(_in_utf8)]
"""Words for an encoder or a file: a command line may hold bytes that are none."""
FileName = Annotated[Text, AfterValidator(_as_file_name)]
List = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""`Annotated[tuple[X, ...], List]` takes a list too, as TOML and JSON have it."""

Count = Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
Whole = Annotated[int, Field(ge=0, le=_LARGEST_COUNT)]
"""A count that may be 0."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
"""What torch takes."""
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1), Wording("a share between 0 and 1")]
FrameRate = Annotated[float, Field(ge=0.01, le=1000)]
"""Frames a second."""
Side = Annotated[int, AfterValidator(multiple_of_32)]
"""Of a picture, in pixels, of which a latent cell takes 32."""
Frames = Annotated[int, Field(le=100_000), AfterValidator(_8n_plus_1)]


@dataclass(frozen=True, slots=True)
class Between:
    """In `Annotated`: `[lowest, highest]`, or one number that is both. Whole numbers stay what they are, as metadata quote them."""

    least: float
    most: float | None = None
    whole: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        limits = f"from {self.least:g} to {self.most:g}" if self.most is not None else f"of at least {self.least:g}"
        rule = Wording(f"{'a whole number' if self.whole else 'a number'} {limits}, or two such: [lowest, highest]")
        number = Annotated[int if self.whole else int | float, Field(ge=self.least, le=self.most)]
        as_pair = BeforeValidator(lambda value: tuple(value) if isinstance(value, list | tuple) else (value, value))
        pair = Annotated[tuple[number, number], as_pair, rule, AfterValidator(_in_order)]
        return handler.generate_schema(pair)


def _in_order(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"must have the lowest first: [{value[1]}, {value[0]}]")
    if value[1] > _LARGEST_COUNT:
        raise ValueError(f"must be at most {_LARGEST_COUNT}")
    return value


def validated(cls: type[Options], values: Any, *, where: str = "", naming: Callable[[str, Any], str] | None = None) -> Options:
    """`cls(**values)`.

    Args:
        cls: made by `options`.
        values: by the fields' names; what a file holds there.
        where: what a message begins with, such as the file and its section; "" = nothing.
        naming: how a field and its value are written; default: `key = value`.

    Raises:
        UserError: one line for each broken rule.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold keys and values, not {values!r:.100}.")
    try:
        return cls(**values)
    except ValidationError as error:
        known = [field.name for field in dataclasses.fields(cls) if field.init]  # pyrefly: ignore[bad-argument-type] - made by `options`
        lines = [_line(details, known, naming or _key_and_value) for details in error.errors(include_url=False)]
        if (further := len(lines) - _MOST_LINES) > 0:
            lines[_MOST_LINES:] = [f"{further} more of its values are wrong."]
        raise UserError("\n".join(f"{where}: {line}" if where else line for line in lines)) from error


def nearest(key: str, known: Iterable[str]) -> str:
    """` Did you mean '...'?` with the closest valid key, or nothing where none is close."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def shortened(text: str) -> str:
    """The text, or its beginning where a message would be hard to read."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} ..."


def _key_and_value(key: str, value: Any) -> str:
    return f"{key} = {shortened(repr(value))}"


def _line(details: ErrorDetails, known: list[str], naming: Callable[[str, Any], str]) -> str:
    kind, loc, value = details["type"], details["loc"], details["input"]
    if kind == "unexpected_keyword_argument":
        return f"unknown key '{loc[0]}'.{nearest(str(loc[0]), known) or ' Known are ' + ', '.join(known) + '.'}"
    if kind == "missing":
        return f"'{loc[0]}' is missing."
    text = _rule(details)
    if not loc:
        return text
    key = str(loc[0]) + "".join(f"[{part}]" for part in loc[1:] if isinstance(part, int))
    return f"{naming(key, value)}: {text if text.endswith(('.', '?')) else text + '.'}"


def _rule(details: ErrorDetails) -> str:
    """What is wrong, in words: of our own validators in their own words, of pydantic's by their kind."""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "worded":
        return f"must be {context['rule']}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        hint = nearest(details["input"], choices) if isinstance(details["input"], str) else ""
        return f"must be one of {', '.join(choices)}.{hint}"
    limits = {name: f"{value:.15g}" for name, value in context.items() if isinstance(value, int | float)}
    return f"must be {_KINDS[kind].format(**limits)}"


_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "string_unicode": "text in UTF-8",
    "tuple_type": "a list in [ ]",
    "is_instance_of": "a path in quotes",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
}
