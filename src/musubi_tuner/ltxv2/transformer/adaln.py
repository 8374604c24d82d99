"""Modulation from noise levels (docs/explanation/model.md, "modulation"), computed once per distinct level and never per token."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_SIZE = 256


def timestep_embedding(timesteps: Tensor) -> Tensor:
    """(...,) float32 timesteps (0 to 1000) -> (..., 256) float32, the cosine half first."""
    half = EMBEDDING_SIZE // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(EMBEDDING_SIZE, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embedding)))


class TimestepEmbedder(nn.Module):
    """Only there for the official name `emb.timestep_embedder`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepMlp(dim)


class AdaLN(nn.Module):
    """`rows` modulation vectors of width `dim` from a noise level."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.emb = TimestepEmbedder(dim)
        self.linear = nn.Linear(dim, rows * dim)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(B, U) timesteps -> modulation (B, U, rows, dim) and the embedding (B, U, dim) that the output head uses."""
        weight = self.emb.timestep_embedder.linear_1.weight
        embedded = self.emb.timestep_embedder(timestep_embedding(timesteps).to(weight.dtype))
        return self.linear(F.silu(embedded)).unflatten(-1, (self.rows, -1)), embedded


class Modulation(NamedTuple):
    """Rows per distinct noise level, and which level each token has."""

    rows: Tensor
    """(B, U, k, D)"""
    index: Tensor | None
    """(B, N); None where U is 1."""

    def plus(self, table: Tensor) -> "Modulation":
        """With a block's (k, D) table added."""
        return Modulation(self.rows + table.to(self.rows.dtype), self.index)

    def row(self, k: int) -> Tensor:
        """Row k for every token: (B, 1, D), or (B, N, D) where tokens differ."""
        values = self.rows[:, :, k]
        if self.index is None:
            return values
        return values.gather(1, self.index[..., None].expand(-1, -1, values.shape[-1]))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) with shift and scale of (B, 1, D) or (B, N, D): adaptive layer norm (DiT, Peebles and Xie 2023, arXiv 2212.09748)."""
    return x * (1 + scale) + shift
