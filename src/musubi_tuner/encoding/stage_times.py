"""How fast each stage of caching is by itself, and which one the others wait for."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STAGES = ("decode", "encode", "write")


@dataclass(frozen=True, slots=True)
class StageRate:
    """One stage's own rate."""

    stage: str
    clips: int
    busy: float
    """Seconds of work, over all its threads."""
    threads: int

    @property
    def rate(self) -> float:
        """Clips a second, if it never waited."""
        return self.clips * self.threads / self.busy if self.busy else float("inf")


class StageTimes:
    """Adds up the work of the stages; threads may report at the same time."""

    def __init__(self, threads: dict[str, int]) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._busy = dict.fromkeys(STAGES, 0.0)
        self._clips = dict.fromkeys(STAGES, 0)
        self._started = time.perf_counter()
        self._ended = self._started

    @contextmanager
    def work(self, stage: str, clips: int = 1) -> Iterator[None]:
        """Time what is done inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            now = time.perf_counter()
            with self._lock:
                self._busy[stage] += now - started
                self._clips[stage] += clips
                self._ended = max(self._ended, now)

    def rates(self) -> list[StageRate]:
        return [StageRate(stage, self._clips[stage], self._busy[stage], self._threads[stage]) for stage in STAGES]

    @property
    def overall(self) -> float:
        """Clips written a second, from first to last."""
        seconds = self._ended - self._started
        return self._clips["write"] / seconds if seconds else float("inf")

    def describe(self) -> str:
        """One line for the end of a program; empty where nothing was written."""
        if not self._clips["write"]:
            return ""
        slowest = min(self.rates(), key=lambda one: one.rate)
        parts = ", ".join(f"{one.stage} {one.rate:.1f} (x{one.threads})" for one in self.rates())
        return (
            f"clips a second: {self.overall:.2f} in all; each stage by itself: {parts}. "
            f"{slowest.stage} binds, at {self.overall / slowest.rate:.0%} of its own rate"
        )
