"""One reader for text, JSON, JSON lines and TOML: whatever is wrong with a file becomes a `UserError` that names it.

Every reader takes `named`, the flag or key that the path comes from, and `remedy`, what to do where there is no such file.
"""

import json
import math
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from musubi_tuner.runtime.errors import UserError

_LARGEST = 2**64
"""No number of ours needs more bits; tensors and other readers of JSON hold no larger ones."""


def real_path(path: Path) -> Path:
    """Absolute, with links followed as far as they lead; a link to itself stays, and whoever opens it says so."""
    return Path(os.path.realpath(path))


def read_text(path: Path, *, named: str = "", remedy: str = "") -> str:
    """UTF-8 text, with or without a byte order mark.

    Raises:
        UserError: there is no such file, it is a folder, it cannot be read, or it is not UTF-8.
    """
    where = f"{named} {path}".strip()
    after = f" {remedy}" if remedy else ""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Save the file as UTF-8.") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{where}: no such file.{after}") from error
    except (OSError, ValueError) as error:  # ValueError: a path that the system cannot take, such as one with a null character
        if isinstance(error, IsADirectoryError | PermissionError) and path.is_dir():
            raise UserError(f"{where}: is a folder, not a file.{after}") from error
        raise UserError(f"{where}: cannot be read ({error}).{after}") from error


def read_toml(path: Path, *, named: str = "", remedy: str = "") -> dict[str, Any]:
    """
    Raises:
        UserError: what `read_text` raises, and text that is no TOML, with its line.
    """
    text = read_text(path, named=named, remedy=remedy)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        hint = " In Windows paths use / or double the \\ (or single quotes)." if "\\" in text else ""
        raise UserError(f"{path}: not valid TOML: {_reason(error)}.{hint}") from error


def read_json(path: Path, *, named: str = "", remedy: str = "") -> Any:
    """
    Raises:
        UserError: what `read_text` and `parse_json` raise.
    """
    return parse_json(read_text(path, named=named, remedy=remedy), str(path))


def read_json_lines(path: Path, *, named: str = "", remedy: str = "") -> Iterator[tuple[str, Any]]:
    """(file and line number, value) of each line that is not blank.

    Raises:
        UserError: what `read_text` and `parse_json` raise.
    """
    for number, line in enumerate(read_text(path, named=named, remedy=remedy).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where)


def parse_json(text: str, where: str) -> Any:
    """JSON by the letter of its standard: a key twice, NaN, Infinity and numbers beyond 64 bits are refused.

    Raises:
        UserError: begins with `where`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once_each, parse_constant=_finite, parse_int=_whole, parse_float=_finite)
        if "\\ud" in text.lower():  # half of a pair of escapes is a character that no file and no path can hold
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {_reason(error)}.") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' appears twice")
    return values


def _whole(text: str) -> int:
    value = int(text)
    if abs(value) >= _LARGEST:
        raise ValueError(f"{text} needs more than 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).rstrip(".")
