"""Attention of each cell of a video to the box of cells around it, in plain torch.

A box has always `kernel` cells: at the borders of the grid it is moved inwards, not cut (https://arxiv.org/abs/2204.07143). Queries are
taken in tiles; the boxes of a tile together are a larger box, which is gathered once, and a mask says which query may see what of it. Along
an axis, of length 20 with a kernel of 5 and tiles of 8:

    tile 0, queries 0..7: keys 0..9       tile 1, queries 8..15: keys 6..17       tile 2, queries 16..19: keys 14..19

Tiles inside the grid have one mask in common, so that it is made once for all of them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 8
"""Queries of a tile along each axis. With a kernel of 11, each is held against 4 times as many keys as it sees."""
_GATHERED_BYTES = 2**28
"""Of keys and values at a time."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles along one axis whose boxes lie alike."""

    offsets: tuple[int, ...]
    """Where the box of each query begins, within the tile's."""
    kernel: int
    places: list[tuple[int, int]] = field(default_factory=list)
    """(first query, first key) of each tile."""

    @property
    def keys(self) -> int:
        return self.offsets[-1] + self.kernel

    def sees(self, device: torch.device) -> Tensor:
        """(queries, keys) bool"""
        begins = torch.tensor(self.offsets, device=device)[:, None]
        keys = torch.arange(self.keys, device=device)[None]
        return (keys >= begins) & (keys < begins + self.kernel)


def neighborhood_attention(query: Tensor, key: Tensor, value: Tensor, kernel: Sequence[int]) -> Tensor:
    """
    Args:
        query: (B, T, H, W, heads, d), scaled already; so are `key` and `value`.
        kernel: cells of a box along T, H and W; of a shorter axis all.

    Returns:
        (B, T, H, W, heads, d)
    """
    batch, *grid, heads, width = query.shape
    flat = [one.flatten(1, 3) for one in (query, key, value)]
    result = torch.empty_like(flat[0])
    axes = [_tiles(length, size) for length, size in zip(grid, kernel, strict=True)]
    for tiles in itertools.product(*axes):
        mask = _joint_mask(tiles, query.device)
        places = list(itertools.product(*(one.places for one in tiles)))
        together = max(1, _GATHERED_BYTES // (2 * batch * mask.shape[1] * heads * width * query.element_size()))
        for start in range(0, len(places), together):
            part = places[start : start + together]
            asking = _cells([[one[0] for one in place] for place in part], [len(one.offsets) for one in tiles], grid, query.device)
            asked = _cells([[one[1] for one in place] for place in part], [one.keys for one in tiles], grid, query.device)
            taken = [
                one.index_select(1, cells).view(batch * len(part), -1, heads, width).transpose(1, 2)
                for one, cells in zip(flat, (asking, asked, asked), strict=True)
            ]
            found = F.scaled_dot_product_attention(*taken, attn_mask=mask, scale=1.0)
            result.index_copy_(1, asking, found.transpose(1, 2).reshape(batch, -1, heads, width))
    return result.view(query.shape)


def _tiles(length: int, kernel: int) -> list[_Tiles]:
    kernel = min(kernel, length)
    found: dict[tuple[int, ...], _Tiles] = {}
    for first in range(0, length, TILE):
        begins = [min(max(place - kernel // 2, 0), length - kernel) for place in range(first, min(first + TILE, length))]
        offsets = tuple(begin - begins[0] for begin in begins)
        found.setdefault(offsets, _Tiles(offsets, kernel)).places.append((first, begins[0]))
    return list(found.values())


def _joint_mask(tiles: Sequence[_Tiles], device: torch.device) -> Tensor:
    """(queries of a tile, keys of its box) bool: seen along each axis."""
    t, h, w = (one.sees(device) for one in tiles)
    joint = t[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    return joint.flatten(0, 2).flatten(1)


def _cells(corners: Sequence[Sequence[int]], sizes: Sequence[int], grid: Sequence[int], device: torch.device) -> Tensor:
    """(boxes * cells of a box,) int64 indices into the flattened grid, of boxes of one size that begin at `corners`."""
    begins = torch.tensor(corners, device=device)
    t, h, w = (begins[:, axis, None] + torch.arange(size, device=device) for axis, size in enumerate(sizes))
    cells = (t[:, :, None, None] * grid[1] + h[:, None, :, None]) * grid[2] + w[:, None, None, :]
    return cells.flatten()
