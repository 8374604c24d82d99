"""The index of a dataset's planned clips: written after planning and before encoding, read by training.

A clip that failed to encode is therefore a named hole, and training needs no media.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_origin

from musubi_tuner.cache.clip import Clip, Sidecar
from musubi_tuner.cache.names import AUDIO_ENDING, LATENTS_ENDING, index_name
from musubi_tuner.cache.sidecars import AUDIO_PROGRAM, KINDS, LATENT_PROGRAM
from musubi_tuner.cache.store import canonical, text_fingerprint, write_bytes
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json
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


_LATER_FIELDS = ("colors", "source_fps", "from_pictures")
"""Ends of names in the index."""
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


def printable(text: str) -> str:
    """A name of a file in UTF-8, in which bytes that are none are written out (`\\udcff`)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_index(dataset: PlannedDataset, index: DatasetIndex) -> Path:
    """Write the index, the same bytes for the same plan."""
    path, data = index_path(dataset), index_bytes(index)
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)
    return path


def index_bytes(index: DatasetIndex) -> bytes:
    """The file of an index, the same for the same plan."""
    value = {
        "settings": dict(index.settings),
        "clips": [_to_json(clip) for clip in index.clips],
        "dropped": [[printable(text) for text in row] for row in index.dropped],
    }
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True).encode("utf-8")


def read_index(dataset: PlannedDataset, dataset_config: Path, arguments: Mapping[str, str] | None = None) -> DatasetIndex:
    """Read the index that was planned with exactly the dataset's settings.

    Args:
        dataset_config: the TOML, for messages.
        arguments: of each caching program, for the command in messages; None names the dataset alone.

    Raises:
        UserError: there is none; where another one is there, the message says which settings differ.
    """
    program = AUDIO_PROGRAM if dataset.kind == "audio" else LATENT_PROGRAM
    remedy = f"Run: python {program} {(arguments or {}).get(program) or f'--dataset_config {quoted(dataset_config)}'}"
    path = index_path(dataset)
    if not path.is_file():
        others = sorted(dataset.cache_directory.glob(index_name("*")))
        if others:
            hint = _difference(others, dataset.settings())
            remedy = (
                f"Set it as it was cached. Or, where the media are, {remedy[0].lower()}{remedy[1:]} "
                "(caches that came in a pack have no media: cache where it was packed, and pack again)"
            )
        elif any(dataset.cache_directory.glob(f"*{LATENTS_ENDING}")) or any(dataset.cache_directory.glob(f"*{AUDIO_ENDING}")):
            hint = "its files may be of another tool: tools/adopt_caches.py takes them over"
        else:
            hint = "nothing was cached there yet"
        raise UserError(f"{dataset_config}: {dataset.label}: {dataset.cache_directory} holds no index of this dataset ({hint}). {remedy}")
    try:
        return _index_of(read_json(path), str(path))
    except UserError as error:
        raise UserError(f"{error} The index is damaged, or of another version. {remedy} (what is cached and right is kept)") from error


def _index_of(value: Any, where: str) -> DatasetIndex:
    """
    Raises:
        UserError: names the entry, its value and the rule.
    """
    for key, kind, what in (("settings", dict, "keys and values"), ("clips", list, "a list"), ("dropped", list, "a list")):
        if not isinstance(value, dict) or not isinstance(value.get(key), kind):
            raise UserError(f"{where}: '{key}' must hold {what}.")
    for row in value["dropped"]:
        if not isinstance(row, list) or [type(one) for one in row] != [str, str]:
            raise UserError(f"{where}: dropped: {row!r:.100}: must be [source, reason].")
    clips = tuple(_from_json(clip, f"{where}: clips[{place}]") for place, clip in enumerate(value["clips"]))
    return DatasetIndex(settings=value["settings"], clips=clips, dropped=tuple((source, reason) for source, reason in value["dropped"]))


def _to_json(clip: Clip) -> dict[str, Any]:
    """Flat: the kinds that every clip lists have empty values where it has no such sidecar; later kinds are listed where it has them, so
    that indices of before stay as they are. So are fields that came later."""
    value = {field.name: getattr(clip, field.name) for field in dataclasses.fields(clip) if field.name != "sidecars"}
    for kind in KINDS.values():
        if kind.name in clip.sidecars:
            value |= {name: getattr(clip.sidecars[kind.name], field) for field, name in kind.index_fields.items()}
        elif kind.older_index_fields is not None:
            value |= {name: _NO_SIDECAR[field] for field, name in kind.older_index_fields.items()}
    return {name: entry for name, entry in value.items() if entry or not name.endswith(_LATER_FIELDS)}


def _from_json(value: Any, where: str) -> Clip:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must hold keys and values, not {value!r:.100}.")
    rest, sidecars = dict(value), {}
    for kind in KINDS.values():
        found = {field: rest.pop(name) for field, name in kind.index_fields.items() if name in rest}
        if found.get("file") is not None:
            if isinstance(at := found.get("at"), list) and all(type(place) is int and place >= 0 for place in at):
                found["at"] = tuple(at)
            sidecars[kind.name] = Sidecar(**_checked(Sidecar, found, where, kind.index_fields))
    clip = Clip(sidecars=sidecars, **_checked(Clip, rest, where, {}))
    if clip.kind not in ("video", "image", "audio"):
        raise UserError(f"{where}: kind = {clip.kind!r:.100}: must be video, image or audio.")
    if not 1e-3 <= clip.fps <= 1e6:
        raise UserError(f"{where}: fps = {clip.fps:g}: must be a frame rate.")
    if clip.end_seconds <= clip.start_seconds:
        raise UserError(f"{where}: end_seconds = {clip.end_seconds:g}: must be above start_seconds, {clip.start_seconds:g}.")
    return clip


def _checked(cls: type, values: Mapping[str, Any], where: str, names: Mapping[str, str]) -> dict[str, Any]:
    """`values`, where they are the fields of a dataclass, of their types and within their ranges.

    Args:
        names: of the fields in the index, where they have others.

    Raises:
        UserError: an entry that is missing, unknown, of another type, below 0, or a file name that is a path.
    """
    known = {field.name: field for field in dataclasses.fields(cls) if field.name != "sidecars"}
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"{where}: unknown key '{unknown[0]}'.")
    for name, field in known.items():
        key = names.get(name, name)
        if name not in values:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{where}: '{key}' is missing.")
            continue
        value, kinds = values[name], (int, float) if field.type is float else (get_origin(field.type) or field.type,)
        if type(value) not in kinds:
            raise UserError(f"{where}: {key} = {value!r:.100}: must be {_TYPES[field.type]}.")
        if isinstance(value, int | float) and value < 0:
            raise UserError(f"{where}: {key} = {value}: must be at least 0.")
        if name in ("file", "stem") and not _is_name(value):
            raise UserError(f"{where}: {key} = {value!r:.200}: must be the name of a file in the cache directory, and no path.")
    return dict(values)


_TYPES: Mapping[object, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[int, ...]: "a list of frames",
}


def _is_name(value: str) -> bool:
    return value not in ("", "..") and "\0" not in value and Path(value).name == value


def _difference(others: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """How the nearest index that is there differs from the wanted one."""
    best: list[str] | None = None
    for path in others:
        try:
            found = _index_of(read_json(path), str(path)).settings
        except UserError:
            continue
        differing = [key for key in sorted(set(found) | set(settings)) if found.get(key) != settings.get(key)]
        rows = [f"{key} is {settings.get(key)!r}, cached with {found.get(key)!r}" for key in differing]
        if best is None or len(rows) < len(best):
            best = rows
    return "; ".join(best[:4]) if best else "the index there cannot be read"
