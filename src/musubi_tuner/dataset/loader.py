"""Batches ahead of the step, read by worker processes."""

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.draws import DrawRules
from musubi_tuner.dataset.items import BatchPlan, Item
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.signals import ASKING

_DYING_SECONDS = 2.0


class _Batches(Dataset):
    """Batch numbers of one process as a map-style dataset; picklable, for Windows' spawned workers."""

    def __init__(self, items: Sequence[Item], seed: int, mode: str, rules: DrawRules, numbers: range) -> None:
        self._plan = BatchPlan(items, seed)
        self._mode = mode
        self._rules = rules
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Batch | UserError:
        """An error of the user's comes back as a value: a worker's exceptions are wrapped in its traceback."""
        try:
            return make_batch(self._plan.batch(self._numbers[index]), self._mode, self._rules)
        except UserError as error:
            return error


def iterate_batches(
    items: Sequence[Item], *, mode: str, rules: DrawRules, numbers: range, workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Batches `numbers` of the plan, in order, on `device`. Close it, so that its workers end.

    Args:
        numbers: this process's share, such as `range(start + rank, end, processes)`.
        workers: 0 reads in this process; the order and the values are the same for any number.

    Raises:
        UserError: a cache file has gone or is damaged.
        TemporaryFailure: a worker was killed.
    """
    dataset = _Batches(items, rules.seed, mode, rules, numbers)
    workers = min(workers, len(numbers))
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=device.type == "cuda",
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=prepare_worker if workers else None,
        generator=torch.Generator(),  # it draws a number for each pass, which torch's own would not have where a run goes on
    )
    with _interrupts_held_back():
        batches: Any = iter(loader)
    try:
        yield from _one_ahead(_in_words(batches), device)
    finally:
        if workers:
            batches._shutdown_workers()  # an error's traceback holds them, and they ignore what else would end them


def _one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """On the device; to a GPU the next one is copied while a batch is trained on."""
    ahead: Batch | None = None
    for batch in batches:
        moved = batch.to(device)
        if device.type != "cuda":
            yield moved
            continue
        if ahead is not None:
            yield ahead
        ahead = moved
    if ahead is not None:
        yield ahead


def _in_words(batches: Any) -> Iterator[Batch]:
    """What the loader gives; its errors as ours."""
    while True:
        try:
            batch = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            workers = {worker.sentinel: worker for worker in getattr(batches, "_workers", ())}
            dead = wait(workers, timeout=_DYING_SECONDS)  # its connection may break before the system calls it ended
            if not dead:
                raise
            raise TemporaryFailure(
                f"a loading worker (process {workers[dead[0]].pid}) was killed; usually the machine ran out of memory. Give "
                "--max_data_loader_n_workers 0, or fewer than now."
            ) from error
        if batch is None:
            return
        if isinstance(batch, UserError):
            raise batch
        yield batch


def prepare_worker(worker: int) -> None:
    """It ends with the process that has started it, and not before.

    Ctrl-C reaches every process of the terminal, and what ends a service or a container often every process of it; the step that is
    finished then still needs its batches. torch's own watch compares the parent with the one that a worker finds when it begins, seconds
    after it was started: where training was killed in between, the worker would stay for ever.
    """
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a worker has been started by a process"
    parent.join()
    os._exit(1)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """While processes start: they take the mask over, so that they are safe before `prepare_worker` runs in them. Not on Windows.

    What torch does on the end of a worker is undone: it raises an error wherever the program is at that moment, in the middle of an update
    too. The loader finds out by itself when it is asked for the next batch.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its own start would let interrupts through again
    before, on_end_of_child = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING), signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGCHLD, on_end_of_child)
