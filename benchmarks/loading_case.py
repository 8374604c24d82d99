"""What `benchmarks.loading` measures: a checkpoint of random weights at real sizes, and one load of it in a process of its own."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from benchmarks.block_counts import config_section
from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.load import load_transformer, read_config
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.memory.streaming import BlockStreamer
from musubi_tuner.placement.load import load_weights
from musubi_tuner.placement.planning import place_by_hand

STAND_IN = "bf16-stand-in"
"""Every weight is copied into one buffer, as a card would take it: what reading alone costs where there is no card."""
PREFIX = "model.diffusion_model."
_POOL = 2**24
_PIECE_BYTES = 2**24
_PAGE = 4096
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One load."""

    checkpoint: Path
    weight_format: str
    """`STAND_IN`, or how the linears of the blocks are stored."""
    streamed: int
    """Blocks that go to the host."""
    cold: bool
    """Whether the file's pages are dropped from the cache before, where the system lets one; else it is read once before."""
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one load took. Memory is the most over what the process held before; 0 where it cannot be told."""

    weight_format: str
    streamed: int
    cache: str
    seconds: float
    """Until every weight lies where it is to be, streamed blocks in their host buffers."""
    file_bytes: int
    storage_bytes: int
    """What the system fetched from the disk for it; tells whether the cache was cold."""
    host_bytes: int
    """Pages of the file that are mapped count."""
    own_bytes: int
    """Without pages of files."""
    device_bytes: int


def write_checkpoint(path: Path, *, toy: bool, blocks: int) -> int:
    """A 2.3-style transformer of random bf16 weights under its official names, written piece by piece; returns its size in bytes."""
    section = config_section(toy, blocks)
    with torch.device("meta"):
        model = LTXModel(TransformerConfig.from_checkpoint_config(section))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    header: dict[str, object] = {"__metadata__": {"config": json.dumps({"transformer": section}), "model_version": "2.3.0"}}
    offset = 0
    for name in sorted(shapes):
        end = offset + 2 * int(torch.Size(shapes[name]).numel())
        header[PREFIX + name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    values = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    pool = memoryview(values.view(torch.uint8).numpy())
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for start in range(0, offset, _PIECE_BYTES):
            place = start // _PIECE_BYTES * 4098 % (2 * _POOL - _PIECE_BYTES)  # another part of the pool each time
            file.write(pool[place : place + min(_PIECE_BYTES, offset - start)])
        file.flush()
        os.fsync(file.fileno())  # what is not yet on the disk cannot be dropped from the cache
    return path.stat().st_size


def can_drop_cache() -> bool:
    return hasattr(os, "posix_fadvise")


def load_once(case: Case) -> Reading:
    """The production path; run it in a fresh process, so that memory given back by an earlier load is not taken anew."""
    _prepare_cache(case)
    device = torch.device(case.device)
    process = psutil.Process()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)  # makes the context
        torch.cuda.reset_peak_memory_stats(device)
    fetched = _storage_bytes(process)
    with _peaks(process) as peaks:
        started = time.perf_counter()
        load(case)
        if cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return Reading(
        weight_format=case.weight_format,
        streamed=case.streamed,
        cache="cold" if case.cold else "warm",
        seconds=seconds,
        file_bytes=case.checkpoint.stat().st_size,
        storage_bytes=_storage_bytes(process) - fetched,
        host_bytes=peaks.host,
        own_bytes=peaks.own,
        device_bytes=torch.cuda.max_memory_allocated(device) if cuda else 0,
    )


def load(case: Case) -> tuple[LTXModel, BlockStreamer | None]:
    """The model as a training run holds it before its network is made."""
    checkpoint, device = open_checkpoint(case.checkpoint), torch.device(case.device)
    if case.weight_format == STAND_IN:
        return load_transformer(checkpoint, mode="av", device=device, dtype=torch.bfloat16, place=_stand_in(checkpoint)), None
    options = MemoryOptions(weight_format=case.weight_format, blocks_to_swap=case.streamed)
    placement = place_by_hand(options, read_config(checkpoint).num_layers, device)
    weights = load_weights(checkpoint, placement, mode="av", device=device, dtype=torch.bfloat16)
    model = weights.transformer
    streamed = [model.transformer_blocks[index] for index in placement.streamed]
    streamer = BlockStreamer(streamed, device, regions=weights.regions) if streamed else None
    if streamer is not None:
        streamer.before_forward(streamed[0])  # fills the slots on the device
    _touch(model)
    return model, streamer


def _stand_in(checkpoint: Checkpoint) -> Callable[[str, Tensor], Tensor]:
    buffer = torch.empty(max(entry.size for entry in checkpoint.entries.values()), dtype=torch.uint8)

    def place(name: str, tensor: Tensor) -> Tensor:
        buffer[: tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
        return torch.empty(0, dtype=tensor.dtype)

    return place


def _touch(model: nn.Module) -> None:
    """Read something of each page that lies on the host, so that what is only mapped is read too."""
    for tensor in model.state_dict().values():
        if tensor.device.type == "cpu" and tensor.numel():
            tensor.reshape(-1).view(torch.uint8)[::_PAGE].sum()


def _prepare_cache(case: Case) -> None:
    with case.checkpoint.open("rb", buffering=0) as file:
        if case.cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return
        while file.read(_PIECE_BYTES):
            pass


def _storage_bytes(process: psutil.Process) -> int:
    return process.io_counters().read_bytes if psutil.LINUX else 0


@dataclass(slots=True)
class _Peaks:
    host: int = 0
    own: int = 0
    done: threading.Event = field(default_factory=threading.Event)


@contextmanager
def _peaks(process: psutil.Process) -> Iterator[_Peaks]:
    """The most memory over that at the start, looked at every few milliseconds."""

    def now() -> tuple[int, int]:
        info = process.memory_info()
        return info.rss, info.rss - info.shared if psutil.LINUX else 0

    peaks, (host, own) = _Peaks(), now()

    def watch() -> None:
        while not peaks.done.wait(_SAMPLE_SECONDS):
            total, mine = now()
            peaks.host, peaks.own = max(peaks.host, total - host), max(peaks.own, mine - own)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        peaks.done.set()
        thread.join()
