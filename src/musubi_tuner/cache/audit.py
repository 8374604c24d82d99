"""Whether a cache file is what is wanted: one question, asked by writers before they skip and by training before it reads."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from musubi_tuner.cache.names import strip_key
from musubi_tuner.cache.store import FORMAT_VERSION, read_header
from musubi_tuner.runtime.errors import UserError

_WORDS = {
    "kind": "it holds something else",
    "source_fingerprint": "the source file has changed",
    "encoder_fingerprint": "it was made with another encoder",
    "projection_fingerprint": "it was made with another model's text projection or connectors",
    "window": "the dataset asks for another window",
    "colors": "the colors of its source are read by another rule",
    "encoding": "it was encoded with other settings",
    "caption": "the caption has changed",
    "audio": "the source's sound has come or gone",
    "stage": "it was cached at another stage",
    "backend": "it was made with another text encoder backend",
    "model_version": "it was made with another model",
    "widths": "its widths are not those of this model and mode",
}


def reason_to_rebuild(path: Path, expected: Mapping[str, str], required: Sequence[str]) -> str | None:
    """Why the file at `path` cannot be used, in words; None where it can.

    Args:
        expected: metadata entries that must be equal.
        required: stripped keys that must be there.
    """
    if not path.is_file():
        return "missing"
    try:
        metadata, shapes = read_header(path)
    except UserError:
        return "damaged or truncated"
    if metadata.get("ltxv2_cache") != FORMAT_VERSION:
        return "it is not a cache of this version of the trainer"
    present = {strip_key(key) for key in shapes}
    lacking = [key for key in required if key not in present]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    for key, value in expected.items():
        found = metadata.get(key)
        if key == "model_version" and _same_release(found or "", value):
            continue
        if found != value:
            return f"{_WORDS.get(key, key + ' differs')} ({key}: {_short(found)}, wanted {_short(value)})"
    return None


def _same_release(found: str, wanted: str) -> bool:
    """Whether two raw model versions, such as '2.3.0' and '2.3-rc1', agree in their first two numbers; what says none agrees with all."""
    ours, theirs = (re.match(r"(\d+)[.-](\d+)", version) for version in (found, wanted))
    return ours is None or theirs is None or ours.groups() == theirs.groups()


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= 120 else value[:117] + "..."
