"""Whether the tensors in cache files are those that were written, and numbers that can be trained on.

Each file is read once, and again only when its size or time of change is not that of the record (`cache.record`); its tensors must then
be those of the record. The checksum is no metadata of the file, as these are the same for tensors that differ by rounding alone.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load

from musubi_tuner.cache.forms import Forms, value_fault
from musubi_tuner.cache.names import training_key
from musubi_tuner.cache.record import RECORD_NAME, Checked, line_of, note_checked, read_record, record_of, state_of
from musubi_tuner.cache.store import joined, read_parts, tensors_fingerprint, write_bytes
from musubi_tuner.runtime.progress import Progress

log = logging.getLogger(__name__)

_THREADS = 4
_SHOWN_FROM = 2**28
"""Bytes to be read, from which on a bar is shown."""
_NOTED_TOGETHER = 256
"""Files after which the record is written, so that an interrupt loses little."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """What became of one file."""

    fault: str | None
    fingerprint: str
    is_new: bool = False
    """The record had nothing of it."""


def content_faults(files: Mapping[Path, Forms]) -> dict[Path, str]:
    """What is wrong with the tensors of files whose headers are right, in words; files that are right are not in it.

    A line says of how many files a checksum is kept for the first time.
    """
    records: dict[Path, dict[str, Checked]] = {}
    pending: list[tuple[Path, Forms, Checked | None]] = []
    for path, forms in files.items():
        record, name = record_of(path)
        if record not in records:
            records[record] = _record(record)
        last = records[record].get(name)
        if last is None or last != state_of(path, last.fingerprint):
            pending.append((path, forms, last))
    faults: dict[Path, str] = {}
    first: list[Path] = []
    noted = True
    size = sum(path.stat().st_size for path, _, _ in pending)
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        Progress("Checking caches", len(pending), unit="file", shown=size >= _SHOWN_FROM) as bar,
    ):
        for start in range(0, len(pending), _NOTED_TOGETHER):
            part = pending[start : start + _NOTED_TOGETHER]
            good: dict[Path, str] = {}
            for (path, _, _), reading in zip(part, pool.map(_read, part), strict=True):
                bar.advance()
                if reading.fault is not None:
                    faults[path] = reading.fault
                    continue
                good[path] = reading.fingerprint
                if reading.is_new:
                    first.append(path)
            noted = note_checked(good) and noted
    _tell(first, [path for path, _, _ in pending], noted)
    return faults


def _read(pending: tuple[Path, Forms, Checked | None]) -> _Reading:
    path, forms, last = pending
    metadata, header, body = read_parts(path)
    fingerprint = tensors_fingerprint(header, body)
    if last is not None and fingerprint != last.fingerprint:
        reason = "its tensors are not those that were written or first checked (their checksum differs; if you have replaced the file"
        return _Reading(f"{reason} yourself, delete {RECORD_NAME})", fingerprint)
    tensors = {training_key(key): tensor for key, tensor in load(joined(header, body, {})).items()}
    return _Reading(value_fault(tensors, forms(metadata)), fingerprint, last is None)


def _record(record: Path) -> dict[str, Checked]:
    """The entries of a record, which is written anew where most of its lines are of the past."""
    entries, lines = read_record(record)
    if lines > 2 * len(entries) + 1000:
        write_bytes(record, "".join(line_of(name, entry) for name, entry in entries.items()).encode("utf-8", "backslashreplace"))
    return entries


def _tell(first: Sequence[Path], read: Sequence[Path], noted: bool) -> None:
    if not noted:
        log.warning(
            "WARNING: %s: cannot be written into, so its files will be read and checked again at every start.", record_of(read[0])[0].parent
        )
    elif first:
        shown = (len(first), first[0], RECORD_NAME)
        log.info("%d cache file(s) were checked for the first time, first %s: their checksums are kept in %s", *shown)
