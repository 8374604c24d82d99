"""LoRA: y = W x + s B A x (Hu et al. 2021, arXiv 2106.09685)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.networks.base import AddingLayer, FrozenLinear, LayerSpec, ShapeMismatch, Tensors, base_device, copy_into, multiply

DOWN, UP = "lora_A.weight", "lora_B.weight"


class LoRALayer(AddingLayer):
    """A (rank, in) starts as peft starts it, B (out, rank) at zero."""

    kind = "lora"
    zero_at_start = (UP,)

    def __init__(self, base: FrozenLinear, spec: LayerSpec, generator: torch.Generator) -> None:
        super().__init__(base, spec)
        down = torch.empty(spec.rank, base.in_features)
        bound = 1 / math.sqrt(base.in_features)  # kaiming uniform with a = sqrt(5)
        down.uniform_(-bound, bound, generator=generator)
        device = base_device(base)
        self.lora_A = nn.Parameter(down.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, spec.rank, device=device))

    @property
    def dropout_width(self) -> int:
        return self.rank

    @property
    def fast_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.lora_B,)

    def change(self, x: Tensor, y: Tensor, inner: Tensor | None) -> Tensor:
        return F.linear(*self.second_half(F.linear(x, self.lora_A.to(x.dtype)), inner))

    def second_half(self, low: Tensor, *masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """The two factors of the second product: `low` (B, ..., rank) = A x and the weight (out, rank) = s B.

        Masks (B, 1, rank or 1) go where the scale goes, onto the small weight, as long as they are those of one item.
        """
        up = self.lora_B * self.scale
        for mask in masks:
            if mask is not None and mask.shape[0] == 1:
                up = up * mask[0]
            else:
                low = multiply(low, mask)
        return low, up.to(low.dtype)

    def file_tensors(self) -> dict[str, Tensor]:
        return {DOWN: self.lora_A.detach(), UP: self.lora_B.detach() * self.scale}

    def load(self, tensors: Tensors) -> None:
        rank = tensors[DOWN].shape[0]
        if rank != self.rank:
            raise ShapeMismatch(f"rank {rank} in the file, {self.rank} here; give --network_dim {rank}")
        copy_into(self.lora_A, tensors[DOWN], "A")
        copy_into(self.lora_B, tensors[UP] / self.scale, "B")

    @classmethod
    def merged(cls, weight: Tensor, tensors: Tensors) -> Tensor:
        return weight + tensors[UP].to(weight) @ tensors[DOWN].to(weight)

    @classmethod
    def spec_of(cls, tensors: Tensors) -> LayerSpec:
        rank = tensors[DOWN].shape[0]
        return LayerSpec(rank=rank, alpha=float(rank))
