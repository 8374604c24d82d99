"""Blending of tiles: the whole at once against its parts as they are finished."""

import itertools

import torch

from musubi_tuner.ltxv2.autoencoders.tiling import Span, run_in_parts, run_tiled


def spans(edges: list[tuple[int, int]]) -> list[Span]:
    """Overlapping tiles with weights that differ."""
    return [Span(slice(a, b), slice(a, b), torch.linspace(0.5, 1, b - a)) for a, b in edges]


AXES = (spans([(0, 5), (3, 8), (6, 11)]), spans([(0, 3), (2, 4)]), spans([(0, 4)]))


def test_parts_are_the_whole_bit_for_bit_and_come_as_soon_as_they_are_done():
    x = torch.randn(1, 2, 11, 4, 4, generator=torch.Generator().manual_seed(0))
    total, weight = torch.zeros_like(x), torch.zeros(11, 4, 4)
    for frames, rows, columns in itertools.product(*AXES):
        w = frames.weights[:, None, None] * rows.weights[:, None] * columns.weights
        place = (frames.write, rows.write, columns.write)
        total[(..., *place)] += x[(..., *place)] * 2 * w
        weight[place] += w
    done: list[int] = []

    def run(tile: torch.Tensor) -> torch.Tensor:
        done.append(tile.shape[2])
        return tile * 2

    assert torch.equal(run_tiled(x, AXES, tuple(x.shape), run), total / weight)
    done.clear()
    lengths = []
    for part in run_in_parts(x, AXES, tuple(x.shape), run):
        lengths.append((part.shape[2], len(done)))
    assert lengths == [(3, 2), (3, 4), (5, 6)], "frames that the next tile does not reach, after each row of tiles"
