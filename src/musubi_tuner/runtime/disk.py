"""Files and folders that are written whole or not at all, and that a power cut leaves whole."""

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from musubi_tuner.runtime.errors import TemporaryFailure, UserError

FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)
"""No room, or none left of what this user may have."""
_GOING = ".old.tmp"
"""Ending of a folder that is being removed."""


def write_whole(path: Path, data: bytes, temporary: Path, *, lasting: bool = True) -> None:
    """Replace `path` by `data`, written first to `temporary` in the same folder.

    Args:
        lasting: wait until a power cut would leave it whole; for what can be made again that is not worth the wait.

    Raises:
        OSError: it could not be written; the old file, if any, is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if lasting:
        sync_folder(path.parent)


def write_folder(path: Path, temporary: Path, write: Callable[[Path], None]) -> None:
    """Replace the folder `path` by what `write` puts into `temporary`, a folder beside it that is made for it. What killed runs have left
    of both is removed.

    Raises:
        OSError: it could not be written; the old folder, if any, is untouched. Also what `write` raises.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    for going in path.parent.glob(f".{glob.escape(path.name)}.*{_GOING}"):
        shutil.rmtree(going, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for one in sorted(temporary.rglob("*"), reverse=True):
            if one.is_dir():
                sync_folder(one)
                continue
            with one.open("rb+") as opened:
                os.fsync(opened.fileno())
        sync_folder(temporary)
        remove_folder(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove it under another name, so that a kill in between leaves no half of it under its own.

    Raises:
        OSError: it could not be renamed.
    """
    if path.is_dir():
        going = path.with_name(f".{path.name}.{os.getpid()}{_GOING}")
        shutil.rmtree(going, ignore_errors=True)
        path.replace(going)
        shutil.rmtree(going, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Make names in it last; Windows and some network drives open no folders."""
    with contextlib.suppress(OSError):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def check_folder(folder: Path, named: str) -> None:
    """Whether a folder is there, or can be made.

    Args:
        named: the flag and the path that ask for it.

    Raises:
        UserError: a file stands in its place, or in that of one above it.
    """
    there = next((one for one in (folder, *folder.parents) if os.path.lexists(one)), None)
    if there is not None and not there.is_dir():
        raise UserError(f"{named}: {there} is a file, not a folder. Give another place.")


def check_writable(folder: Path) -> None:
    """Whether files can be made in a folder that is there, before hours of work whose results go into it.

    Raises:
        TemporaryFailure: the disk is full.
        UserError: they cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise not_written(folder, error) from error


def not_written(path: Path, error: OSError) -> UserError:
    """What to raise in place of `error`, which writing `path` has raised: a `TemporaryFailure` where the disk is full."""
    if error.errno in FULL:
        return TemporaryFailure(f"{path}: the disk is full. Make room and run the same command again.")
    if error.errno == errno.EFBIG:
        return UserError(
            f"{path}: cannot be written ({reason(error)}): its file system, or a limit of this shell (`ulimit -f`), takes no file of that "
            "size. Write to another disk, or raise the limit."
        )
    return UserError(f"{path}: cannot be written ({reason(error)}).")


def reason(error: BaseException) -> str:
    """What the system says, without the number and the path."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
