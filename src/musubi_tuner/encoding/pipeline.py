"""Decode, encode and write at the same time: decoding threads ahead, the encoder in the middle, writing threads behind.

Memory is bounded: no more clips are decoded ahead than there are workers plus one batch, and no more clips wait to be written than
there are writers.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from musubi_tuner.cache.store import DiskFullError
from musubi_tuner.runtime.errors import UserError

Job = TypeVar("Job")
Decoded = TypeVar("Decoded")
Encoded = TypeVar("Encoded")

_WRITERS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages(Generic[Job, Decoded, Encoded]):
    """What is done to each job."""

    decode: Callable[[Job], Decoded]
    """In a thread; a UserError fails this job alone."""
    shape: Callable[[Decoded], Hashable]
    """Neighbors of equal shape are encoded together."""
    encode: Callable[[Sequence[Decoded]], Sequence[Encoded]]
    write: Callable[[Job, Encoded], None]
    """In a thread; a UserError fails this job alone, a full disk ends the run."""


def run_pipeline(
    jobs: Sequence[Job],
    stages: Stages[Job, Decoded, Encoded],
    *,
    batch_size: int,
    workers: int,
    on_done: Callable[[], None],
) -> list[tuple[Job, str]]:
    """Run all jobs in order.

    Args:
        on_done: called once for each job, whether it failed or not.

    Returns:
        The jobs that failed, with what to tell the user.

    Raises:
        DiskFullError: what was written before stays good.
    """
    failures: list[tuple[Job, str]] = []
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

    decoders, writers = ThreadPoolExecutor(max(1, workers)), ThreadPoolExecutor(_WRITERS)
    try:
        decoded = _decoded_ahead(jobs, stages.decode, decoders, workers + batch_size, failures, on_done)
        for batch in _batches(decoded, stages.shape, batch_size):
            encoded = stages.encode([value for _, value in batch])
            for (job, _), result in zip(batch, encoded, strict=True):
                while len(writing) >= _WRITERS:
                    finish_oldest()
                writing.append((job, writers.submit(stages.write, job, result)))
        while writing:
            finish_oldest()
    finally:
        decoders.shutdown(cancel_futures=True)
        writers.shutdown()
    return failures


def _decoded_ahead(
    jobs: Sequence[Job],
    decode: Callable[[Job], Decoded],
    pool: ThreadPoolExecutor,
    ahead: int,
    failures: list[tuple[Job, str]],
    on_done: Callable[[], None],
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
