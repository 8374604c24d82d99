"""The lock file of a pack: what is in it, byte by byte, and which encoders made it.

`ltxv2_pack.json` is the first file of an archive. It lists every other file by its path in the pack, with size and SHA-256; an entry
`digest` is the SHA-256 of all the rest of it. Nothing is read from a pack that it does not list.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from musubi_tuner import __version__
from musubi_tuner.cache.store import FORMAT_VERSION, canonical
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import parse_json

LOCK_NAME = "ltxv2_pack.json"
TOML_NAME = "dataset.toml"
PART_NAME = "ltxv2_unpacking.part"
"""A file that is being unpacked."""
VERSION = 1
LARGEST_LOCK = 2**28
"""Bytes; some 500,000 files."""
_LONGEST_PATH, _LONGEST_NAME = 1000, 255
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WINDOWS_DEVICES = re.compile(r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?:\..*)?", re.IGNORECASE)
_NOT_ON_WINDOWS = re.compile(r'[<>:"|?*]|[. ](?:/|$)')


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One file."""

    path: str
    """In the pack, with forward slashes."""
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lock:
    """What a pack says of itself."""

    mode: str
    """`--ltx_mode` that it was made for."""
    datasets: tuple[Mapping[str, Any], ...]
    """Of each: `label` and `clips`."""
    encoders: tuple[Mapping[str, Any], ...]
    """For each kind of sidecar and each way in which its files were made: `kind`, `files`, and entries of their metadata."""
    files: tuple[PackedFile, ...]
    """In the order of the pack."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def lock_bytes(lock: Lock) -> bytes:
    """The file, the same bytes for the same content."""
    value = {
        "ltxv2_pack": VERSION,
        "made_by": f"musubi-tuner-ltxv2 {__version__}",
        "cache_format": FORMAT_VERSION,
        "ltx_mode": lock.mode,
        "datasets": [dict(one) for one in lock.datasets],
        "encoders": [dict(one) for one in lock.encoders],
        "files": [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in lock.files],
    }
    return json.dumps({**value, "digest": _digest(value)}, indent=1, ensure_ascii=False).encode("utf-8") + b"\n"


def read_lock(data: bytes, where: str) -> Lock:
    """
    Args:
        where: the pack, for messages.

    Raises:
        UserError: damaged, of another version, or a path that leads out of the pack.
    """
    where = f"{where}: {LOCK_NAME}"
    try:
        value = parse_json(data.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text. The pack is damaged; make or copy it again.") from error
    if not isinstance(value, dict) or "ltxv2_pack" not in value:
        raise UserError(f"{where}: is no lock file of a pack.")
    if value["ltxv2_pack"] != VERSION:
        raise UserError(f"{where}: version {value['ltxv2_pack']!r:.50} of packs, here {VERSION}. Unpack it with the version that made it.")
    if value.pop("digest", None) != _digest(value):
        raise UserError(f"{where}: its own checksum (digest) differs: it is damaged or was edited. Make or copy the pack again.")
    if value.get("cache_format") != FORMAT_VERSION:
        raise UserError(f"{where}: caches of format {value.get('cache_format')!r:.50}, here {FORMAT_VERSION}. Cache the dataset again.")
    rows, known = (value.get("files"), value.get("datasets"), value.get("encoders")), ("files", "datasets", "encoders")
    for name, row in zip(known, rows, strict=True):
        if not isinstance(row, list) or not all(isinstance(one, dict) for one in row):
            raise UserError(f"{where}: '{name}' must be a list of tables.")
    files = tuple(_file(row, f"{where}: files[{place}]") for place, row in enumerate(value["files"]))
    if fault := paths_fault([file.path for file in files]):
        raise UserError(f"{where}: {fault}. Nothing was unpacked.")
    if TOML_NAME not in {file.path for file in files}:
        raise UserError(f"{where}: lists no {TOML_NAME}.")
    return Lock(mode=str(value.get("ltx_mode")), datasets=tuple(value["datasets"]), encoders=tuple(value["encoders"]), files=files)


def paths_fault(paths: Sequence[str]) -> str | None:
    """What is wrong with paths of files in a pack, in words: one that leads out of it, or two that are one on some file system."""
    seen: dict[str, str] = {}
    for path in paths:
        if fault := path_fault(path):
            return fault
        key = _folded(path)
        if key in seen:
            return f"'{seen[key]}' and '{path}' are one file where case does not count"
        seen[key] = path
    for path in paths:
        for parent in PurePosixPath(path).parents:
            if _folded(str(parent)) in seen:
                return f"'{path}' lies in '{parent}', which is a file"
    return None


def path_fault(path: str) -> str | None:
    """Why a path may not stand in a pack; None where it may."""
    parts = path.split("/")
    windows = PureWindowsPath(path)
    if not path or any(unicodedata.category(sign) in ("Cc", "Cs") for sign in path):
        return f"the path {path!r:.200} is empty, or holds signs that no file name should hold"
    if windows.drive or windows.root or path.startswith(("/", "~")):
        return f"the path '{path:.200}' is absolute; paths in a pack are relative"
    if "\\" in path or any(part in ("", ".", "..") for part in parts):
        return f"the path '{path:.200}' leads out of the pack, or is written in another way than a/b"
    if len(path.encode()) > _LONGEST_PATH or any(len(part.encode()) > _LONGEST_NAME for part in parts):
        return f"the path '{path:.60}...' is too long"
    if _folded(path) in (LOCK_NAME, PART_NAME):
        return f"the path '{path:.200}' is kept for unpacking"
    return None


def windows_fault(paths: Iterable[str]) -> str | None:
    """The first path that Windows does not take; None where it takes all."""
    return next((path for path in paths if _NOT_ON_WINDOWS.search(path) or any(map(_WINDOWS_DEVICES.fullmatch, path.split("/")))), None)


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _file(row: Mapping[str, Any], where: str) -> PackedFile:
    path, size, sha256 = (row.get(key) for key in ("path", "size", "sha256"))
    if not isinstance(path, str) or type(size) is not int or size < 0 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise UserError(f"{where}: {dict(row)!r:.200}: must hold path, size and sha256.")
    return PackedFile(path, size, sha256)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()
