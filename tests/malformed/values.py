"""Values that a setting must not take, by its kind, and odd ones, as TOML and as JSON write them."""

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Value:
    """One value as it is written; a form that cannot hold it has none."""

    label: str
    toml: str | None
    json: str | None


def _same(label: str, text: str) -> Value:
    return Value(label, text, text)


_TEXT_5, _TRUE, _FIVE, _FRACTION = _same("text of a number", '"5"'), _same("true", "true"), _same("five", "5"), _same("fraction", "1.5")
_LIST, _EMPTY_LIST, _NESTED = _same("list", "[[1], [2]]"), _same("empty list", "[]"), _same("list of tables", '[{"a" = 1}]')
_TABLE = Value("table", "{a = 1}", '{"a": 1}')
_NESTED = Value("list of tables", "[{a = 1}]", '[{"a": 1}]')
_DATE, _TIME = Value("date", "2026-11-26", None), Value("time", "07:32:00", None)
_NAN, _INF, _LESS = Value("nan", "nan", "NaN"), Value("inf", "inf", "Infinity"), Value("-inf", "-inf", "-Infinity")
_HUGE, _FAR = _same("10^20", "100000000000000000000"), _same("1e999", "1e999")
_DIGITS = _same("5000 digits", "1" * 5000)
_NO_TEXT, _BLANK = _same("no text", '""'), _same("a blank", '" "')
_NUL, _UNKNOWN = _same("NUL", '"a\\u0000b"'), _same("unknown word", '"no such choice"')
_LONG_NAME, _LONG = _same("name of 300", f'"{"n" * 300}"'), _same("text of 5000", f'"{"n" * 5000}"')
_SURROGATE = Value("half a pair", '"\\ud800"', '"\\ud800"')
_COMPOUND = (_LIST, _NESTED, _TABLE, _DATE, _TIME)

WRONG: dict[str, tuple[Value, ...]] = {
    "int": (_TEXT_5, _TRUE, _FRACTION, _NAN, _INF, _HUGE, _DIGITS, _NO_TEXT, *_COMPOUND, _EMPTY_LIST),
    "float": (_TEXT_5, _TRUE, _NAN, _INF, _LESS, _FAR, _DIGITS, _NO_TEXT, *_COMPOUND, _EMPTY_LIST),
    "bool": (_FIVE, _same("zero", "0"), _same("text true", '"true"'), _NO_TEXT, *_COMPOUND, _EMPTY_LIST),
    "str": (_FIVE, _TRUE, _FRACTION, _SURROGATE, *_COMPOUND, _EMPTY_LIST),
    "path": (_FIVE, _TRUE, _NO_TEXT, _BLANK, _NUL, _LONG_NAME, _LONG, _SURROGATE, *_COMPOUND, _EMPTY_LIST),
    "choice": (_FIVE, _TRUE, _UNKNOWN, _NO_TEXT, _SURROGATE, *_COMPOUND, _EMPTY_LIST),
    "list": (_TRUE, _TABLE, _DATE, _NESTED),
}
"""What no setting of the kind may be."""

_ODD_NUMBERS = (
    _same("-1", "-1"), _same("zero", "0"), _same("-0.0", "-0.0"), _same("1e308", "1e308"), _same("-1e308", "-1e308"),
    _same("1e-320", "1e-320"),
    _same("2^31", "2147483648"), _same("2^63-1", "9223372036854775807"), _same("-2^63", "-9223372036854775808"), _same("33", "33"),
    _same("a thousand million", "1000000000"), _same("5", "5"),
)  # fmt: skip
_ODD_TEXTS = (
    _NO_TEXT, _BLANK, _NUL, _LONG, _LONG_NAME, _same("..", '".."'), _same("dot", '"."'), _same("up", '"../a/b"'), _same("root", '"/"'),
    _same("home", '"~/x"'), _same("line break", '"a\\nb"'), _same("escape", '"\\u001b[31m"'), _same("right to left", '"\\u202eabc"'),
    _same("emoji", '"\U0001f600"'), _same("formats", '"%s{0}{x}$HOME`ls`"'), _same("loop", '"loop"'), _same("null device", '"/dev/null"'),
    _same("folder", '"clips"'), _same("text file", '"recipe.toml"'), _same("beneath a file", '"recipe.toml/x"'),
    _same("url", '"https://a.b/c"'),
)  # fmt: skip
ODD: dict[str, tuple[Value, ...]] = {
    "int": _ODD_NUMBERS,
    "float": _ODD_NUMBERS,
    "bool": (),
    "str": _ODD_TEXTS,
    "path": tuple(value for value in _ODD_TEXTS if value.label not in ("root", "home")),
    "choice": (_same("upper case", '"VIDEO"'),),
    "list": (_EMPTY_LIST, _same("of zeros", "[0, 0]"), _same("of text", '["a", "b"]'), _same("long", f"[{', '.join('1' * 5000)}]"), _HUGE),
}
"""What a setting of the kind may or may not be."""
ANY = (*WRONG["str"], *_ODD_NUMBERS, _NO_TEXT, _NUL, _LONG, Value("null", None, "null"), _NAN, _HUGE, _DIGITS, _TEXT_5)
"""One of each kind, for places of a document that have no declared type."""


def kinds_of(hint: Any) -> frozenset[str]:
    """Kinds of values that a field takes, by its type."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return kinds_of(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        parts = (part for part in typing.get_args(hint) if part is not type(None))
        return frozenset().union(*map(kinds_of, parts))
    if origin is Literal:
        return frozenset({"choice"})
    if origin is tuple:
        return frozenset({"list"})
    known = {int: "int", float: "float", bool: "bool", str: "str", Path: "path"}
    return frozenset({known.get(hint, "str")})


def fields_of(cls: type) -> dict[str, frozenset[str]]:
    """{name: kinds} of a class of checked fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {found.name: kinds_of(hints[found.name]) for found in dataclasses.fields(cls) if found.init}


def wrong_for(kinds: frozenset[str]) -> tuple[Value, ...]:
    """What none of the kinds takes."""
    first, *others = sorted(kinds)
    return tuple(value for value in WRONG[first] if all(value in WRONG[kind] for kind in others))


def odd_for(kinds: frozenset[str]) -> tuple[Value, ...]:
    wrong = wrong_for(kinds)
    return tuple(dict.fromkeys(value for kind in sorted(kinds) for value in ODD[kind] if value not in wrong))
