"""The review file: a line for each caption that was written, beside the media; it tells later runs which captions are theirs.

`caption_review.jsonl` in the folder of the media (of a jsonl dataset: of the jsonl). Lines are appended whole, the last one of a file
counts, and what cannot be read is passed over: a caption that no line tells of counts as a person's.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.runtime.disk import not_written

REVIEW_NAME = "caption_review.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One caption."""

    file: str
    """Its medium, relative to the folder."""
    place: str
    """Name of the caption file, or of the jsonl."""
    caption: str
    sha256: str
    """Of the caption's UTF-8, without blanks around it."""
    model: str
    instruction: str
    """Its fingerprint (`Instruction.fingerprint`)."""
    seconds: float
    """That it took."""
    heard: bool
    """Whether the model was given sound."""
    note: str = ""
    """That it, or the sound, was cut."""
    answer: str = ""
    """What the model said, where the caption is not that."""


def caption_hash(text: str) -> str:
    return hashlib.sha256(text.strip().encode("utf-8")).hexdigest()


class Review:
    """The file of one folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / REVIEW_NAME
        self._entries: dict[tuple[str, str], Mapping[str, Any]] = {}
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            lines = []
        for line in lines:
            try:
                entry: Any = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("file", "place", "sha256")):
                self._entries[entry["file"], entry["place"]] = entry

    def is_ours(self, file: str, place: str, caption: str) -> bool:
        """Whether a caption is still the one that was written last."""
        return self.entry(file, place).get("sha256") == caption_hash(caption)

    def entry(self, file: str, place: str) -> Mapping[str, Any]:
        """What was written of a file last, as `Written` has it; nothing where nothing was."""
        return self._entries.get((file, place), {})

    def add(self, written: Written) -> None:
        """
        Raises:
            TemporaryFailure: the disk is full.
            UserError: it cannot be written.
        """
        entry = {key: value for key, value in asdict(written).items() if value != ""}
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            with self.path.open("a+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                torn = file.read() not in (b"", b"\n")
                file.write(b"\n" * torn + line)
        except OSError as error:
            raise not_written(self.path, error) from error
        self._entries[written.file, written.place] = entry
