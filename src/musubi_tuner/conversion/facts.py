"""What `inspect` found, written as JSON: never over a file unasked, and never over a model."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from musubi_tuner.runtime.disk import check_folder, reason, write_whole
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.headers import SUFFIXES


def check_json(path: Path, *, overwrite: bool) -> None:
    """
    Raises:
        UserError: the name of a model's file, a folder, or a file that is there already.
    """
    if path.suffix.lower() in SUFFIXES:
        raise UserError(f"--json {path}: is the name of a model's file. Give the name of a file for JSON, such as {path.stem}.json.")
    check_folder(path.parent, f"--json {path}")
    if path.is_dir():
        raise UserError(f"--json {path}: is a folder. Give the name of a file.")
    if path.exists() and not overwrite:
        raise UserError(f"--json {path}: is there already. Give another name, or --overwrite.")


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: it cannot be written.
    """
    data = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    try:
        write_whole(path, data.encode("utf-8"), path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp"))
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({reason(error)}).") from error
