"""Gradients over processes, and their norm."""

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn


def average_gradients(parameters: Sequence[nn.Parameter], processes: int) -> None:
    """Replace every gradient by its mean over the processes, in one exchange.

    Adapters are small beside the model, so one flat buffer after the last backward costs less than hooks during it, and a
    parameter that took no part in this process's batch simply adds zero.
    """
    if processes == 1:
        return
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    torch.distributed.all_reduce(flat)
    flat /= processes
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Total gradient norm (a scalar on the device), clipped to `max_norm` where that is above 0."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
