"""Attention with query and key norm over all heads, optional gates and rotary positions (docs/explanation/model.md, "attention and RoPE").

Every head gets its own slice of one spectrum: the D/2 angles of a token are laid out frequency-major, axis-minor, padded at the front with
zeros, and cut into heads. `split` and `interleaved` share the angles and differ in which elements form a pair.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.transformer.modality import ReferenceAttention, Skip

_ALIGNED = 8
"""Elements of 16 bits."""


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
    sizes = torch.cat([mid_points.new_full((1,), size, dtype=torch.float32) for size in max_pos])  # filled there: a copy would wait
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


ProjectTogether = Callable[[Tensor, tuple[str, ...]], tuple[Tensor, ...]]
"""(x, names of this module's linears) -> what each of them makes of x."""


class Attention(nn.Module):
    """Queries from one sequence, keys and values from another (or the same)."""

    def __init__(
        self, query_dim: int, context_dim: int, heads: int, head_dim: int, *, gated: bool, eps: float, rope_type: str = "split"
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.interleaved = rope_type == "interleaved"
        self.q_norm = nn.RMSNorm(inner, eps=eps)
        self.k_norm = nn.RMSNorm(inner, eps=eps)
        self.to_q = nn.Linear(query_dim, inner)
        self.to_k = nn.Linear(context_dim, inner)
        self.to_v = nn.Linear(context_dim, inner)
        self.to_gate_logits = nn.Linear(query_dim, heads) if gated else None
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim)])
        self.project_together: ProjectTogether | None = None
        """Takes the place of separate calls of linears that read the same tensor; None = they are called one by one."""

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        query_rope: RopeTable | None = None,
        key_rope: RopeTable | None = None,
        mask: Tensor | None = None,
        skip: Skip = False,
    ) -> Tensor:
        """(B, Nq, query_dim) from queries `x` and keys and values `context` (B, Nk, context_dim).

        Args:
            mask: (B, 1, Nq or 1, Nk), bool (True = may attend) or additive in the dtype of `x`.
            skip: samples whose attention result is replaced by their values (self-attention only).
        """
        if skip is True:
            mixed = values = self.to_v(context)
        else:
            query, key, values = self._project(x, context)
            query, key = self._heads(self.q_norm(query)), self._heads(self.k_norm(key))
            if query_rope is not None:
                query = rotate(query, query_rope, interleaved=self.interleaved)
            if key_rope is not None:
                key = rotate(key, key_rope, interleaved=self.interleaved)
            mixed = F.scaled_dot_product_attention(query, key, self._heads(values), attn_mask=mask)
            mixed = mixed.transpose(1, 2).flatten(-2)
        if isinstance(skip, Tensor):
            mixed = torch.where(skip[:, None, None], values, mixed)
        if self.to_gate_logits is not None:
            gates = 2 * torch.sigmoid(self.to_gate_logits(x))
            mixed = (mixed.unflatten(-1, (self.heads, -1)) * gates[..., None]).flatten(-2)
        return self.to_out[0](mixed)

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before norm and heads."""
        if self.project_together is None:
            return self.to_q(x), self.to_k(context), self.to_v(context)
        if x is context:
            query, key, values = self.project_together(x, ("to_q", "to_k", "to_v"))
            return query, key, values
        key, values = self.project_together(context, ("to_k", "to_v"))
        return self.to_q(x), key, values

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A (B, N, N) mask as SDPA takes it: bool stays bool, strengths m in 0..1 become ln(m), the dtype's minimum at 0."""
    if mask.dtype == torch.bool:
        return mask[:, None]
    strength = mask.float()
    bias = torch.where(strength > 0, strength.clamp(min=torch.finfo(torch.float32).tiny).log(), torch.finfo(dtype).min)
    return bias.to(dtype)[:, None]


def reference_bias(attention: ReferenceAttention, dtype: torch.dtype) -> Tensor:
    """The (B, 1, N, N) additive mask of a reference's attention: ln(m) between the clip's tokens and one of strength m, the dtype's
    minimum at 0 and between keyframes and the reference (ltx-core 1.0.0).

    Its rows begin at multiples of 16 bytes, so that attention kernels read it in place.
    """
    batch, reference = attention.strength.shape
    own, before = attention.own, attention.own + attention.beside
    tokens = before + reference
    per_row = -(-tokens // _ALIGNED) * _ALIGNED
    mask = torch.zeros(batch, 1, tokens, per_row, dtype=dtype, device=attention.strength.device)[..., :tokens]
    bias = attention_bias(attention.strength[:, None], dtype)
    mask[:, :, :own, before:] = bias
    mask[:, :, before:, :own] = bias.mT
    mask[:, :, own:before, before:] = mask[:, :, before:, own:before] = torch.finfo(dtype).min
    return mask


def key_bias(mask: Tensor | None) -> Tensor | None:
    """A (B, Nk) bool mask of real keys as SDPA takes it, (B, 1, 1, Nk).

    Raises:
        TypeError: an additive or integer mask; masks are bool at every interface.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"masks are bool (True = real), got {mask.dtype}")
    return mask[:, None, None, :]
