"""Identity by content: of files, of texts, and of settings."""

import hashlib
import json
from pathlib import Path
from typing import Any

_WHOLE_UP_TO = 16 * 2**20
_BLOCK = 2**20
_BLOCKS = 16


def file_fingerprint(path: Path) -> str:
    """32 hex digits of a file's size and content.

    Files up to 16 MiB are hashed whole; of larger ones the head, the tail and evenly spaced blocks, 16 MiB in all.
    Renaming or copying a file does not change it.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE_UP_TO:
            digest.update(file.read())
        else:
            for block in range(_BLOCKS):
                file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]


def text_fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
