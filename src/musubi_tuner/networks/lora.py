"""LoRA (Hu et al. 2021, arXiv 2106.09685), DoRA, and LoRA of linears that read the same tensor, run as a group.

LoRA: y = W x + s B A x.

DoRA: a LoRA whose result keeps a trained length for each output row (Liu et al. 2024, arXiv 2402.09353).

    V = W + s B A,  y = (m / |V|) V x + bias, with |V| the length of each row of V, which takes no gradient (section 4.3 there)

|V|^2 is had without forming V: row by row |W|^2 + 2 s B (W A^T) + s^2 B (A A^T) B^T, so a step costs two thin products and no
matrix of the size of W. m starts as |W|, and V as W, so the start equals the base exactly.

A group is the queries, keys and values of one attention: one thin product for the first halves of all, and second halves that are added to
the base's output inside their product. The activations are read once instead of once for each adapter. In a compiled block the second half
of a LoRA alone is added so too.
"""

import math
from collections.abc import Iterable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.transformer.attention import Attention
from musubi_tuner.networks.base import (
    AddingLayer,
    FrozenLinear,
    LayerSpec,
    ShapeMismatch,
    Tensors,
    base_bias,
    base_device,
    base_weight,
    copy_into,
    multiply,
    run_base,
)

DOWN, UP = "lora_A.weight", "lora_B.weight"


class LoRALayer(AddingLayer):
    """A (rank, in) starts as peft starts it, B (out, rank) at zero."""

    kind = "lora"
    zero_at_start = (UP,)

    def __init__(self, base: FrozenLinear, spec: LayerSpec, generator: torch.Generator) -> None:
        super().__init__(base, spec, generator)
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

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and _plain(self):  # where it saves a copy and a second product (`BlockEngine`, keeps_sums)
            return _added(self, x, F.linear(x, self.lora_A.to(x.dtype)))
        return super().forward(x)

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


MAGNITUDE = "lora_magnitude_vector"


class DoRALayer(LoRALayer):
    """`magnitude` is (out,). The base's lengths are taken once, or in each forward pass where its weight is not in place before."""

    kind = "dora"
    base_lengths: Tensor | None

    def __init__(self, base: FrozenLinear, spec: LayerSpec, generator: torch.Generator) -> None:
        super().__init__(base, spec, generator)
        lengths = None if spec.base_moves else _row_lengths(base_weight(base))
        self.register_buffer("base_lengths", lengths, persistent=False)
        start = torch.zeros(base.out_features, device=base_device(base)) if lengths is None else lengths.clone()
        self.magnitude = nn.Parameter(start)

    def change(self, x: Tensor, y: Tensor, inner: Tensor | None) -> Tensor:
        gain = self.magnitude / self._lengths()
        bias = base_bias(self.base)
        plain = y if bias is None else y - bias.to(y.dtype)
        low = multiply(F.linear(x, self.lora_A.to(x.dtype)), inner)
        up = self.lora_B * (gain * self.scale)[:, None]
        return plain * (gain - 1).to(x.dtype) + F.linear(low, up.to(x.dtype))

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        weight = base_weight(self.base)
        down, up = self.lora_A, self.lora_B * self.scale
        across = F.linear(weight, down.to(weight.dtype)).float()  # W A^T
        lengths = _row_lengths(weight) if self.base_lengths is None else self.base_lengths
        squares = lengths.square() + (up * (2 * across + up @ (down @ down.T))).sum(1)
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


def _row_lengths(weight: Tensor) -> Tensor:
    """(out,) float32, without a copy of `weight` in float32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def group_projections(model: nn.Module) -> int:
    """Let every attention of `model` run the LoRA of its queries, keys and values together. Returns how many do.

    Whatever else sits on a linear (another type of adapter, none, one that is switched off or drops inputs) is run by itself.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, Attention) and _plain(module.to_k) and _plain(module.to_v):
            module.project_together = _Group(module)
            count += 1
    return count


def adds_everywhere(blocks: Iterable[nn.Module]) -> bool:
    """Whether every projection of every attention carries a LoRA whose second half is added within its product."""
    attentions = [module for block in blocks for module in block.modules() if isinstance(module, Attention)]
    projections = [linear for one in attentions for linear in (one.to_q, one.to_k, one.to_v, one.to_out[0])]
    return all(_plain(linear) and not linear.spec.dropout.neuron for linear in projections)


class _Group:
    """The linears of one attention."""

    def __init__(self, attention: Attention) -> None:
        self._linears = {name: getattr(attention, name) for name in ("to_q", "to_k", "to_v")}

    def __call__(self, x: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        linears = [self._linears[name] for name in names]
        if not all(_plain(linear) for linear in linears):
            return tuple(linear(x) for linear in linears)
        down = torch.cat([linear.lora_A for linear in linears]).to(x.dtype)
        lows = F.linear(x, down).split([linear.rank for linear in linears], dim=-1)
        return tuple(_added(linear, x, low) for linear, low in zip(linears, lows, strict=True))


def _plain(linear: nn.Module) -> TypeGuard[LoRALayer]:
    return type(linear) is LoRALayer and linear.enabled and (linear.masks is None or linear.masks.inputs is None)


def _added(linear: LoRALayer, x: Tensor, low: Tensor) -> Tensor:
    masks = linear.masks
    low, up = linear.second_half(low, *((masks.inner, masks.module) if masks else ()))
    y = run_base(linear.base, x)
    return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), up.t()).view(y.shape)
