"""What every trainable layer shares: a frozen linear of any kind, how it is run, and what is dropped in training.

Dropout is drawn outside the blocks, by item, and lies in `masks` while a batch goes forward and backward. So a block that is computed
again in its backward pass sees the same masks, compiled blocks stay pure, and batches, processes and resuming change nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from musubi_tuner.memory.quantized import QuantizedLinear

Tensors = Mapping[str, Tensor]
"""One module's tensors under the endings they have in our files (`lora_A.weight`, `lokr_w1`, ...), scale folded in."""


FrozenLinear = nn.Linear | QuantizedLinear


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can sit on `module`."""
    return isinstance(module, FrozenLinear)


def base_weight(linear: FrozenLinear) -> Tensor:
    """The (out, in) weight as the linear uses it, outside autograd; do not write to it."""
    if isinstance(linear, nn.Linear):
        return linear.weight.detach()
    with torch.no_grad():
        return linear.dequantized_weight()


def base_bias(linear: FrozenLinear) -> Tensor | None:
    """The (out,) bias, a parameter or a buffer of the linear."""
    return linear.bias


def base_device(linear: FrozenLinear) -> torch.device:
    return next(chain(linear.parameters(), linear.buffers())).device


def run_base(linear: FrozenLinear, x: Tensor) -> Tensor:
    """The frozen linear in its own dtype; the result has the dtype of `x`. Every layer runs its base through here."""
    if isinstance(linear, nn.Linear):
        return linear(x.to(linear.weight.dtype)).to(x.dtype)
    return linear(x).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Dropout:
    """Probabilities, in training alone."""

    rank: float = 0.0
    """Of each inner dimension (LoRA, DoRA) or output (LoKr, LoHa); what stays is scaled by 1 / (1 - p)."""
    module: float = 0.0
    """Of the whole adapter of a module; what stays is not scaled."""
    neuron: float = 0.0
    """Of each input of the adapter, for all tokens of an item alike; what stays is scaled by 1 / (1 - p)."""

    @property
    def any(self) -> bool:
        return bool(self.rank or self.module or self.neuron)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Shape and scale of one adapter."""

    rank: int
    alpha: float
    rank_stabilized: bool = False
    """Scale alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732) in place of alpha / rank."""
    factor: int = -1
    """LoKr: the largest size of the small factor; -1 = near the square root."""
    small: tuple[int, int] | None = None
    """LoKr: shape of the small factor where a file gives it; wins over `factor`."""
    dropout: Dropout = Dropout()
    base_moves: bool = False
    """The base's weight may lie elsewhere until its block runs (block streaming), so the layer reads it in the forward pass alone."""

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclass(frozen=True, slots=True)
class Masks:
    """What one layer drops for the items of one batch, ready to multiply; None where nothing is dropped."""

    inner: Tensor | None
    """(B, 1, dropout_width)"""
    inputs: Tensor | None
    """(B, 1, in)"""
    module: Tensor | None
    """(B, 1, 1)"""


class AdapterLayer(nn.Module, ABC):
    """A frozen linear with something trained on it. Trainable tensors are float32 masters that run in the dtype of the input, which the
    layer also returns; at its start every type does what the linear alone does.
    """

    kind: ClassVar[str]
    zero_at_start: ClassVar[tuple[str, ...]]
    """Endings of file tensors that are all zero as long as nothing is learned."""

    def __init__(self, base: FrozenLinear, spec: LayerSpec, generator: torch.Generator) -> None:
        """
        Args:
            generator: for the tensors that start at random.
        """
        super().__init__()
        self.base = base
        self.spec = spec
        self.rank = spec.rank
        self.scale = spec.scale
        self.enabled = True
        self.masks: Masks | None = None

    @property
    def weight(self) -> Tensor:
        """The base's, for callers that ask a linear for its dtype; none of them holds a quantized one."""
        assert isinstance(self.base, nn.Linear)
        return self.base.weight

    @property
    def dropout_width(self) -> int:
        """Length of the inner mask."""
        return self.base.out_features

    @property
    def fast_parameters(self) -> tuple[nn.Parameter, ...]:
        """Those that LoRA+ trains faster (arXiv 2402.12354)."""
        return ()

    @abstractmethod
    def file_tensors(self) -> dict[str, Tensor]:
        """Detached tensors by their endings in the file, scale folded in."""

    @abstractmethod
    def load(self, tensors: Tensors) -> None:
        """Take over what `file_tensors` of a layer of this kind and shape gave.

        Raises:
            ShapeMismatch: another rank or factor.
        """

    @classmethod
    @abstractmethod
    def merged(cls, weight: Tensor, tensors: Tensors) -> Tensor:
        """The weight of one plain linear that does what base and adapter do together.

        Args:
            weight: (out, in) float32 base weight.
        """

    @classmethod
    @abstractmethod
    def spec_of(cls, tensors: Tensors) -> LayerSpec:
        """Rank and shape of a stored adapter, with a scale of 1."""


class AddingLayer(AdapterLayer):
    """y = base(x) + change(x)."""

    def forward(self, x: Tensor) -> Tensor:
        y = run_base(self.base, x)
        if not self.enabled:
            return y
        masks = self.masks
        if masks is None:
            return y + self.change(x, y, None)
        change = self.change(_masked(x, masks.inputs), y, masks.inner)
        return y + _masked(change, masks.module)

    @abstractmethod
    def change(self, x: Tensor, y: Tensor, inner: Tensor | None) -> Tensor:
        """What is added to the base's output `y` (B, ..., out).

        Args:
            x: (B, ..., in)
            inner: (B, 1, dropout_width) mask, or None.
        """


class ShapeMismatch(ValueError):
    """A stored adapter that a layer cannot take; the text says what differs."""


def copy_into(parameter: nn.Parameter, value: Tensor, what: str) -> None:
    """
    Raises:
        ShapeMismatch: another shape.
    """
    if parameter.shape != value.shape:
        raise ShapeMismatch(f"{what} is {tuple(value.shape)} in the file and {tuple(parameter.shape)} here")
    with torch.no_grad():
        parameter.copy_(value)


def multiply(x: Tensor, mask: Tensor | None) -> Tensor:
    """A (B, 1, W) mask over (B, ..., W)."""
    return x if mask is None else _masked(x, mask)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x
    return x * mask.to(x.dtype).view(mask.shape[0], *[1] * (x.ndim - 2), mask.shape[-1])
