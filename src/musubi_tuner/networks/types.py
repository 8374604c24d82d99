"""The network types by the names that `--network_args type=` takes; among them full fine-tuning, whose file holds the difference to the
base."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.networks.base import AdapterLayer, FrozenLinear, LayerSpec, Tensors, base_bias, base_weight, copy_into, run_base
from musubi_tuner.networks.lora import DoRALayer, LoRALayer
from musubi_tuner.networks.lycoris import LoHaLayer, LoKrLayer

DIFF = "diff"


class FullLayer(AdapterLayer):
    """`tuned` (out, in) is a float32 master; the base stays as it is, for the difference and for switching off. The bias stays frozen."""

    kind = "full"
    zero_at_start = (DIFF,)

    def __init__(self, base: FrozenLinear, spec: LayerSpec, generator: torch.Generator) -> None:
        super().__init__(base, spec, generator)
        self.tuned = nn.Parameter(base_weight(base).float().clone())
        self._start = base_weight(base)  # a reference of its own: block streaming puts other blocks into the base's storage

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return run_base(self.base, x)
        bias = base_bias(self.base)
        return F.linear(x, self.tuned.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def file_tensors(self) -> dict[str, Tensor]:
        return {DIFF: self.tuned.detach() - self._start.to(self.tuned)}

    def load(self, tensors: Tensors) -> None:
        copy_into(self.tuned, self._start.to(self.tuned) + tensors[DIFF].to(self.tuned), "the difference")

    @classmethod
    def merged(cls, weight: Tensor, tensors: Tensors) -> Tensor:
        return weight + tensors[DIFF].to(weight)

    @classmethod
    def spec_of(cls, tensors: Tensors) -> LayerSpec:
        return LayerSpec(rank=1, alpha=1.0)


TYPES: Mapping[str, type[AdapterLayer]] = {layer.kind: layer for layer in (LoRALayer, DoRALayer, LoKrLayer, LoHaLayer, FullLayer)}
