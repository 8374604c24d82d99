"""Whether a cache file is what is wanted: one question, asked by writers before they skip and by training before it reads."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from musubi_tuner.cache.forms import Forms, TensorHeader, header_fault
from musubi_tuner.cache.names import training_key
from musubi_tuner.cache.store import FORMAT_VERSION, read_header
from musubi_tuner.runtime.errors import UserError

NOTE = "note"
"""Metadata entry of files that people should know something of."""
_WORDS = {
    "kind": "it holds something else",
    "source_fingerprint": "the source file has changed",
    "encoder_fingerprint": "it was made with another encoder",
    "projection_fingerprint": "it was made with another model's text projection or connectors",
    "window": "the dataset asks for another window",
    "colors": "the pictures of its source are read by another rule",
    "encoding": "it was encoded with other settings",
    "caption": "the caption has changed",
    "audio": "the source's sound has come or gone",
    "stage": "it was cached at another stage",
    "backend": "it was made with another text encoder backend",
    "model_version": "it was made with another model",
    "widths": "its widths are not those of this model",
    "max_length": "its caption was cut at another --max_length",
}


def reason_to_rebuild(
    path: Path,
    expected: Mapping[str, str],
    required: Sequence[str],
    forms: Forms | None = None,
    *,
    to_read: bool = False,
    unwanted_note: str = "",
) -> str | None:
    """Why the file at `path` cannot be used, in words, as far as its header tells; None where it can.

    Args:
        expected: metadata entries that must be equal.
        required: stripped keys that must be there.
        forms: what its tensors must be; None: anything.
        to_read: what holds more than is wanted, or comes out the same, will do.
        unwanted_note: a file with this `NOTE` will not do, though it is what is expected.
    """
    header = header_of(path)
    if isinstance(header, str):
        return header
    metadata, found = header
    if metadata.get("ltxv2_cache") != FORMAT_VERSION:
        return _not_ours(metadata)
    headers = {training_key(key): header for key, header in found.items()}
    lacking = [key for key in required if key not in headers]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    if len(headers) < len(found):
        return f"two of its tensors ({', '.join(sorted(found))}) are the same to training"
    for key, value in expected.items():
        entry = metadata.get(key)
        if entry == value or key == "model_version" and _same_release(entry or "", value):
            continue
        if not (to_read and _serves(key, metadata, value)):
            return _difference(key, metadata, value)
    if unwanted_note and metadata.get(NOTE) == unwanted_note:
        return f"it was noted as {unwanted_note}"
    return None if forms is None else header_fault(headers, forms(metadata))


def header_of(path: Path) -> tuple[dict[str, str], dict[str, TensorHeader]] | str:
    """Metadata and tensors of a file, or why there are none."""
    if not path.is_file():
        return "missing"
    try:
        path.open("rb").close()
        return read_header(path)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except UserError:
        return "damaged or truncated"


def sound_steps(path: Path) -> int | None:
    """Latent steps of a file of sound, by its header: 0 where its clip has none; None where there is no such file, or none that tells."""
    found = header_of(path)
    if isinstance(found, str):
        return None
    shapes = [header.shape for key, header in found[1].items() if training_key(key) == "audio_latents"]
    return shapes[0][1] if shapes and len(shapes[0]) == 3 else None


def _not_ours(metadata: Mapping[str, str]) -> str:
    if "ltxv2_cache" in metadata:
        return f"it is a cache of another version of the trainer (format {_short(metadata['ltxv2_cache'])}, here {FORMAT_VERSION})"
    return "it says nothing of how it was made (caches of other tools are taken over by tools/adopt_caches.py)"


def _serves(key: str, metadata: Mapping[str, str], wanted: str) -> bool:
    """Whether an entry of another value than the wanted one makes no difference to training."""
    if key == "widths":  # the video's part of a text comes first, and is all that --ltx_mode video reads
        return "+" not in wanted and metadata.get(key, "").startswith(f"{wanted}+")
    return key == "max_length" and cut_alike(metadata, wanted) is not False


def cut_alike(metadata: Mapping[str, str], wanted: str) -> bool | None:
    """Whether a cached text is what a `--max_length` of `wanted` tokens makes of its caption; None where the file does not tell."""
    found, tokens, limit = metadata.get("max_length", ""), metadata.get("tokens", ""), int(wanted)
    if not found.isdecimal() or int(found) == limit:
        return found == wanted or None
    if tokens.isdecimal():
        return int(tokens) <= limit and int(tokens) < int(found)
    # no token is shorter than a byte, and the tokenizers add a beginning or an end
    return True if len(metadata.get("caption", "").encode("utf-8", "replace")) + 2 <= min(limit, int(found)) else None


def _difference(key: str, metadata: Mapping[str, str], wanted: str) -> str:
    found = metadata.get(key)
    if key == "max_length" and "tokens" in metadata:
        return (
            f"its caption, cached with --max_length {found}, has {metadata['tokens']} tokens there; --max_length {wanted} cuts it elsewhere"
        )
    if key == "widths" and found is not None and wanted.startswith(f"{found}+"):
        return "it was cached with --ltx_mode video, and lacks the text of the sound, which --ltx_mode av and audio read"
    return f"{_WORDS.get(key, key + ' differs')} ({key}: {_short(found)}, wanted {_short(wanted)})"


def _same_release(found: str, wanted: str) -> bool:
    """Whether two raw model versions, such as '2.3.0' and '2.3-rc1', agree in their first two numbers; what says none agrees with all."""
    ours, theirs = (re.match(r"(\d+)[.-](\d+)", version) for version in (found, wanted))
    return ours is None or theirs is None or ours.groups() == theirs.groups()


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= 120 else value[:117] + "..."
