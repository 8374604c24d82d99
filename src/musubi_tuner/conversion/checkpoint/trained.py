"""A checkpoint with trained weights in it: its own names, order, config and all other parts, copied from the file that was started from."""

import errno
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.conversion.checkpoint.components import model_names
from musubi_tuner.conversion.checkpoint.parts import whole_metadata
from musubi_tuner.conversion.checkpoint.streaming import Part, check_unchanged, copied, stamps_of, write_stream
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.runtime.errors import TemporaryFailure, UserError


def writer_of_trained(checkpoint: Checkpoint) -> Callable[[Path, Mapping[str, Tensor], torch.dtype, Mapping[str, str]], None]:
    """What writes `checkpoint` with trained weights in place of its own.

    Returns:
        A function of the file's path, {official name: trained weight}, a dtype and further metadata. A weight is written in that dtype, or
        in float32 where the checkpoint has it so. It raises OSError where the file cannot be written, and leaves no part of it.
    """
    names, before = model_names(checkpoint), stamps_of(checkpoint.entries.values())

    def write(path: Path, trained: Mapping[str, Tensor], dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
        made = {names[name]: _part(checkpoint, names[name], weight, dtype) for name, weight in trained.items()}
        parts = [made.get(full) or copied(full, checkpoint.entries[full]) for full in checkpoint.names()]
        try:
            check_unchanged(before, checkpoint.entries.values())
            write_stream(path, parts, {**whole_metadata(checkpoint), **metadata}, lambda written: None)
        except TemporaryFailure as error:
            raise OSError(errno.ENOSPC, str(error)) from error
        except UserError as error:
            raise error.__cause__ if isinstance(error.__cause__, OSError) else OSError(str(error)) from None

    return write


def _part(checkpoint: Checkpoint, full: str, weight: Tensor, dtype: torch.dtype) -> Part:
    dtype = torch.float32 if checkpoint.dtype(full) == torch.float32 else dtype
    return Part(full, dtype, checkpoint.shape(full), lambda: weight.detach().to(dtype))
