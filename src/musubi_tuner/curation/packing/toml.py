"""A dataset TOML of datasets that were read: every value that is no default, paths relative to its own folder."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.runtime.errors import UserError

_NOT_WRITTEN = ("label", "kind", "directory", "jsonl_file", "cache_directory")


def dataset_toml(root: Path, datasets: Sequence[DatasetSpec], validation_datasets: Sequence[DatasetSpec]) -> str:
    """
    Args:
        root: folder of the TOML; every path of the datasets lies in it.
    """
    lines = ["# written by: ltxv2 dataset pack; caches only, the media stayed behind"]
    for name, specs in (("datasets", datasets), ("validation_datasets", validation_datasets)):
        for spec in specs:
            lines += ["", f"[[{name}]]", *(f"{key} = {_value(value, root)}" for key, value in _entries(spec).items())]
    return "\n".join(lines) + "\n"


def _entries(spec: DatasetSpec) -> dict[str, Any]:
    source = f"{spec.kind}_directory" if spec.directory is not None else f"{spec.kind}_jsonl_file"
    entries: dict[str, Any] = {source: spec.directory or spec.jsonl_file, "cache_directory": spec.cache_directory}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name not in _NOT_WRITTEN and value != field.default:
            entries[field.name] = value
    return entries


def _value(value: Any, root: Path) -> str:
    if isinstance(value, Path):
        return _text(value.relative_to(root).as_posix())
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_value(one, root) for one in value)}]"
    if isinstance(value, int | float):
        return repr(value)
    raise UserError(f"{value!r}: cannot be written into a TOML.")


def _text(value: str) -> str:
    """In quotes, as JSON has it, which is TOML too but for one sign."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
