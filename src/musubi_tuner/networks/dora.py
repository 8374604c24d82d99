"""DoRA: a LoRA whose result keeps a trained length for each output row (Liu et al. 2024, arXiv 2402.09353).

    V = W + s B A,  y = (m / |V|) V x + bias, with |V| the length of each row of V, which takes no gradient (section 4.3 there)

|V|^2 is had without forming V: row by row |W|^2 + 2 s B (W A^T) + s^2 B (A A^T) B^T, so a step costs two thin products and no
matrix of the size of W. m starts as |W|, and V as W, so the start equals the base exactly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.networks.base import FrozenLinear, LayerSpec, Tensors, base_bias, base_weight, copy_into, multiply
from musubi_tuner.networks.lora import DOWN, UP, LoRALayer

MAGNITUDE = "lora_magnitude_vector"


class DoRALayer(LoRALayer):
    """`magnitude` is (out,)."""

    kind = "dora"

    def __init__(self, base: FrozenLinear, spec: LayerSpec, generator: torch.Generator) -> None:
        super().__init__(base, spec, generator)
        self.register_buffer("base_squares", base_weight(base).float().square().sum(1), persistent=False)
        self.magnitude = nn.Parameter(self.base_squares.sqrt())
        self.has_bias = base_bias(base) is not None

    def change(self, x: Tensor, y: Tensor, inner: Tensor | None) -> Tensor:
        gain = self.magnitude / self._lengths()
        plain = y - self.base.bias.to(y.dtype) if self.has_bias else y
        low = multiply(F.linear(x, self.lora_A.to(x.dtype)), inner)
        up = self.lora_B * (gain * self.scale)[:, None]
        return plain * (gain - 1).to(x.dtype) + F.linear(low, up.to(x.dtype))

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        weight = base_weight(self.base)
        down, up = self.lora_A, self.lora_B * self.scale
        across = F.linear(weight, down.to(weight.dtype)).float()  # W A^T
        squares = self.base_squares + (up * (2 * across + up @ (down @ down.T))).sum(1)
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def file_tensors(self) -> dict[str, Tensor]:
        return super().file_tensors() | {MAGNITUDE: self.magnitude.detach()}

    def load(self, tensors: Tensors) -> None:
        super().load(tensors)
        copy_into(self.magnitude, tensors[MAGNITUDE].flatten(), "magnitude")

    @classmethod
    def merged(cls, weight: Tensor, tensors: Tensors) -> Tensor:
        direction = weight + tensors[UP].to(weight) @ tensors[DOWN].to(weight)
        return direction * (tensors[MAGNITUDE].to(weight).flatten() / direction.norm(dim=1))[:, None]
