"""Pinned host memory: ordinary memory that is registered with the driver, so that the card reads it at the full rate of the bus while the
host goes on.

torch's own pinned memory is rounded up to powers of two, a third more for the blocks of the released models; what is registered here has
the size that was planned. How much a system lets a process pin is known to nobody beforehand:

* Windows gives all graphics adapters together no more than half of the machine's memory (Microsoft, "Calculating graphics memory": the
  system memory available for graphics is TotalSystemMemory / 2), and users have seen less granted than that.
* WSL 2 has a limit that is not stated ("CUDA on WSL", known limitations), containers may have one, and on Linux there is `ulimit -l`.

So not quite half is planned with on Windows, and where the driver refuses, a plan is made again with less than it granted
(placement/prove.py).
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.runtime.errors import UserError

_OTHER_PINS = 2**30
"""Left of what may be pinned: for batches on their way to the card, and other programs."""
_registered: dict[int, int] = {}
"""Bytes that are registered now, by their address."""


class PinningFailed(UserError):
    """The driver refuses to register more host memory."""

    def __init__(self, size: int | None, granted: int, reason: str) -> None:
        """
        Args:
            size: bytes that were asked for; None = not known.
            granted: bytes that were registered before and still are.
            reason: the driver's.
        """
        asked = "More host memory" if size is None else f"{size / 2**20:.0f} MiB of host memory"
        super().__init__(
            f"{asked} could not be pinned beside {granted / 2**30:.2f} GiB that are ({reason}). Let the plan use less with --ram_gb, or "
            "need less with --weight_format nf4 or a smaller --blocks_to_swap. Windows lets half of the memory be pinned at most, that of "
            "other programs which use the card included; on Linux 'ulimit -l' may be the limit."
        )
        self.granted = granted


def refusal(error: BaseException) -> PinningFailed | None:
    """The error in our words, where it says that host memory could not be pinned; None where it is another one.

    torch pins batches on their way to the card, in a thread of its loader too, which gives an error on with its traceback. What CUDA keeps
    for itself on the card ends with the same error.
    """
    if isinstance(error, PinningFailed):
        return error
    if not isinstance(error, torch.AcceleratorError) or isinstance(error, torch.OutOfMemoryError):
        return None
    reason = next((line.strip() for line in str(error).splitlines() if "out of memory" in line), None)
    return None if reason is None else PinningFailed(None, pinned_bytes(), reason)


def can_pin(size: int) -> bool:
    """Whether the system lets so many bytes be pinned now."""
    try:
        pinned_memory(size)
    except PinningFailed:
        return False
    return True


def pinnable_bytes(available: int, total: int, platform: str) -> int:
    """How much of a machine's host memory may be planned with for pinning.

    Args:
        available: bytes of its memory that are free, after the reserve for other things.
        total: bytes of its memory.
        platform: `sys.platform`
    """
    return max(0, min(available, total // 2 - _OTHER_PINS)) if platform == "win32" else available


def pinned_bytes() -> int:
    """Bytes that this process has registered now."""
    return sum(_registered.values())


def pinned_memory(size: int) -> Tensor:
    """(size,) uint8, neither more nor less.

    Raises:
        PinningFailed: the system does not let so much be pinned.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    pin(buffer)
    return buffer


def pin(buffer: Tensor) -> None:
    """Register the memory of a contiguous tensor, for as long as the tensor lives.

    Raises:
        PinningFailed: the system does not let so much be pinned.
    """
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    assert runtime is not None  # there is a GPU
    result = runtime.cudaHostRegister(address, buffer.nbytes, 0)
    if result != runtime.cudaError.success:
        _forget_error(runtime)
        raise PinningFailed(buffer.nbytes, pinned_bytes(), runtime.cudaGetErrorString(result))
    _registered[address] = buffer.nbytes
    weakref.finalize(buffer, _release, runtime, address)  # before the memory is given back


def _release(runtime: Any, address: int) -> None:
    runtime.cudaHostUnregister(address)
    del _registered[address]


def _forget_error(runtime: Any) -> None:
    """CUDA remembers the error of a call until it is asked for it, which torch does after its next kernel, as if that had failed."""
    try:
        torch.ones(1, device="cuda")
    except RuntimeError:
        return
