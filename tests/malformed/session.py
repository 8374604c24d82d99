"""Which inputs are run, in which order, and the results on disk."""

import dataclasses
import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from tests.malformed import binaries, classes, documents, flags, folders, generation, media, mutations, tools
from tests.malformed.base import Malformed, make_world
from tests.malformed.runner import Result, bound_memory, run_one
from tests.settled import Settled

SHARES = {
    "flags": 20, "config": 16, "dataset": 10, "recipe": 6, "prompts": 10, "jsonl": 4, "captions": 2, "checkpoint": 6, "encoder": 3,
    "cache": 5,
    "index": 4, "lora": 4, "state": 5, "precomputed": 5, "classes": 6, "places": 2, "picture": 4, "sound": 4, "video": 6,
    "lora_tools": 4, "checkpoint_tools": 4, "dataset_tools": 5, "scores": 3,
}  # fmt: skip
"""Inputs of each family in every round: of 138, 14 are media, and about a third go through the trainer."""
_EVERY = 4
"""One input in so many is a mutation, until the systematic ones are used up."""


def inputs(seed: int, only: Sequence[str] = ()) -> Iterator[Malformed]:
    """All inputs, without end, families mixed by their shares; the same in every run."""
    families: dict[str, list[Malformed]] = {family: [] for family in SHARES}
    for module in (flags, generation, documents, binaries, folders, media, classes, tools):
        for malformed in module.systematic():
            families[malformed.family].append(malformed)
    ordered = {family: _mixed(family, found, seed) for family, found in families.items() if not only or family in only}
    while ordered:
        for family in list(ordered):
            found = list(islice(ordered[family], SHARES[family]))
            yield from found
            if len(found) < SHARES[family]:
                del ordered[family]


def _mixed(family: str, systematic: Sequence[Malformed], seed: int) -> Iterator[Malformed]:
    """The systematic ones in an order by chance, each id once, and mutations between and after them."""
    unique = {one.id: one for one in systematic}
    further = mutations.mutated(family, seed)
    for number, id in enumerate(sorted(unique, key=lambda id: hashlib.sha256(f"{seed} {id!a}".encode()).digest()), start=1):
        yield unique[id]
        if number % (_EVERY - 1) == 0:
            yield from islice(further, 1)
    yield from further


def run_all(work: Path, *, count: int, only: Sequence[str], seed: int, part: int = 0, parts: int = 1) -> list[Result]:
    """The first `count` inputs; those whose results are in the folder are not run again.

    Args:
        part: of `parts` processes that share them, which one this is, from 0.
    """
    world = make_world(work / "world")
    file, running = work / f"results{part}.jsonl", work / f"running{part}"
    done = {result.id: result for one in sorted(work.glob("results*.jsonl")) for result in _read(one)}
    if running.is_file():  # what ran when the process died
        died = json.loads(running.read_text(encoding="utf-8"))
        done[died] = Result(died, "TRACEBACK the process died", "", "TRACEBACK the process died", 0.0)
        _append(file, done[died])
    bound_memory()
    found, settled = [], Settled()
    for malformed in islice(inputs(seed, only), part, count, parts):
        settled.look()
        if malformed.id not in done:
            running.write_text(json.dumps(malformed.id), encoding="utf-8")
            done[malformed.id] = run_one(malformed, world)
            _append(file, done[malformed.id])
            running.unlink()
        found.append(done[malformed.id])
    settled.end()
    return found


def run_alone(id: str, work: Path, seed: int) -> int:
    """Run one input, show everything, and keep its folder."""
    world = make_world(work / "world")
    malformed = next(one for one in islice(inputs(seed), 200_000) if one.id == id)
    keep = work / "kept"
    shutil.rmtree(keep, ignore_errors=True)
    keep.mkdir(parents=True)
    result = run_one(malformed, world, keep=keep)
    print(f"cd {keep / 'scratch'}\n{malformed.program} {ascii(shlex.join(malformed.argv))}\n\n{result.text}")
    print(f"{result.outcome}; wrong: {result.wrong or 'nothing'}")
    return 1 if result.wrong else 0


def _read(file: Path) -> Iterator[Result]:
    for line in file.read_text(encoding="utf-8").splitlines():
        yield Result(**json.loads(line))


def _append(file: Path, result: Result) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(dataclasses.asdict(result)) + "\n")
