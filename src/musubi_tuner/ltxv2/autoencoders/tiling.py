"""Running a network over a large array in overlapping tiles, blended by linear ramps."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.runtime.device import to_device


@dataclass(frozen=True, slots=True)
class AxisTiles:
    """Tiles of one axis, in cells of the coarser side (latent cells)."""

    size: int
    """Longest tile; a shorter axis is taken whole."""
    overlap: int
    """Least overlap of neighbors."""

    def places(self, length: int) -> list[tuple[int, int]]:
        """(start, end) of each tile: as few as fit, all of one length, evenly spread."""
        if length <= self.size:
            return [(0, length)]
        count = -(-(length - self.overlap) // (self.size - self.overlap))
        size = -(-(length + (count - 1) * self.overlap) // count)
        return [(start, start + size) for start in ((length - size) * place // (count - 1) for place in range(count))]


def overlaps(places: list[tuple[int, int]], place: int) -> tuple[int, int]:
    """Cells that a tile shares with the one before it and with the one after it."""
    start, end = places[place]
    before = places[place - 1][1] - start if place else 0
    after = end - places[place + 1][0] if place + 1 < len(places) else 0
    return before, after


def ramp(length: int, overlap_before: int, overlap_after: int, margin: float = 0.25) -> Tensor:
    """(length,) weights of a tile: 0 at the outer `margin` of an overlap, where a tile lacks its surroundings, then a linear ramp to 1."""
    weights = torch.ones(length)
    if overlap_before:
        weights[:overlap_before] = _rise(overlap_before, margin)
    if overlap_after:
        weights[length - overlap_after :] = torch.minimum(weights[length - overlap_after :], _rise(overlap_after, margin).flip(0))
    return weights


def _rise(count: int, margin: float) -> Tensor:
    """Rises from 0 to 1, and with its mirror image sums to 1."""
    edge = int(count * margin)
    inner = count - 2 * edge
    return torch.cat([torch.zeros(edge), (torch.arange(inner) + 0.5) / inner, torch.ones(edge)])


@dataclass(frozen=True, slots=True)
class Span:
    """One tile on one axis: where it is read, where it is written, and its weights there."""

    read: slice
    write: slice
    weights: Tensor


def run_tiled(
    x: Tensor, spans: tuple[list[Span], list[Span], list[Span]], out_shape: tuple[int, ...], run: Callable[[Tensor], Tensor]
) -> Tensor:
    """Blend `run` over tiles of the last three axes of `x`.

    Args:
        spans: tiles of the frame, row and column axes.
        out_shape: shape of the whole result, (B, C, F, H, W).
        run: maps a tile of `x` to a tile of the result, a tensor of its own, exactly as long as its `write` spans.
    """
    return torch.cat(list(run_in_parts(x, spans, out_shape, run)), dim=2)


def run_in_parts(
    x: Tensor,
    spans: tuple[list[Span], list[Span], list[Span]],
    out_shape: tuple[int, ...],
    run: Callable[[Tensor], Tensor],
    *,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """What `run_tiled` gives, as consecutive parts along the frames, each as soon as no other tile reaches it.

    Args:
        device: where tiles are blended; None = where `run` leaves them.
    """
    frames, rows, columns = spans
    total = weight_sum = None
    begun = 0
    for place, span in enumerate(frames):
        for row, column in itertools.product(rows, columns):
            tile = run(x[:, :, span.read, row.read, column.read]).float()
            tile = tile if device is None else tile.to(device)
            along = [to_device(one.weights, tile.device) for one in (span, row, column)]
            weights = along[0][:, None, None] * along[1][None, :, None] * along[2][None, None, :]
            if total is None or weight_sum is None:
                total, weight_sum = (torch.zeros((*lead, 0, *out_shape[3:]), device=tile.device) for lead in (out_shape[:2], ()))
            if (missing := span.write.stop - begun - total.shape[2]) > 0:
                total = F.pad(total, (0, 0, 0, 0, 0, missing))
                weight_sum = F.pad(weight_sum, (0, 0, 0, 0, 0, missing))
            where = (slice(span.write.start - begun, span.write.stop - begun), row.write, column.write)
            total[(..., *where)] += tile.mul_(weights)
            weight_sum[where] += weights
        assert total is not None and weight_sum is not None, "each axis has a tile"
        until = frames[place + 1].write.start if place + 1 < len(frames) else out_shape[2]
        if (count := until - begun) > 0:
            yield total[:, :, :count] / weight_sum[:count]
            total, weight_sum, begun = total[:, :, count:].clone(), weight_sum[count:].clone(), until
