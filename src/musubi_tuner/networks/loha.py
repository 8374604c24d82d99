"""LoHa: the change of the weight is the elementwise product of two low-rank matrices (FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098).

dW = s (w1_a w1_b) * (w2_a w2_b), of rank up to r^2
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.networks.base import AddingLayer, FrozenLinear, LayerSpec, ShapeMismatch, Tensors, base_device, copy_into, multiply

W1_UP, W1_DOWN, W2_UP, W2_DOWN = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
LEAVES = (W1_UP, W1_DOWN, W2_UP, W2_DOWN)


class LoHaLayer(AddingLayer):
    """Halves `_a` are (out, rank), `_b` (rank, in); w2_a starts at zero, the others as in LyCORIS."""

    kind = "loha"
    zero_at_start = (W2_UP,)

    def __init__(self, base: FrozenLinear, spec: LayerSpec, generator: torch.Generator) -> None:
        super().__init__(base, spec)
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
        return {leaf: getattr(self, leaf).detach() * (self.scale if leaf == W2_UP else 1.0) for leaf in LEAVES}

    def load(self, tensors: Tensors) -> None:
        rank = tensors[W1_DOWN].shape[0]
        if rank != self.rank:
            raise ShapeMismatch(f"rank {rank} in the file, {self.rank} here; give --network_dim {rank}")
        for leaf in LEAVES:
            copy_into(getattr(self, leaf), tensors[leaf] / (self.scale if leaf == W2_UP else 1.0), leaf)

    @classmethod
    def merged(cls, weight: Tensor, tensors: Tensors) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = (tensors[leaf].to(weight) for leaf in LEAVES)
        return weight + (w1_a @ w1_b) * (w2_a @ w2_b)

    @classmethod
    def spec_of(cls, tensors: Tensors) -> LayerSpec:
        rank = tensors[W1_DOWN].shape[0]
        return LayerSpec(rank=rank, alpha=float(rank))
