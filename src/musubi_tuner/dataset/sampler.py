"""Which items make which batch: a function of the seed and the batch's number alone."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from musubi_tuner.dataset.items import Item


@dataclass(frozen=True, slots=True)
class Draw:
    """One appearance of an item in an epoch."""

    item: Item
    epoch: int
    repeat: int


class BatchPlan:
    """An endless sequence of batches: epoch after epoch, each shuffled by (seed, epoch).

    Batch i does not depend on how many processes there are or where a run was resumed: process r of R takes the batches
    with i mod R = r, and a resumed run goes on at the number it stopped at.
    """

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        self.seed = seed
        self._buckets: dict[tuple[object, ...], list[Item]] = defaultdict(list)
        for item in items:
            self._buckets[item.bucket].append(item)
        self.batches_per_epoch = len(self._epoch(0))
        self._cached: tuple[int, list[tuple[Draw, ...]]] | None = None

    def batch(self, number: int) -> tuple[Draw, ...]:
        """The items of batch `number`, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._epoch(epoch))
        return self._cached[1][place]

    def _epoch(self, epoch: int) -> list[tuple[Draw, ...]]:
        shuffler = random.Random(f"{self.seed}|{epoch}")
        batches = []
        for bucket in self._buckets.values():
            draws = [Draw(item, epoch, repeat) for item in bucket for repeat in range(item.spec.num_repeats)]
            shuffler.shuffle(draws)
            size = bucket[0].spec.batch_size
            batches += [tuple(draws[start : start + size]) for start in range(0, len(draws), size)]
        shuffler.shuffle(batches)
        return batches
