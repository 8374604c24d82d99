"""What became of each source of a dataset, for people: written beside the index by the caching programs, shown on the page of a run.

Nothing depends on it: where it is missing or damaged, the index still tells what was dropped.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from musubi_tuner.cache.index import PlannedDataset, index_path, printable
from musubi_tuner.cache.names import receipts_name
from musubi_tuner.cache.store import write_bytes
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json

_TYPES = {"source": str, "outcome": str, "note": str, "clips": int, "seconds": float}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReceipt:
    """One source."""

    source: str
    outcome: str
    """`kept`, `trimmed`, `dropped` or `failed`."""
    note: str
    """Why; what is likely not meant so."""
    clips: int
    seconds: float
    """Of the source; 0 where it has none."""


def receipts_path(dataset: PlannedDataset) -> Path:
    """Beside the index, and told apart as it is."""
    return dataset.cache_directory / receipts_name(index_path(dataset).name)


def write_receipts(dataset: PlannedDataset, rows: Sequence[SourceReceipt]) -> None:
    """Write them, the same bytes for the same rows.

    Raises:
        UserError, DiskFullError: it cannot be written.
    """
    path = receipts_path(dataset)
    data = receipts_bytes(rows)
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)


def receipts_bytes(rows: Sequence[SourceReceipt]) -> bytes:
    """Their file."""
    told = [{key: printable(value) if isinstance(value, str) else value for key, value in asdict(row).items()} for row in rows]
    return json.dumps(told, indent=1, ensure_ascii=False).encode("utf-8")


def read_receipts(dataset: PlannedDataset) -> list[SourceReceipt] | None:
    """None where there are none that can be read."""
    try:
        rows = read_json(receipts_path(dataset))
    except UserError:
        return None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {key: type(row[key]) for key in row} == _TYPES for row in rows):
        return None
    return [SourceReceipt(**row) for row in rows]
