"""The review file: a line for each caption that was written, beside the media; it tells later runs which captions are theirs.

`caption_review.jsonl` in the folder of the media (of a jsonl dataset: of the jsonl). Lines are appended whole, the last one of a file
counts, and what cannot be read is passed over: a caption that no line tells of counts as a person's.
"""

import hashlib
import json
import os
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
        self._hashes: dict[tuple[str, str], str] = {}
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
                self._hashes[entry["file"], entry["place"]] = entry["sha256"]

    def is_ours(self, file: str, place: str, caption: str) -> bool:
        """Whether a caption is still the one that was written last."""
        return self._hashes.get((file, place)) == caption_hash(caption)

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
        self._hashes[written.file, written.place] = written.sha256
