"""Opening media files with PyAV: what it raises for a bad file becomes a `UserError` in plain words that names the file."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from musubi_tuner.runtime.errors import UserError

_OF_THE_FILE_SYSTEM = (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ESTALE)


@contextmanager
def open_media(path: Path) -> Iterator[Any]:
    """The opened container of a media file. Tags of any encoding are taken: nothing of ours depends on them.

    Raises:
        UserError: no such file, or whatever PyAV raises while it is open.
    """
    import av

    check_is_file(path)
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        if error.errno in _OF_THE_FILE_SYSTEM:
            raise UserError(f"{path}: cannot be read: {os.strerror(error.errno)}.") from error
        raise UserError(
            f"{path}: cannot be read ({reason_of(error)}). The file is damaged, cut off or of an unknown kind; replace or remove it."
        ) from error


def check_is_file(path: Path) -> None:
    """
    Raises:
        UserError: there is no such file, a link that leads nowhere, or something other than a file.
    """
    try:
        if path.is_file():
            return
        problem = "a link that leads nowhere" if path.is_symlink() else "not a file" if path.exists() else "no such file"
    except OSError as error:  # such as a name that is too long
        problem = f"cannot be read: {error.strerror}"
    raise UserError(f"{path}: {problem}.")


def reason_of(error: Exception) -> str:
    """What libav says of a file, in a few words without its error numbers."""
    import av

    if isinstance(error, av.error.EOFError):
        return "it ends too early"
    if isinstance(error, av.error.InvalidDataError):
        return "invalid data"
    known = getattr(error, "strerror", None) or str(error)
    return known[:1].lower() + known[1:]
