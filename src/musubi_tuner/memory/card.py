"""What the machine has and reaches: free memory, and a quarter of a second of measuring instead of a table of cards."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from musubi_tuner.memory.compiling import first_line
from musubi_tuner.memory.pinning import pinnable_bytes, pinned_memory
from musubi_tuner.memory.quantized import low_bit_linear, quantize
from musubi_tuner.memory.step_model import CardRates
from musubi_tuner.runtime.allocator import pieces_grow

log = logging.getLogger(__name__)

GIB = 2**30
HOST_RESERVE = 6 * GIB
"""For the process itself, its loaders and the system's file cache."""
_Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Layers:
    """Linears of one size."""

    inputs: int
    outputs: int
    count: int


_LAYERS = (_Layers(4096, 4096, 6), _Layers(4096, 16384, 1), _Layers(16384, 4096, 1))
"""Of a block's video stream, without those that read the text."""
_ROWS = 4352
"""No length of a linear's: kernels that are compiled for any size are compiled a second time where two sizes agree."""
COPIED = 2 * _ROWS * _LAYERS[1].outputs
"""Bytes of a copy that is timed on a GPU."""
_LAYERS_OF_A_CPU = (_Layers(256, 256, 6), _Layers(256, 512, 1), _Layers(512, 256, 1))
DEVICE_SHARE, _DEVICE_SHARE_IN_FIXED_PIECES = 0.94, 0.9
"""Of the free device memory, by whether the allocator's pieces can grow (runtime/allocator.py). The rest is for what lies unused between
tensors (2 % and 9 % at most in bf16, benchmarks/peaks.py) and for libraries' workspaces."""


def measure_rates(device: torch.device, *, pins: bool = True) -> tuple[CardRates, dict[str, float]]:
    """Rates of products, attention and copies at sizes of the model (smaller on a CPU), and operations per second of whole linears in each
    low-bit format that the card multiplies in (none on a CPU). Linears run forward and backward, as many of each size as a block has.

    Args:
        pins: copies come from pinned memory, of `COPIED` bytes; otherwise from ordinary memory, which is slower.

    Raises:
        PinningFailed: the system does not let so much be pinned.
    """
    cuda = device.type == "cuda"
    rows, heads, layers = (_ROWS, 32, _LAYERS) if cuda else (256, 4, _LAYERS_OF_A_CPU)
    dtype = torch.bfloat16 if cuda else torch.float32
    random = partial(torch.randn, device=device, dtype=dtype)
    bf16 = _linear_rate(layers, rows, random, lambda weight: partial(F.linear, weight=weight))
    low = _low_bit_rates(layers, rows, random) if cuda else {}
    query = random(1, heads, rows, 128, requires_grad=True)
    attention_work = 4.0 * heads * rows * rows * 128
    with torch.no_grad():
        attention = attention_work / seconds_of(lambda: F.scaled_dot_product_attention(query, query, query), device)
    both = seconds_of(lambda: F.scaled_dot_product_attention(query, query, query).backward(query.detach()), device)
    source = torch.empty(rows * layers[1].outputs, device=device, dtype=dtype)
    size = source.numel() * source.element_size()
    target = torch.empty_like(source)
    host = pinned_memory(size) if cuda and pins else torch.empty(size, dtype=torch.uint8)  # torch would keep its own pinned for good
    device_bytes = torch.empty(size, dtype=torch.uint8, device=device)
    backward = 2.5 * attention_work / max(both - attention_work / attention, 0.2 * both)
    rates = CardRates(
        bf16=bf16,
        low_bit=max(low.values(), default=bf16),
        attention_forward=attention,
        attention_backward=backward,
        bandwidth=2 * size / seconds_of(lambda: target.copy_(source), device),
        host_to_device=size / seconds_of(lambda: device_bytes.copy_(host, non_blocking=True), device),
    )
    return rates, low


