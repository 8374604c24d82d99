"""The harness for malformed input finds what it is there to find."""

import json
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from musubi_tuner.runtime.errors import UserError

if sys.platform == "win32":
    pytest.skip("hangs are ended by signals that Windows lacks", allow_module_level=True)

from tests.malformed import base, runner
from tests.malformed.base import Malformed
from tests.malformed.runner import judge, run_one
from tests.malformed.session import SHARES, inputs
from tests.malformed.structure import replaced, variants


def says(text: str):
    def main(argv: list[str]) -> int:
        raise UserError(text)

    return main


def accepts(argv: list[str]) -> int:
    return 0


def crashes(argv: list[str]) -> int:
    return len(5)  # pyrefly: ignore


def hangs(argv: list[str]) -> int:
    while True:
        try:
            time.sleep(1)
        except Exception:
            continue


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, main, **values) -> runner.Result:
    monkeypatch.setitem(base.MAINS, "made", main)
    monkeypatch.setitem(base.ARGUMENTS, "made", ("--a", "b"))
    monkeypatch.setattr(runner, "WAITING_SECONDS", 0.2)
    (folder / "world").mkdir()
    return run_one(Malformed(id="made/one", program="made", **values), folder / "world")


@pytest.mark.parametrize(
    ("main", "values", "outcome", "wrong"),
    [
        (says("a.toml: no."), {"expect": "refused", "names": ("a.toml",)}, "refused", ""),
        (says("no."), {"expect": "refused", "names": ("a.toml", "key")}, "refused", "the message does not name a.toml or key"),
        (says(" "), {}, "refused", "an empty message"),
        (accepts, {"expect": "refused"}, "code 0", "wrongly accepted"),
        (accepts, {"expect": "told", "names": ("clip",)}, "code 0", "taken without a word of clip"),
        (accepts, {}, "code 0", ""),
        (says("no."), {"expect": "accepted"}, "refused", "wrongly refused"),
        (crashes, {}, "TRACEBACK TypeError", "TRACEBACK TypeError"),
        (hangs, {}, "HANG", "HANG"),
    ],
)
def test_outcomes_are_judged(monkeypatch, tmp_path, main, values, outcome, wrong):
    result = run(monkeypatch, tmp_path, main, **values)
    assert result.outcome.startswith(outcome)
    assert result.wrong.startswith(wrong) and bool(result.wrong) == bool(wrong)


def test_a_traceback_in_the_log_of_an_accepted_input_is_wrong():
    assert judge(Malformed(id="a", program="b"), "code 0", "x\nTraceback (most recent call last):\n") == "a traceback in its output"


def test_inputs_are_the_same_in_every_run_have_ids_of_their_own_and_hold_every_family_in_its_share():
    rounds = 3
    first = [one.id for one in islice(inputs(0), rounds * sum(SHARES.values()))]
    assert first == [one.id for one in islice(inputs(0), len(first))]
    assert len(set(first)) == len(first)
    assert {family: sum(id.startswith(f"{family}/") for id in first) for family in SHARES} == {
        family: rounds * share for family, share in SHARES.items()
    }
    assert sum("mutation" in id for id in first) > len(first) / 6


def test_every_variant_of_a_document_differs_from_it():
    document = {"a": [1, {"b": "c"}], "d": 7}
    made = dict(variants(document))
    assert json.dumps(document) not in made.values()
    assert made["a/1/b = 1e308"] == '{"a": [1, {"b": 1e308}], "d": 7}'
    assert made["d is missing"] == '{"a": [1, {"b": "c"}]}'
    assert made["d twice"] == '{"a": [1, {"b": "c"}], "d": 1, "d": 2}'
    assert replaced(document, (), "NaN") == "NaN"
