"""Attention with query and key norm over all heads, optional per-head gates (architecture sheet 2.7)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.transformer.modality import Skip
from musubi_tuner.ltxv2.transformer.rope import RopeTable, rotate

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
            mixed = self._attend(query, key, values, query_rope, key_rope, mask)
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

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        values: Tensor,
        query_rope: RopeTable | None,
        key_rope: RopeTable | None,
        mask: Tensor | None,
    ) -> Tensor:
        query, key = self._heads(self.q_norm(query)), self._heads(self.k_norm(key))
        if query_rope is not None:
            query = rotate(query, query_rope, interleaved=self.interleaved)
        if key_rope is not None:
            key = rotate(key, key_rope, interleaved=self.interleaved)
        mixed = F.scaled_dot_product_attention(query, key, self._heads(values), attn_mask=mask)
        return mixed.transpose(1, 2).flatten(-2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A (B, N, N) mask as SDPA takes it: bool stays bool, strengths m in 0..1 become ln(m), the dtype's minimum at 0."""
    if mask.dtype == torch.bool:
        return mask[:, None]
    strength = mask.float()
    bias = torch.where(strength > 0, strength.clamp(min=torch.finfo(torch.float32).tiny).log(), torch.finfo(dtype).min)
    return bias.to(dtype)[:, None]


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
