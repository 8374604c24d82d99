"""LoHa and LoKr, as LyCORIS has them.

LoHa: the change of the weight is the elementwise product of two low-rank matrices (FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098):
dW = s (w1_a w1_b) * (w2_a w2_b), of rank up to r^2.

LoKr: the change of the weight is a Kronecker product, dW = w1 x w2 (LyCORIS, Yeh et al. 2023, arXiv 2309.14859).

With w1 (o1, i1) and w2 (o2, i2), out = o1 o2 and in = i1 i2, dW x needs no matrix of the size of W: x is read as (i1, i2), multiplied
by w2 over i2 and by w1 over i1. w2 is stored as a product of rank r where that is smaller, r < max(o2, i2) / 2; the scale alpha / r
applies in that case alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.networks.base import AddingLayer, FrozenLinear, LayerSpec, ShapeMismatch, Tensors, base_device, copy_into, multiply

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
"""Endings of the tensors of LoHa; the scale is folded into the third."""


class LoHaLayer(AddingLayer):
    """Halves `_a` are (out, rank), `_b` (rank, in); w2_a starts at zero, the others as in LyCORIS."""

    kind = "loha"
    zero_at_start = (LOHA[2],)

    def __init__(self, base: FrozenLinear, spec: LayerSpec, generator: torch.Generator) -> None:
        super().__init__(base, spec, generator)
        device = base_device(base)

        def drawn(rows: int, columns: int, spread: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator).mul_(spread).to(device))

        self.hada_w1_a = drawn(base.out_features, spec.rank, 0.1)
        self.hada_w1_b = drawn(spec.rank, base.in_features, 1.0)
        self.hada_w2_a = nn.Parameter(torch.zeros(base.out_features, spec.rank, device=device))
        self.hada_w2_b = drawn(spec.rank, base.in_features, 1.0)

    def change(self, x: Tensor, y: Tensor, inner: Tensor | None) -> Tensor:
        product = (self.hada_w1_a @ self.hada_w1_b) * ((self.hada_w2_a * self.scale) @ self.hada_w2_b)
        return multiply(F.linear(x, product.to(x.dtype)), inner)

    def file_tensors(self) -> dict[str, Tensor]:
        return {leaf: getattr(self, leaf).detach() * (self.scale if leaf == LOHA[2] else 1.0) for leaf in LOHA}

    def load(self, tensors: Tensors) -> None:
        rank = tensors[LOHA[1]].shape[0]
        if rank != self.rank:
            raise ShapeMismatch(f"rank {rank} in the file, {self.rank} here; give --network_dim {rank}")
        for leaf in LOHA:
            copy_into(getattr(self, leaf), tensors[leaf] / (self.scale if leaf == LOHA[2] else 1.0), leaf)

    @classmethod
    def merged(cls, weight: Tensor, tensors: Tensors) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = (tensors[leaf].to(weight) for leaf in LOHA)
        return weight + (w1_a @ w1_b) * (w2_a @ w2_b)

    @classmethod
    def spec_of(cls, tensors: Tensors) -> LayerSpec:
        rank = tensors[LOHA[1]].shape[0]
        return LayerSpec(rank=rank, alpha=float(rank))


W1, W2 = "lokr_w1", "lokr_w2"
W2_UP, W2_DOWN = "lokr_w2_a", "lokr_w2_b"


def small_factor(size: int, factor: int) -> int:
    """The largest divisor of `size` that is no more than its square root, and no more than `factor` where that is positive."""
    most = math.isqrt(size)
    if factor > 0:
        most = min(most, factor)
    return next(number for number in range(most, 0, -1) if size % number == 0)


class LoKrLayer(AddingLayer):
    """w1 starts at random; w2, or the right half of it, at zero."""

    kind = "lokr"
    zero_at_start = (W2, W2_DOWN)

    def __init__(self, base: FrozenLinear, spec: LayerSpec, generator: torch.Generator) -> None:
        super().__init__(base, spec, generator)
        device = base_device(base)
        o1, i1 = spec.small or (small_factor(base.out_features, spec.factor), small_factor(base.in_features, spec.factor))
        self.inner_in, self.inner_out = i1, o1
        o2, i2 = base.out_features // o1, base.in_features // i1
        self.low_rank = spec.rank < max(o2, i2) / 2
        self.lokr_w1 = nn.Parameter(_uniform(o1, i1, i1, generator).to(device))
        if self.low_rank:
            self.lokr_w2_a = nn.Parameter(_uniform(o2, spec.rank, spec.rank, generator).to(device))
            self.lokr_w2_b = nn.Parameter(torch.zeros(spec.rank, i2, device=device))
        else:
            self.scale = 1.0
            self.lokr_w2 = nn.Parameter(torch.zeros(o2, i2, device=device))

    def _w2(self) -> Tensor:
        return self.lokr_w2_a @ self.lokr_w2_b if self.low_rank else self.lokr_w2

    def change(self, x: Tensor, y: Tensor, inner: Tensor | None) -> Tensor:
        parts = x.unflatten(-1, (self.inner_in, -1))
        mixed = F.linear(parts, (self._w2() * self.scale).to(x.dtype))  # (..., i1, o2)
        change = torch.einsum("om,...mn->...on", self.lokr_w1.to(x.dtype), mixed).flatten(-2)
        return multiply(change, inner)

    def file_tensors(self) -> dict[str, Tensor]:
        first = {W1: self.lokr_w1.detach()}
        if self.low_rank:
            return first | {W2_UP: self.lokr_w2_a.detach() * self.scale, W2_DOWN: self.lokr_w2_b.detach()}
        return first | {W2: self.lokr_w2.detach()}

    def load(self, tensors: Tensors) -> None:
        if self.low_rank and W2 in tensors:
            raise ShapeMismatch("w2 is whole in the file and of low rank here; give a larger --network_dim, or --dim_from_weights")
        copy_into(self.lokr_w1, _w1(tensors), "w1")
        if self.low_rank:
            copy_into(self.lokr_w2_a, tensors[W2_UP] / self.scale, "w2_a")
            copy_into(self.lokr_w2_b, tensors[W2_DOWN], "w2_b")
        else:
            copy_into(self.lokr_w2, _whole_w2(tensors), "w2")

    @classmethod
    def merged(cls, weight: Tensor, tensors: Tensors) -> Tensor:
        return weight + torch.kron(_w1(tensors).to(weight), _whole_w2(tensors).to(weight))

    @classmethod
    def spec_of(cls, tensors: Tensors) -> LayerSpec:
        rows, columns = _w1(tensors).shape
        # A rank as large as the matrix keeps w2 whole.
        rank = tensors[W2_DOWN].shape[0] if W2_DOWN in tensors else max(tensors[W2].shape)
        return LayerSpec(rank=rank, alpha=float(rank), small=(rows, columns))


def _w1(tensors: Tensors) -> Tensor:
    return tensors[W1] if W1 in tensors else tensors[f"{W1}_a"] @ tensors[f"{W1}_b"]


def _whole_w2(tensors: Tensors) -> Tensor:
    return tensors[W2] if W2 in tensors else tensors[W2_UP] @ tensors[W2_DOWN]


def _uniform(rows: int, columns: int, inputs: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(inputs)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