def free_memory(device: torch.device, vram_gb: float | None, ram_gb: float | None) -> tuple[int, int]:
    """Bytes of the device and of the host that may be used: what is free now, or less where the user caps it (GB of 1024^3 bytes) or the
    system does not let so much be pinned."""
    import psutil

    memory = psutil.virtual_memory()
    host = memory.available
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    if vram_gb is not None:
        free = min(free, int(vram_gb * GIB))
    if ram_gb is not None:
        host = min(host, int(ram_gb * GIB))
    host = max(0, host - HOST_RESERVE)
    return int(free * _device_share(device)), pinnable_bytes(host, memory.total, sys.platform) if device.type == "cuda" else host


def _device_share(device: torch.device) -> float:
    return _DEVICE_SHARE_IN_FIXED_PIECES if device.type == "cuda" and not pieces_grow() else DEVICE_SHARE


def room_left(device: torch.device) -> int:
    """Bytes that torch's allocator may still give to tensors of a GPU: of what is free, below the cap of `cap_device_memory`."""
    free, total = torch.cuda.mem_get_info(device)
    most = min(free + torch.cuda.memory_reserved(device), int(total * torch.cuda.get_per_process_memory_fraction(device.index)))
    return int(most * _device_share(device)) - torch.cuda.memory_allocated(device)


def cap_device_memory(device: torch.device, vram_gb: float | None) -> None:
    """Have torch's allocator run out of memory where the memory that may be used ends; see `allocator_share`. Of this process's tensors it
    counts all; what CUDA itself takes, about half a GB, comes on top. Previews and their decoders are within it."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    share = allocator_share(free + torch.cuda.memory_reserved(device), total, vram_gb, sys.platform)
    if share is not None:
        torch.cuda.set_per_process_memory_fraction(share, device.index)  # which may be none: the current one


def allocator_share(usable: int, total: int, vram_gb: float | None, platform: str) -> float | None:
    """The part of a card's memory that the allocator may take; None = all that it gets.

    Windows' driver gives memory of the host where the card has no more ("CUDA - Sysmem Fallback Policy"), over the bus and many times
    slower, so there the end is what is free at the start. Elsewhere it is `vram_gb`, where given.

    Args:
        usable: bytes that are free, and those that the allocator holds already.
        platform: `sys.platform`
    """
    if platform != "win32" and vram_gb is None:
        return None
    return min(usable, total, total if vram_gb is None else int(vram_gb * GIB)) / total


def _linear_rate(
    layers: Sequence[_Layers], rows: int, random: Callable[..., torch.Tensor], make: Callable[[torch.Tensor], _Linear]
) -> float:
    """Operations per second of frozen linears, forward and backward: gradients of inputs alone.

    Args:
        random: sizes -> a tensor of the device and dtype that are measured.
        make: (outputs, inputs) weight -> the linear.
    """
    operations = seconds = 0.0
    for layer in layers:
        x = random(rows, layer.inputs).requires_grad_()
        gradient = random(rows, layer.outputs)
        run = make(random(layer.outputs, layer.inputs))
        operations += layer.count * 4.0 * rows * layer.inputs * layer.outputs
        seconds += layer.count * seconds_of(lambda: torch.autograd.grad(run(x), x, gradient), x.device)  # noqa: B023 - run at once
    return operations / seconds


def _low_bit_rates(layers: Sequence[_Layers], rows: int, random: Callable[..., torch.Tensor]) -> dict[str, float]:
    """Of whole linears in each format that the card multiplies in, with the conversion of inputs and gradients."""
    capability = torch.cuda.get_device_capability(random(1).device)
    found: dict[str, float] = {}
    for name, first in (("fp8", (8, 9)), ("int8", (8, 0))):
        if capability < first:
            continue
        try:
            make = lambda weight: partial(low_bit_linear, codes=quantize(weight, name))  # noqa: B023, E731 - run at once
            found[name] = _linear_rate(layers, rows, random, make)
        except (RuntimeError, ValueError) as error:  # a card or build without this product
            log.info("%s products do not run on this card: %s", name, first_line(error))
    return found


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 5, *, warm_ups: int = 2) -> float:
    """Shortest of a few runs after some to warm up."""
    cuda = device.type == "cuda"
    times = []
    for _ in range(repeats + warm_ups):
        if cuda:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return max(min(times[warm_ups:]), 1e-9)
