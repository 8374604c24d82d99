"""Decode, encode and write at the same time: decoding threads ahead, the encoder in the middle, writing threads behind.

Memory is bounded: no more clips are decoded ahead than there are workers plus one batch, one batch is on its way back from the
encoder, and no more clips wait to be written than there are writers.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from musubi_tuner.cache.store import DiskFullError
from musubi_tuner.runtime.errors import UserError

Job = TypeVar("Job")
Decoded = TypeVar("Decoded")
Begun = TypeVar("Begun")
Encoded = TypeVar("Encoded")

_WRITERS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages(Generic[Job, Decoded, Begun, Encoded]):
    """What is done to each job."""

    decode: Callable[[Job], Decoded]
    """In a thread; a UserError fails this job alone."""
    shape: Callable[[Decoded], Hashable]
    """Neighbors of equal shape are encoded together."""
    encode: Callable[[Sequence[Decoded]], Sequence[Begun]]
    settle: Callable[[Begun], Encoded]
    """Waits for what `encode` has begun; called when the next batch has been begun too, so that a GPU never waits for the host."""
    write: Callable[[Job, Encoded], None]
    """In a thread; a UserError fails this job alone, a full disk ends the run."""


STAGES = ("decode", "encode", "write")


class StageTimes:
    """How fast each stage is by itself, and which one the others wait for; threads may report at the same time."""

    def __init__(self, threads: dict[str, int]) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._busy = dict.fromkeys(STAGES, 0.0)
        self.clips = dict.fromkeys(STAGES, 0)
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
                self.clips[stage] += clips
                self._ended = max(self._ended, now)

    def rates(self) -> dict[str, float]:
        """Clips a second of each stage, if it never waited."""
        return {
            stage: self.clips[stage] * self.threads[stage] / self._busy[stage] if self._busy[stage] else float("inf") for stage in STAGES
        }

    @property
    def overall(self) -> float:
        """Clips written a second, from first to last."""
        seconds = self._ended - self._started
        return self.clips["write"] / seconds if seconds else float("inf")

    def describe(self) -> str:
        """One line for the end of a program; empty where nothing was written."""
        if not self.clips["write"]:
            return ""
        rates = self.rates()
        slowest = min(STAGES, key=rates.__getitem__)
        parts = ", ".join(f"{stage} {rate:.1f} (x{self.threads[stage]})" for stage, rate in rates.items())
        return (
            f"clips a second: {self.overall:.2f} in all; each stage by itself: {parts}. "
            f"{slowest} binds, at {self.overall / rates[slowest]:.0%} of its own rate"
        )


@dataclass(frozen=True, slots=True)
class Finished(Generic[Job]):
    """What came of a run."""

    failures: list[tuple[Job, str]]
    """With what to tell the user."""
    times: StageTimes


def run_pipeline(
    jobs: Sequence[Job],
    stages: Stages[Job, Decoded, Begun, Encoded],
    *,
    batch_size: int,
    workers: int,
    on_done: Callable[[], object],
) -> Finished[Job]:
    """Run all jobs in order.

    Args:
        on_done: called once for each job, whether it failed or not.

    Raises:
        DiskFullError: what was written before stays good.
    """
    failures: list[tuple[Job, str]] = []
    times = StageTimes({"decode": max(1, workers), "encode": 1, "write": _WRITERS})
    writing: deque[tuple[Job, Future]] = deque()

    def finish_oldest() -> None:
        job, future = writing.popleft()
        try:
            future.result()
        except DiskFullError:
            raise
        except UserError as error:
            failures.append((job, str(error)))
        on_done()

    def decode(job: Job) -> Decoded:
        with times.work("decode"):
            return stages.decode(job)

    def write(job: Job, encoded: Encoded) -> None:
        with times.work("write"):
            stages.write(job, encoded)

    def hand_on(results: Sequence[tuple[Job, Begun]]) -> None:
        for job, started in results:
            with times.work("encode", 0):
                result = stages.settle(started)
            while len(writing) >= _WRITERS:
                finish_oldest()
            writing.append((job, writers.submit(write, job, result)))

    decoders, writers = ThreadPoolExecutor(max(1, workers)), ThreadPoolExecutor(_WRITERS)
    try:
        decoded = _decoded_ahead(jobs, decode, decoders, workers + batch_size, failures, on_done)
        begun: list[tuple[Job, Begun]] = []
        for batch in _batches(decoded, stages.shape, batch_size):
            with times.work("encode", len(batch)):
                encoded = stages.encode([value for _, value in batch])
            hand_on(begun)
            begun = [(job, result) for (job, _), result in zip(batch, encoded, strict=True)]
        hand_on(begun)
        while writing:
            finish_oldest()
    finally:
        decoders.shutdown(cancel_futures=True)
        writers.shutdown()
    return Finished(failures, times)


def _decoded_ahead(
    jobs: Sequence[Job],
    decode: Callable[[Job], Decoded],
    pool: ThreadPoolExecutor,
    ahead: int,
    failures: list[tuple[Job, str]],
    on_done: Callable[[], object],
) -> Iterator[tuple[Job, Decoded]]:
    """Jobs with their decoded values, in order; those that fail go to `failures`."""
    remaining = iter(jobs)
    pending: deque[tuple[Job, Future]] = deque()
    while True:
        while len(pending) < ahead and (job := next(remaining, None)) is not None:
            pending.append((job, pool.submit(decode, job)))
        if not pending:
            return
        job, future = pending.popleft()
        try:
            value = future.result()
        except UserError as error:
            failures.append((job, str(error)))
            on_done()
            continue
        del future
        yield job, value


def _batches(
    decoded: Iterator[tuple[Job, Decoded]], shape: Callable[[Decoded], Hashable], size: int
) -> Iterator[list[tuple[Job, Decoded]]]:
    batch: list[tuple[Job, Decoded]] = []
    current: Hashable = None
    for job, value in decoded:
        if batch and (len(batch) == size or shape(value) != current):
            yield batch
            batch = []
        current = shape(value)
        batch.append((job, value))
    if batch:
        yield batch
