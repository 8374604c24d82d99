"""The files of an audit: a page and JSON. Files of an earlier audit are written over, others are not."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from musubi_tuner.curation.auditing.findings import Audit
from musubi_tuner.curation.auditing.page import is_page, render
from musubi_tuner.runtime.disk import check_folder, not_written, write_whole
from musubi_tuner.runtime.errors import UserError


def check_outputs(page: Path | None, json_file: Path | None) -> None:
    """
    Raises:
        UserError: a file is there that is of no audit, or a folder.
    """
    for named, path in (("--page", page), ("--json", json_file)):
        if path is None:
            continue
        check_folder(path.parent, f"{named} {path}")
        if not os.path.lexists(path):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            text = ""
        if not (is_page(text) if named == "--page" else text.startswith('{\n "ltxv2_audit"')):
            raise UserError(f"{named} {path}: is there already, and is of no audit. Give another name, or remove it.")


def write_outputs(audit: Audit, page: Path | None, json_file: Path | None) -> Iterator[Path]:
    """Write those that are wanted; their paths.

    Raises:
        TemporaryFailure: a full disk.
        UserError: they cannot be written.
    """
    texts = [(page, lambda: render(audit)), (json_file, lambda: json.dumps(audit.as_json(), ensure_ascii=False, indent=1) + "\n")]
    for path, text in texts:
        if path is not None:
            data = text().encode("utf-8", "backslashreplace")
            try:
                write_whole(path, data, path.with_name(f".{path.name}.{os.getpid()}.tmp"), lasting=False)
            except OSError as error:
                raise not_written(path, error) from error
            yield path
