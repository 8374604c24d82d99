"""A folder of diffusers back as one file with the official names: the same tensors, bit for bit, in the same order, with all metadata.

Names and metadata are from what `diffusers_tree` noted in the folder, or, of a folder that another program has made, from a release file
of the same architecture (`--like`): its header alone is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.conversion.checkpoint.diffusers_models import FOLDERS, models_of
from musubi_tuner.conversion.checkpoint.diffusers_tree import INDEX, NOTES, SOURCE
from musubi_tuner.conversion.checkpoint.parts import whole_metadata
from musubi_tuner.conversion.checkpoint.streaming import Part, copied
from musubi_tuner.ltxv2.weights import INDEX_ENDING, Checkpoint, open_files, shards_of
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json
from musubi_tuner.runtime.program import quoted
from musubi_tuner.runtime.tables import names_of


@dataclass(frozen=True, slots=True)
class _Notes:
    """What is known of the file that the folder stands for."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[str, tuple[str, ...]]]
    """{official name: folder, names in it}"""


def single_file_parts(folder: Path, like: Checkpoint | None) -> tuple[list[Part], Mapping[str, str]]:
    """What the file holds, and its metadata.

    Args:
        like: of a folder without notes, a checkpoint of the same architecture.

    Raises:
        UserError: no folder of diffusers, no notes and no `like`, tensors that are missing, are not known, or do not fit together.
    """
    if folder.is_file():
        raise UserError(
            f"{folder}: is a single file already; --to single_file takes the folder of a pipeline of diffusers (with {INDEX}). "
            "ltxv2 checkpoint join makes one file of component files, and --to diffusers a folder of this one."
        )
    if not (folder / INDEX).is_file() and any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: holds no {INDEX}, so it is no folder of a pipeline of diffusers, but files of a checkpoint. Make one file of "
            f"them by: ltxv2 checkpoint join {quoted(folder)} --output FILE"
        )
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder}: holds no {INDEX}, so it is no folder of a pipeline of diffusers. Give the folder that holds it.")
    notes = _of_like(like, folder) if like is not None else _read_notes(folder)
    opened = {name: _open(folder / name) for name in (*FOLDERS, SOURCE) if (folder / name).is_dir()}
    parts, used = [], {name: set() for name in opened}
    for full, (place, names) in notes.tensors.items():
        if place not in opened:
            if like is not None:
                continue
            raise UserError(f"{folder}: has no folder '{place}', where '{full}' is from. Download it too.")
        source = opened[place]
        if lacking := [name for name in names if name not in source.entries]:
            raise UserError(f"{folder / place}: lacks the tensor '{lacking[0]}'. Download it again.")
        used[place].update(names)
        parts.append(_part(full, source, names))
    for place, source in opened.items():
        if unknown := [name for name in source.names() if name not in used[place]]:
            raise UserError(f"{folder / place}: has tensors that have no official name: {names_of(unknown, 3)}. It is of another model.")
    if not parts:
        raise UserError(f"{folder}: holds nothing that {like.path if like else NOTES} knows.")
    return parts, notes.metadata


def _part(full: str, source: Checkpoint, names: Sequence[str]) -> Part:
    entries = [source.entries[name] for name in names]
    if len(entries) == 1:
        return copied(full, entries[0])
    if len({(entry.shape, entry.dtype) for entry in entries}) != 1:
        raise UserError(
            f"{source.path}: {names_of(list(names))} are of different shapes or dtypes, and are one tensor in the official file."
        )

    def together() -> Tensor:
        return torch.cat([source.tensor(name) for name in names])

    return Part(full, entries[0].dtype, (3 * entries[0].shape[0], *entries[0].shape[1:]), together)


def _open(folder: Path) -> Checkpoint:
    for index in sorted(folder.glob(f"*{INDEX_ENDING}")):
        shards_of(index)
    return open_files(folder, sorted(folder.glob("*.safetensors")))


def _of_like(like: Checkpoint, folder: Path) -> _Notes:
    models = models_of(like, {name: entry.shape for name, entry in like.entries.items()}, _encoder_width(folder))
    tensors = {full: (model.folder, names) for model in models for full, names in model.targets.items()}
    return _Notes(whole_metadata(like), {full: tensors[full] for full in like.names() if full in tensors})


def _encoder_width(folder: Path) -> int | None:
    path = folder / "connectors" / "config.json"
    content = read_json(path) if path.is_file() else {}
    width = content.get("caption_channels") if isinstance(content, dict) else None
    return width if type(width) is int and width > 0 else None


def _read_notes(folder: Path) -> _Notes:
    path = folder / SOURCE / NOTES
    if not path.is_file():
        raise UserError(
            f"{folder}: has no {SOURCE}/{NOTES}, as another program has made it. Give --like a release file of the same architecture: "
            "names, config and metadata are taken from its header."
        )
    content: Any = read_json(path)
    try:
        metadata = {str(key): _text(value) for key, value in content["metadata"].items()}
        tensors = {str(full): _place(place) for full, place in content["tensors"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path}: is not as `ltxv2 checkpoint convert` writes it ({type(error).__name__}: {error}). Convert again."
        ) from error
    return _Notes(metadata, tensors)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"metadata are texts, not {value!r}")
    return value


def _place(value: Any) -> tuple[str, tuple[str, ...]]:
    folder, *names = value
    if folder not in (*FOLDERS, SOURCE) or len(names) not in (1, 3) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{value!r} is no folder of the tree and one or three names")
    return folder, tuple(names)
