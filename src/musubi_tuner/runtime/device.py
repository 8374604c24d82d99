"""The device: which one, the dtype that it computes in, copies to and from it that nobody waits for, and giving memory back to it."""

import gc
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best that is there.

    Raises:
        UserError: `name` is no device that this torch can use.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        warn_of_cpu_build()
        return torch.device("cpu")
    found = re.fullmatch(r"(cpu|cuda|mps|xpu)(?::(\d{1,3}))?", name)
    if found is None:
        raise UserError(f"--device {name or repr(name)}: must be cpu, cuda, or cuda:N for the card of number N, the first being 0.")
    kind, number = found[1], int(found[2] or 0)
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: this torch ({torch.__version__}) sees no CUDA device. "
            "Install a CUDA build (README, 'A CUDA build of torch'), or leave --device out."
        )
    count = {"cpu": lambda: 1, "cuda": torch.cuda.device_count, "mps": torch.mps.device_count, "xpu": torch.xpu.device_count}[kind]()
    if number >= count:
        numbered = f"numbered from 0 to {count - 1}" if count else "none of this kind"
        raise UserError(f"--device {name}: this torch ({torch.__version__}) sees {count} such device(s), {numbered}.")
    return torch.device(name)


def warn_of_cpu_build() -> None:
    """Warn when the machine has an NVIDIA GPU and the installed torch cannot use one."""
    if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
        log.warning(
            "WARNING: an NVIDIA driver is installed, but torch %s is a CPU build: everything will run on the CPU. "
            "See 'A CUDA build of torch' in the README.",
            torch.__version__,
        )


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, as the models are released; float32 on the CPU, where bfloat16 is slow."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def free_memory(device: torch.device) -> None:
    """Return what the allocator holds unused to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether Python's or torch's allocator on the host has failed; that of a card raises `torch.OutOfMemoryError`."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


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
