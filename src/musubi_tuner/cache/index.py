"""The index of a dataset's planned clips: written after planning and before encoding, read by training.

A clip that failed to encode is therefore a named hole, and training needs no media.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from musubi_tuner.cache.clip import Clip, Sidecar
from musubi_tuner.cache.names import index_name
from musubi_tuner.cache.sidecars import AUDIO_PROGRAM, KINDS, LATENT_PROGRAM
from musubi_tuner.cache.store import canonical, text_fingerprint, write_bytes
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import quoted


class PlannedDataset(Protocol):
    """What the index needs to know of a dataset: `config.dataset.DatasetSpec` is one."""

    @property
    def label(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def cache_directory(self) -> Path: ...

    def settings(self) -> dict[str, Any]:
        """What shapes planning, as plain JSON values."""
        ...


_NO_SIDECAR = dataclasses.asdict(Sidecar(file="")) | {"file": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetIndex:
    """What was planned for one dataset."""

    settings: Mapping[str, Any]
    clips: tuple[Clip, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    """(source, reason) of sources without any clip."""


def index_path(dataset: PlannedDataset) -> Path:
    """One file for each dataset in the directory, told apart by where its media lie and how it cuts them."""
    digest = text_fingerprint(canonical(dataset.settings()))[:8]
    return dataset.cache_directory / index_name(digest)


def write_index(dataset: PlannedDataset, index: DatasetIndex) -> Path:
    """Write the index, the same bytes for the same plan."""
    value = {
        "settings": dict(index.settings),
        "clips": [_to_json(clip) for clip in index.clips],
        "dropped": [list(row) for row in index.dropped],
    }
    path = index_path(dataset)
    data = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True).encode("utf-8")
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)
    return path


def read_index(dataset: PlannedDataset, dataset_config: Path) -> DatasetIndex:
    """Read the index that was planned with exactly the dataset's settings.

    Args:
        dataset_config: the TOML, for the command in messages.

    Raises:
        UserError: there is none; where another one is there, the message says which settings differ.
    """
    program = AUDIO_PROGRAM if dataset.kind == "audio" else LATENT_PROGRAM
    remedy = f"Run: python {program} --dataset_config {quoted(dataset_config)}"
    path = index_path(dataset)
    if not path.is_file():
        others = sorted(dataset.cache_directory.glob(index_name("*")))
        hint = _difference(others, dataset.settings()) if others else "nothing was cached there yet"
        raise UserError(f"{dataset_config}: {dataset.label}: {dataset.cache_directory} holds no index of this dataset ({hint}). {remedy}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        clips = tuple(_from_json(clip) for clip in value["clips"])
        dropped = tuple((source, reason) for source, reason in value["dropped"])
    except (json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged, or of another version ({error}). {remedy}") from error
    return DatasetIndex(settings=value["settings"], clips=clips, dropped=dropped)


def _to_json(clip: Clip) -> dict[str, Any]:
    """Flat: the kinds that every clip lists have empty values where it has no such sidecar; later kinds are listed where it has them, so
    that indices of before stay as they are. So are rules for colors."""
    value = {field.name: getattr(clip, field.name) for field in dataclasses.fields(clip) if field.name != "sidecars"}
    for kind in KINDS.values():
        if kind.name in clip.sidecars:
            value |= {name: getattr(clip.sidecars[kind.name], field) for field, name in kind.index_fields.items()}
        elif kind.older_index_fields is not None:
            value |= {name: _NO_SIDECAR[field] for field, name in kind.older_index_fields.items()}
    return {name: entry for name, entry in value.items() if entry or not name.endswith("colors")}


def _from_json(value: Mapping[str, Any]) -> Clip:
    rest, sidecars = dict(value), {}
    for kind in KINDS.values():
        found = {field: rest.pop(name) for field, name in kind.index_fields.items() if name in rest}
        if found.get("file") is not None:
            sidecars[kind.name] = Sidecar(**found)
    return Clip(sidecars=sidecars, **rest)


def _difference(others: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """How the nearest index that is there differs from the wanted one."""
    best: list[str] | None = None
    for path in others:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (json.JSONDecodeError, KeyError):
            continue
        differing = [key for key in sorted(set(found) | set(settings)) if found.get(key) != settings.get(key)]
        rows = [f"{key} is {settings.get(key)!r}, cached with {found.get(key)!r}" for key in differing]
        if best is None or len(rows) < len(best):
            best = rows
    return "; ".join(best[:4]) if best else "the index there cannot be read"
