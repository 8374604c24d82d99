"""Checked types: what they take, and how a broken rule is worded."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import model_validator

from musubi_tuner.config.validation import AnyPath, Between, Count, Frames, List, Positive, Share, Side, options, validated
from musubi_tuner.runtime.errors import UserError


@options
class Example:
    """Every kind of field."""

    count: Count = 1
    rate: float | None = None
    positive: Positive = 1.0
    share: Share = 0.0
    on: bool = False
    path: AnyPath | None = None
    names: Annotated[tuple[str, ...], List] = ()
    kind: Literal["first", "last"] = "first"
    side: Side = 32
    frames: Frames = 9
    seconds: Annotated[tuple[float, float], Between(0.04)] = (0.5, 2.0)
    latent_frames: Annotated[tuple[int, int], Between(1, 9, whole=True)] = (1, 4)

    @model_validator(mode="after")
    def _check(self) -> "Example":
        if self.count == 7 and self.on:
            raise UserError("count 7 and on exclude each other.")
        if self.on and self.path is not None:
            raise UserError(f"on: {self.path} is in the way.")
        return self


def refused(**values: object) -> str:
    with pytest.raises(UserError) as caught:
        validated(Example, values, where="a.toml: [x]")
    assert str(caught.value).startswith("a.toml: [x]: ")
    return str(caught.value).removeprefix("a.toml: [x]: ")


def test_what_files_hold_is_taken() -> None:
    example = validated(Example, {"rate": 3, "path": "ä b", "names": ["x"], "seconds": 1, "latent_frames": [2, 3]})
    assert example == Example(rate=3.0, path=Path("ä b"), names=("x",), seconds=(1, 1), latent_frames=(2, 3))
    assert isinstance(example.rate, float) and isinstance(example.seconds[0], int), "as metadata quote it"
    assert dataclasses.replace(example, count=2).count == 2


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("count", 0, "must be at least 1."),
        ("count", 10**30, "must be at most 1000000000."),
        ("count", "5", "must be a whole number."),
        ("count", True, "must be a whole number."),
        ("count", 1.0, "must be a whole number."),
        ("rate", "1", "must be a number."),
        ("rate", True, "must be a number."),
        ("rate", math.nan, "must be a finite number."),
        ("positive", math.inf, "must be a finite number."),
        ("positive", 0.0, "must be above 0."),
        ("share", 1.5, "must be a share between 0 and 1."),
        ("share", math.nan, "must be a share between 0 and 1."),
        ("on", 1, "must be true or false."),
        ("path", "", "must be a path."),
        ("path", "x" * 300, "must be a path."),
        ("path", "a\0b", "must be a path."),
        ("path", 3, "must be a path in quotes."),
        ("names", "x", "must be a list in [ ]."),
        ("kind", "lsat", "must be one of first, last. Did you mean 'last'?"),
        ("side", 100, "must be a multiple of 32; the nearest are 96 and 128."),
        ("frames", 24, "must be 8n+1 frames (1, 9, 17, 25, ...), as the model takes them; the nearest are 17 and 25."),
        ("seconds", [2, 1], "must have the lowest first: [1, 2]."),
        ("seconds", [1, 2, 3], "must be a number of at least 0.04, or two such: [lowest, highest]."),
        ("latent_frames", 1.5, "must be a whole number from 1 to 9, or two such: [lowest, highest]."),
    ],
)
def test_a_broken_rule_names_key_value_and_rule(key: str, value: object, rule: str) -> None:
    message = refused(**{key: value})
    assert message.startswith(f"{key} = ") and message.endswith(f": {rule}")


def test_items_of_lists_are_counted_and_long_values_cut() -> None:
    assert refused(names=["x", 1]) == "names[1] = 1: must be text in quotes."
    assert len(refused(count="x" * 10_000)) < 200


def test_unknown_keys_get_the_nearest_and_every_error_a_line() -> None:
    assert refused(conut=1) == "unknown key 'conut'. Did you mean 'count'?"
    assert refused(xyzzy=1).startswith("unknown key 'xyzzy'. Known are count, rate")
    assert len(refused(count=0, on=1).splitlines()) == 2


def test_rules_over_several_fields_speak_for_themselves() -> None:
    assert refused(count=7, on=True) == "count 7 and on exclude each other."


def test_a_message_may_quote_a_file_name_that_is_not_utf8() -> None:
    assert refused(on=True, path="caf\udce9.toml") == r"on: caf\udce9.toml is in the way."
