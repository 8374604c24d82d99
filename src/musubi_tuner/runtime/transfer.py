"""Copies between host and device that nobody waits for until the value is needed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A tensor on its way to the host."""

    _tensor: Tensor
    _arrived: torch.cuda.Event | None

    def result(self) -> Tensor:
        """The tensor, once it has arrived; may be called in another thread than the copy was begun in."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor


def to_host(tensor: Tensor) -> HostCopy:
    """Begin to copy; from a GPU into pinned memory, without waiting."""
    if not tensor.is_cuda:
        return HostCopy(tensor.cpu(), None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return HostCopy(host, arrived)


def settled(copy: HostCopy) -> Tensor:
    """The tensor that was on its way."""
    return copy.result()


def stacked_on_device(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors of one shape as one, on the device; to a GPU as by `to_device`, each written once on the way."""
    pinned = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, pin_memory=device.type == "cuda")
    torch.stack(list(tensors), out=pinned)
    return pinned.to(device, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy; to a GPU through pinned memory, without waiting."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
