"""Nearest pairs against distances that are written out, and that it does for as many clips as people have."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from musubi_tuner.curation.auditing.latents import nearest_pairs


def item(name: str, source: str) -> SimpleNamespace:
    return SimpleNamespace(key=name, spec=SimpleNamespace(root=Path("media")), clip=SimpleNamespace(source=source))


def test_pairs_are_those_of_distances_that_are_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 50, generator=generator)
    vectors[7] = vectors[3] * 1.02  # alike
    vectors[9] = vectors[3]  # of the same file as 3
    vectors[35] = vectors[5] + 0.01  # held out, and trained on
    items = [item(str(number), "3" if number == 9 else str(number)) for number in range(40)]
    held = [number >= 30 for number in range(40)]
    found = nearest_pairs(items, list(vectors), held, 0.1, 4)  # pyrefly: ignore

    def distance(a: int, b: int) -> float:
        return float((vectors[a] - vectors[b]).norm() / (vectors[a].norm() * vectors[b].norm()).sqrt())

    assert [(pair.first.key, pair.second.key) for pair in found.alike] == [("3", "7"), ("7", "9")]
    assert [(pair.first.key, pair.second.key) for pair in found.leaks] == [("35", "5")]
    assert found.leaks[0].distance == pytest.approx(distance(35, 5), abs=1e-5)
    pairs = {(a, b): distance(a, b) for a in range(40) for b in range(a + 1, 40) if {a, b} != {3, 9}}
    nearest = {a: min((value, b) for (first, b), value in pairs.items() if first == a) for a in range(39)}
    wanted = sorted((value, a, b) for a, (value, b) in nearest.items())[:4]
    assert [(pair.first.key, pair.second.key) for pair in found.overall] == [(str(a), str(b)) for _, a, b in wanted]
    assert [pair.distance for pair in found.overall] == pytest.approx([value for value, _, _ in wanted], abs=1e-5)


def test_a_thousand_copies_are_as_many_lines_within_seconds() -> None:
    vector = torch.randn(2304, generator=torch.Generator().manual_seed(1))
    items = [item(str(number), str(number)) for number in range(1000)]
    begun = time.monotonic()
    found = nearest_pairs(items, [vector] * 1000, [False] * 1000, 0.1, 10)  # pyrefly: ignore
    assert len(found.alike) == 999 and time.monotonic() - begun < 60
