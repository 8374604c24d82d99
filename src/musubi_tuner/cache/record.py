"""What was checked of the files of a cache directory: their tensors' fingerprints, and size and time of change when they were looked at.

`ltxv2_checked.jsonl` gets a line `[name, size, time of change in ns, fingerprint]` for each file that is written or checked; the last
line of a file counts. Lines are appended whole, so that several programs may write at once and a killed one loses no more than its last.
Nothing depends on it: without it the files are read once more.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.names import PROMPT_FOLDER

RECORD_NAME = "ltxv2_checked.jsonl"


@dataclass(frozen=True, slots=True)
class Checked:
    """Of one file, when it was looked at."""

    size: int
    changed: int
    """Time of its last change, in nanoseconds."""
    fingerprint: str
    """`cache.store.tensors_fingerprint`"""


def record_of(path: Path) -> tuple[Path, str]:
    """The record that a cache file is in, and its name there: sample prompts are in that of the directory above."""
    folder = path.parent
    return (
        (folder.parent / RECORD_NAME, f"{folder.name}/{path.name}") if folder.name == PROMPT_FOLDER else (folder / RECORD_NAME, path.name)
    )


def read_record(record: Path) -> tuple[dict[str, Checked], int]:
    """Entries by name, and how many lines there are; lines that are torn or of another form are passed over."""
    found: dict[str, Checked] = {}
    try:
        lines = record.read_bytes().splitlines()
    except OSError:
        return {}, 0
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, list) and [type(value) for value in entry] == [str, int, int, str]:
            found[entry[0]] = Checked(*entry[1:])
    return found, len(lines)


def note_checked(fingerprints: Mapping[Path, str]) -> bool:
    """Add what was found of files that are right; returns whether it could be written down."""
    lines: dict[Path, list[str]] = {}
    for path, fingerprint in fingerprints.items():
        record, name = record_of(path)
        try:
            line = line_of(name, state_of(path, fingerprint))
        except OSError:  # gone again: there is nothing to remember
            continue
        lines.setdefault(record, []).append(line)
    try:
        for record, added in lines.items():
            with record.open("a+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                torn = file.read() not in (b"", b"\n")
                file.write(("\n" * torn + "".join(added)).encode("utf-8", "backslashreplace"))
    except OSError:
        return False
    return True


def state_of(path: Path, fingerprint: str) -> Checked:
    found = path.stat()
    return Checked(found.st_size, found.st_mtime_ns, fingerprint)


def line_of(name: str, checked: Checked) -> str:
    return json.dumps([name, checked.size, checked.changed, checked.fingerprint], ensure_ascii=False) + "\n"
