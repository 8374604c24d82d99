"""The trainable layer: a frozen linear with a low-rank update beside it."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """y = base(x) + (alpha / rank) B A x.

    A and B are float32 masters and run in the dtype of `x`, so the layer returns what the base returns. The base is any
    module with `in_features` and `out_features` that maps the last axis; B starts at zero, so the start equals the base.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.rank = rank
        self.scale = alpha / rank
        self.enabled = True
        down = torch.empty(rank, base.in_features)
        bound = 1 / math.sqrt(base.in_features)  # kaiming uniform with a = sqrt(5), as peft starts
        down.uniform_(-bound, bound, generator=generator)
        device = next(itertools.chain(base.parameters(), base.buffers())).device
        self.lora_A = nn.Parameter(down.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        # The scale goes onto the small B, not onto the activations.
        return y + F.linear(F.linear(x, self.lora_A.to(x.dtype)), (self.lora_B * self.scale).to(x.dtype))
