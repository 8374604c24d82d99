"""One step of several implementations on the simulated card, in one process: launches, host time, waits and memory, side by side.

`python -m benchmarks.step --simulated` runs it. Values mean nothing there, so nothing is compared and nothing is timed but the host.
"""

import collections
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks import step_models as models
from benchmarks.launches import KINDS, kind_of
from benchmarks.simulated_card import Card, waits

_WARM_UPS, _TIMED = 3, 5


@dataclass(frozen=True, slots=True)
class Counts:
    """One step of one implementation: forward, backward, clipping, AdamW."""

    launches: collections.Counter[str]
    """By `launches.KINDS`."""
    host_seconds: float
    """Processor time of the issuing process, the shortest of a few."""
    waits: int
    saved_bytes: int
    """Allocated more after the forward pass than before it."""
    peak_bytes: int
    """Allocated more at the worst moment of the step than before it."""


def table(card: Card, makers: Mapping[str, Callable[[], models.Implementation]], sample: models.Sample, depth: int, shape: str) -> str:
    """A row for each implementation; what is not installed is left out with a note."""
    lines = [
        f"{depth} blocks, {shape}, {torch.cuda.get_device_name()}, torch {torch.__version__}:",
        "",
        "| implementation | launches | products | attention | compiled | other | copies and fills | host ms | waits | kept GB | peak GB |",
        "|---" * 11 + "|",
    ]
    for title, make in makers.items():
        torch._dynamo.reset()
        try:
            one = count(card, make(), sample)
        except ImportError as error:
            lines.append(f"| {title} | skipped: {error} |" + " |" * 9)
            continue
        kinds = one.launches
        cells = [kinds.total(), *(kinds[kind] for kind in KINDS[:4]), kinds["copy"] + kinds["fill"]]
        cells += [f"{1000 * one.host_seconds:.0f}", one.waits, f"{one.saved_bytes / 1e9:.2f}", f"{one.peak_bytes / 1e9:.2f}"]
        lines.append(f"| {title} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def count(card: Card, implementation: models.Implementation, sample: models.Sample) -> Counts:
    update = models.updater(implementation)

    def step() -> None:
        implementation.forward(sample).backward()
        update()

    for _ in range(_WARM_UPS):
        step()
    seconds = []
    for _ in range(_TIMED):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    with card.watched() as lines:
        step()
    with waits() as found:
        step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = implementation.forward(sample)
    saved = torch.cuda.memory_allocated() - before
    loss.backward()
    update()
    peak = torch.cuda.max_memory_allocated() - before
    return Counts(collections.Counter(map(kind_of, lines)), min(seconds), len(found), saved, peak)
