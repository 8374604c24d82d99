"""Rotary position embedding (architecture sheet 2.4).

Every head gets its own slice of one spectrum: the D/2 angles of a token are laid out frequency-major, axis-minor, padded at
the front with zeros, and cut into heads. `split` and `interleaved` share the angles and differ in which elements form a pair.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RopeTable(NamedTuple):
    """(B, H, N, head_dim / 2) float32 each."""

    cos: Tensor
    sin: Tensor


def frequencies(count: int, theta: float, *, double: bool, device: torch.device) -> Tensor:
    """(count,) float32: (pi/2) theta^(j/(count-1)), evaluated in float64 where `double`."""
    dtype = torch.float64 if double else torch.float32
    exponents = torch.linspace(0.0, 1.0, count, dtype=dtype, device=device)
    return (theta**exponents * (math.pi / 2)).to(torch.float32)


def rope_table(mid_points: Tensor, max_pos: tuple[int, ...], *, dim: int, heads: int, theta: float, double: bool) -> RopeTable:
    """Tables for tokens at `mid_points`.

    Args:
        mid_points: (B, P, N) float32 middle of each token on P axes.
        max_pos: P sizes that positions are divided by; fractions are not clamped.
        dim: inner width of the attention (heads * head_dim).
    """
    batch, axes, tokens = mid_points.shape
    count = dim // (2 * axes)
    grid = frequencies(count, theta, double=double, device=mid_points.device)
    sizes = torch.tensor(max_pos, dtype=torch.float32, device=mid_points.device)
    centered = (mid_points.float() / sizes[None, :, None]) * 2 - 1
    angles = centered.transpose(1, 2)[:, :, None, :] * grid[None, None, :, None]
    angles = angles.reshape(batch, tokens, count * axes)
    angles = torch.nn.functional.pad(angles, (dim // 2 - count * axes, 0))
    angles = angles.view(batch, tokens, heads, dim // 2 // heads).transpose(1, 2)
    return RopeTable(cos=angles.cos(), sin=angles.sin())


def rotate(x: Tensor, table: RopeTable, *, interleaved: bool) -> Tensor:
    """Rotate (B, H, N, head_dim) in float32; the result has the dtype of `x`."""
    if interleaved:
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = x.float().chunk(2, dim=-1)
    turned = (first * table.cos - second * table.sin, second * table.cos + first * table.sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return joined.to(x.dtype)
