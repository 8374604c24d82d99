"""Batches ahead of the step, read by worker processes."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker

import torch
from torch.utils.data import DataLoader, Dataset

from musubi_tuner.dataset.batch import Batch
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.draws import DrawRules
from musubi_tuner.dataset.items import BatchPlan, Item


class _Batches(Dataset):
    """Batch numbers of one process as a map-style dataset; picklable, for Windows' spawned workers."""

    def __init__(self, items: Sequence[Item], seed: int, mode: str, rules: DrawRules, numbers: range) -> None:
        self._plan = BatchPlan(items, seed)
        self._mode = mode
        self._rules = rules
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Batch:
        return make_batch(self._plan.batch(self._numbers[index]), self._mode, self._rules)


def iterate_batches(
    items: Sequence[Item], *, mode: str, rules: DrawRules, numbers: range, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Batches `numbers` of the plan, in order, on `device`.

    Args:
        numbers: this process's share, such as `range(start + rank, end, processes)`.
        workers: 0 reads in this process; the order and the values are the same for any number.
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
        worker_init_fn=_ignore_interrupts if workers else None,
    )
    with _interrupts_held_back():
        batches = iter(loader)
    ahead: Batch | None = None  # its copy runs while the batch before it is trained on
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


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the step that it lets finish still needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """While processes start: they take the mask over, so that they are safe before `_ignore_interrupts` runs in them. Not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its own start would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
