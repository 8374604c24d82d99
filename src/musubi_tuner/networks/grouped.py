"""LoRA of linears that read the same tensor, run as a group: one thin product for the first halves of all, and second halves that are
added to the base's output inside their product. The activations are read once instead of once for each adapter."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.transformer.attention import Attention
from musubi_tuner.networks.base import run_base
from musubi_tuner.networks.lora import LoRALayer


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


def _plain(linear: nn.Module) -> bool:
    return type(linear) is LoRALayer and linear.enabled and (linear.masks is None or linear.masks.inputs is None)


def _added(linear: LoRALayer, x: Tensor, low: Tensor) -> Tensor:
    masks = linear.masks
    low, up = linear.second_half(low, *((masks.inner, masks.module) if masks else ()))
    y = run_base(linear.base, x)
    return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), up.t()).view(y.shape)
