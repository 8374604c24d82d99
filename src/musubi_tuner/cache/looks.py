"""What the caching programs leave of clips for people to look at, for the page of a run: a picture, and the outline of the sound.

They lie beside the cache, in `ltxv2_looks/`, and nothing is computed from them.
"""

import json
from pathlib import Path

from musubi_tuner.cache.names import LOOKS_FOLDER

LOOK_ENDINGS = {"latents": ".jpg", "audio": ".json"}
"""By the kind of the cache file that they are made with."""
MOST_PEAKS = 100


def look_path(file: Path, kind: str) -> Path:
    """
    Args:
        file: the cache file, of that kind.
    """
    return file.parent / LOOKS_FOLDER / (file.stem + LOOK_ENDINGS[kind])


def outline_bytes(peaks: list[int]) -> bytes:
    return json.dumps(peaks).encode()


def read_outline(path: Path) -> list[int]:
    """Peaks of equal parts of the sound in percent of full scale; empty where there is no such file, or another thing in its place."""
    try:
        peaks = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    known = isinstance(peaks, list) and len(peaks) <= MOST_PEAKS and all(type(peak) is int and 0 <= peak <= 100 for peak in peaks)
    return peaks if known else []
