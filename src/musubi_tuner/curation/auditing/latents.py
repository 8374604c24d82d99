"""Near duplicates: clips whose cached latents are nearly the same.

Of each clip the latents are averaged over a few cells in time and space, so that clips of any size and length can be compared and the
noise of codecs averages out. With a and b two such vectors,

    distance = |a - b| / sqrt(|a| |b|)

which is 0 for the same pictures, and 1.4 where the vectors are orthogonal, as those of pictures without relation nearly are. Windows of
one file are not compared, in whatever datasets: they are meant to be alike. Mirror images are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.cache.names import training_key
from musubi_tuner.cache.store import read
from musubi_tuner.dataset.items import Item
from musubi_tuner.runtime.errors import UserError

_CELLS = (2, 3, 3)
"""Frames, rows and columns that latents are averaged to."""
_ROWS = 512
"""Clips that are compared with all others at once."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two clips."""

    first: Item
    second: Item
    distance: float


def signature(item: Item) -> Tensor | None:
    """(n,) float32; None where its latents are not cached, or cannot be read."""
    path = item.paths.get("latents")
    if path is None or not path.is_file():
        return None
    try:
        tensors = {training_key(key): value for key, value in read(path).items()}
    except UserError:
        return None
    latents = tensors.get("latents")
    if latents is None or latents.ndim != 4 or not latents.numel():
        return None
    pooled = torch.nn.functional.adaptive_avg_pool3d(latents.float()[None], _CELLS).flatten()
    return pooled if bool(pooled.isfinite().all()) else None


@dataclass(frozen=True, slots=True)
class Nearest:
    """Of many clips."""

    alike: tuple[Pair, ...]
    """Of each clip that has one the nearest of the later ones on its own side, training or validation, within the limit."""
    leaks: tuple[Pair, ...]
    """(validation clip, the training clip that is nearest to it), within the limit."""
    overall: tuple[Pair, ...]
    """The nearest pairs of all, whatever their distance."""


def nearest_pairs(
    items: Sequence[Item], signatures: Sequence[Tensor], is_held_out: Sequence[bool], near: float, most_shown: int
) -> Nearest:
    """One pair for each clip at most, nearest first, so that many copies of one clip are as many lines.

    Args:
        near: the limit.
        most_shown: length of `overall`.
    """
    if len(items) < 2:
        return Nearest((), (), ())
    table = torch.stack(list(signatures)).double()  # as a small distance is the difference of large numbers below
    sizes = table.norm(dim=1).clamp(min=1e-6)
    files: dict[Path, int] = {}
    sources = torch.tensor([files.setdefault(item.spec.root / item.clip.source, len(files)) for item in items])
    held = torch.tensor(list(is_held_out))
    places = torch.arange(len(items))
    alike, leaks, overall = [], [], []

    def nearest(place: int, values: Tensor) -> Pair | None:
        other = int(values.argmin())
        return Pair(items[place], items[other], float(values[other])) if bool(values[other].isfinite()) else None

    for start in range(0, len(items), _ROWS):
        own, rows = sizes[start : start + _ROWS, None], table[start : start + _ROWS]
        squares = own.square() + sizes.square() - 2 * rows @ table.T
        distances = (squares.clamp(min=0) / (own * sizes)).sqrt()
        for place, values in enumerate(distances, start=start):
            if held[place] and (pair := nearest(place, values.masked_fill(held, torch.inf))) and pair.distance <= near:
                leaks.append(pair)
            later = values.masked_fill((places <= place) | (sources == sources[place]), torch.inf)
            if pair := nearest(place, later):
                overall.append(pair)
            if (pair := nearest(place, later.masked_fill(held != held[place], torch.inf))) and pair.distance <= near:
                alike.append(pair)
        overall = _sorted(overall)[:most_shown]
    return Nearest(tuple(_sorted(alike)), tuple(_sorted(leaks)), tuple(overall))


def _sorted(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: pair.distance)
