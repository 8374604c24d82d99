"""One process or several: who we are, how work is shared, how the group ends."""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed

from musubi_tuner.runtime.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)
"""How long processes wait for each other: the first one alone makes previews and saves, which takes longer than torch's ten minutes."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among its group."""

    index: int
    count: int

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of `items`, dealt round robin."""
        return list(items[self.index :: self.count])

    def barrier(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, in the order of the processes."""
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(gathered, value)
        return gathered


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the process group that the launcher prepared, and leave it at the end.

    Raises:
        UserError: the launcher started several processes, but accelerate sees only this one.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if torch.distributed.is_available():
        # Its functions take the group of the moment of their import as a default, and would hold it, with its threads, beyond the end:
        # a process that ends with these sometimes aborts.
        importlib.import_module("torch.distributed.nn.functional")
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_PATIENCE)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if expected > 1 and state.num_processes != expected:
            raise UserError(
                f"WORLD_SIZE is {expected}, but accelerate sees {state.num_processes} process(es): every process would do all the work. "
                "On GPUs use 'accelerate launch --multi_gpu --num_processes N'; on the CPU set ACCELERATE_USE_CPU=true "
                "and use the same command or torchrun."
            )
        yield Processes(index=state.process_index, count=state.num_processes)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
