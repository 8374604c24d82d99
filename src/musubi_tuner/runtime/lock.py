"""A file that one process holds: the system frees it when the process ends, however it ends, so no lock outlives its owner."""

import contextlib
import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
_FAR = 2**30
"""Windows forbids others to read what is locked, so a byte is locked where nothing is written."""


@contextmanager
def held(path: Path, *, what: str, remedy: str) -> Iterator[None]:
    """Hold the lock file, which says who does so (pid and host), and remove it at the end.

    Args:
        what: in a message, what is being held.
        remedy: what the second one is told to do.

    Raises:
        UserError: another process holds it, whose pid is named; or it cannot be opened.
    """
    file = _opened(path, what, remedy)
    if (owner := _owner(file)) is not None:
        log.warning("WARNING: %s: %s ended without removing its lock; this run takes it over", path, owner)
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    file.flush()
    try:
        yield
    finally:
        if sys.platform == "win32":  # which removes no open file
            file.close()
        with contextlib.suppress(OSError):  # another program has it open; the next run takes it over
            path.unlink(missing_ok=True)
        file.close()


def _opened(path: Path, what: str, remedy: str) -> IO[str]:
    """The file, locked; of a file that its owner has just removed, a new one."""
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path}: this lock file cannot be opened ({error.strerror}). Remove it if no run has {what}. {remedy}"
            ) from error
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in _TAKEN:  # the file system knows no locks
                log.warning("WARNING: %s: cannot be locked (%s); make sure that no other run has %s", path, error.strerror, what)
                return file
            owner = _owner(file) or "another process"
            file.close()
            raise UserError(f"{path}: {owner} is at work on {what}. {remedy}") from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _lock(file: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _owner(file: IO[str]) -> str | None:
    """Who wrote the file last; None where nobody did."""
    file.seek(0)
    text = file.read()
    try:
        found: dict[str, Any] = json.loads(text)
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process" if text else None
