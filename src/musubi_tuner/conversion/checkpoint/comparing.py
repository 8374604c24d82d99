"""Two checkpoints tensor by tensor: what one lacks, shapes and dtypes, how far the numbers are apart block by block, and where that begins.

Names are held against each other without the prefix of the transformer; weights in 8 bits by the numbers that they stand for; a folder of
diffusers by its official names.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.conversion.checkpoint.components import COMPONENTS, TRANSFORMER, components_of, model_names
from musubi_tuner.conversion.checkpoint.diffusers_tree import INDEX
from musubi_tuner.conversion.checkpoint.single_file import single_file_parts
from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.reading import TensorEntry, read_tensor
from musubi_tuner.ltxv2.versions import transformer_prefix
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.runtime.errors import UserError

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
_OUTPUT = re.compile(r"(audio_)?(proj_out|scale_shift_table)\b")
_LAST = 10**6
"""Behind all blocks."""
_PIECE = 2**24
"""Numbers that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a side."""

    place: tuple[int, int, str]
    """Component, block (-1 before them, and where there are none) and what they are called, in the order of the data's flow."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """That it is stored in."""
    size: int
    """In bytes."""
    read: Callable[[], Tensor]


@dataclass(slots=True)
class Group:
    """A block or a component."""

    tensors: int = 0
    different: int = 0
    largest: float = 0.0
    """Of all |a - b|."""
    squares: float = 0.0
    """Sum of (a - b)^2."""
    norm: float = 0.0
    """Sum of a^2."""
    first: str = ""
    """The tensor where it begins."""

    @property
    def relative(self) -> float:
        """|a - b| / |a|"""
        return math.sqrt(self.squares / self.norm) if self.norm else (math.inf if self.squares else 0.0)


@dataclass(slots=True)
class Compared:
    """What was found."""

    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    dtypes: dict[tuple[torch.dtype, torch.dtype], int] = field(default_factory=dict)
    """How many tensors are stored as one and as the other."""
    groups: dict[str, Group] = field(default_factory=dict)
    """By block or component, in their order."""

    @property
    def first(self) -> str:
        """The first group that differs; empty where none does."""
        return next((name for name, group in self.groups.items() if group.different), "")

    @property
    def is_same(self) -> bool:
        """Names, shapes and numbers; not dtypes."""
        return not (self.only_first or self.only_second or self.first)


def stored_tensors(path: Path) -> dict[str, Stored]:
    """By names that do not depend on the file's form.

    Raises:
        UserError: no checkpoint and no folder of diffusers.
    """
    if (path / INDEX).is_file():
        parts, metadata = single_file_parts(path, None)
        entries = {part.name: part for part in parts}
        shown = Checkpoint(path, metadata, {}, {name: TensorEntry(path, one.shape, one.dtype, 0, 0) for name, one in entries.items()})

        def reader(name: str) -> Callable[[], Tensor]:
            content = entries[name].content
            return (lambda: read_tensor(name, content)) if isinstance(content, TensorEntry) else content

        return {
            plain: Stored(place, entries[name].shape, entries[name].dtype, entries[name].size, reader(name))
            for name, plain, place in _placed(shown, entries)
        }
    checkpoint = open_checkpoint(path)
    names = model_names(checkpoint) if transformer_prefix(checkpoint.names()) is not None else {}
    quantization = read_quantization(checkpoint, names)
    official = {full: name for name, full in quantization.weights.items()}
    scales = set(names.values()) - official.keys()
    kept = {full: entry for full, entry in checkpoint.entries.items() if full not in scales}

    def numbers(full: str) -> Callable[[], Tensor]:
        name = official.get(full, "")
        return lambda: quantization.restored(name, checkpoint.tensor(full), torch.device("cpu"), torch.float32)

    return {
        plain: Stored(place, kept[full].shape, kept[full].dtype, kept[full].size, numbers(full))
        for full, plain, place in _placed(checkpoint, kept)
    }


def _placed(checkpoint: Checkpoint, kept: Collection[str]) -> Iterator[tuple[str, str, tuple[int, int, str]]]:
    """Full name, plain name and place of each tensor that is kept."""
    prefix = transformer_prefix(checkpoint.names()) or ""
    for component, names in components_of(checkpoint).items():
        for full in names:
            if full in kept:
                plain = full.removeprefix(prefix)
                yield full, plain, (COMPONENTS.index(component), *_block_of(component, plain))


def _block_of(component: str, plain: str) -> tuple[int, str]:
    if component != TRANSFORMER:
        return -1, component
    if match := _BLOCK.match(plain):
        return int(match[1]), f"block {match[1]}"
    return (_LAST, f"{component}, output") if _OUTPUT.match(plain) else (-1, f"{component}, input")


def compare(first: Mapping[str, Stored], second: Mapping[str, Stored], *, tolerance: float, advance: Callable[[int], object]) -> Compared:
    """
    Args:
        tolerance: |a - b| up to which numbers count as the same.
        advance: called with the bytes of `first` that were looked at.
    """
    found = Compared(only_second=[name for name in second if name not in first])
    for name, one in sorted(first.items(), key=lambda item: item[1].place[:2]):
        other = second.get(name)
        if other is None:
            found.only_first.append(name)
        elif one.shape != other.shape:
            found.shapes.append((name, one.shape, other.shape))
            group = found.groups.setdefault(one.place[2], Group())
            group.tensors, group.different, group.largest = group.tensors + 1, group.different + 1, math.inf
            group.first = group.first or name
        else:
            if one.dtype != other.dtype:
                pair = (one.dtype, other.dtype)
                found.dtypes[pair] = found.dtypes.get(pair, 0) + 1
            _add(found.groups.setdefault(one.place[2], Group()), name, one.read(), other.read(), tolerance)
        advance(one.size)
    return found


def _add(group: Group, name: str, one: Tensor, other: Tensor, tolerance: float) -> None:
    group.tensors += 1
    most = 0.0
    for left, right in zip(one.flatten().split(_PIECE), other.flatten().split(_PIECE), strict=True):
        if left.dtype == right.dtype and torch.equal(left, right):
            group.norm += float(left.float().norm()) ** 2
            continue
        a, b = left.double(), right.double()
        same = (a == b) | (a.isnan() & b.isnan())
        apart = (a - b).abs().masked_fill(same, 0).nan_to_num(nan=math.inf, posinf=math.inf)
        most = max(most, float(apart.max())) if apart.numel() else most
        group.squares += float(apart.square().sum())
        group.norm += float(a.nan_to_num(0, 0, 0).square().sum())
    group.largest = max(group.largest, most)
    if most > tolerance:
        group.different += 1
        group.first = group.first or name


def check_comparable(first: Path, second: Path) -> None:
    """
    Raises:
        UserError: one file, named twice.
    """
    if first.exists() and second.exists() and first.samefile(second):
        raise UserError(f"{first} and {second} are the same file.")
