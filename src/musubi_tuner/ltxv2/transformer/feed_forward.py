"""Linear, GELU (tanh), Linear, under the official names `net.0.proj` and `net.2`."""

import torch.nn.functional as F
from torch import Tensor, nn


class GeluProjection(nn.Module):
    def __init__(self, dim: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """(..., dim) -> (..., dim) through 4 * dim."""

    def __init__(self, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluProjection(dim, 4 * dim, bias=bias), nn.Identity(), nn.Linear(4 * dim, dim, bias=bias)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))
