"""Reading a pack: every byte is held against the lock file, and nothing appears at its place before all of it was right.

Files go into a folder `.NAME.unpack` beside the wanted one, each under another name until its checksum was compared; at the end that
folder gets its own name. A run that was killed leaves it there, and the same command goes on with what is whole.
"""

import contextlib
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from musubi_tuner.curation.packing.lock import LARGEST_LOCK, LOCK_NAME, PART_NAME, Lock, PackedFile, read_lock, windows_fault
from musubi_tuner.curation.packing.pack import Checking, check_room, digest_of, write_file
from musubi_tuner.runtime.disk import check_folder, not_written, reason, sync_folder
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.files import real_path
from musubi_tuner.runtime.lock import held

_AGAIN = "Copy or download the pack again."


class Reader(Protocol):
    """An opened pack."""

    lock: Lock

    def files(self) -> Iterator[tuple[PackedFile, Callable[[], IO[bytes]]]]:
        """Each file that the lock lists, once, and how to open it.

        Raises:
            UserError: what is there is not what the lock lists.
        """
        ...


def check(path: Path, advance: Callable[[int], object]) -> Lock:
    """Compare every file with its checksum.

    Raises:
        UserError: names the first that differs.
    """
    with open_pack(path) as pack:
        for packed, opened in pack.files():
            with _named(path, packed.path), opened() as file:
                _compare(path, packed, *digest_of(file, advance))
        return pack.lock


def unpack(path: Path, output: Path, advance: Callable[[int], object]) -> Lock:
    """
    Args:
        advance: called with bytes that were looked at.

    Raises:
        TemporaryFailure: no room; what was unpacked is kept for the same command.
        UserError: the pack is damaged or wants to write elsewhere, or something is at `output`. Nothing is left.
    """
    check_output(output)
    staging = output.with_name(f".{output.name}.unpack")
    remedy = "Wait until it ends, or give another --output."
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(output, error) from error
    with held(staging.with_name(f"{staging.name}.lock"), what=f"unpacking into {output}", remedy=remedy), open_pack(path) as pack:
        if os.name == "nt" and (name := windows_fault(file.path for file in pack.lock.files)):
            raise UserError(f"{path}: '{name}' is no name that Windows takes. Unpack it elsewhere, or rename the media and pack again.")
        _take_up(staging, pack.lock)
        there = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file()) if staging.is_dir() else 0
        check_room(output, max(0, pack.lock.size - there))
        try:
            _fill(staging, path, pack, advance)
            if output.is_dir():  # an empty one, which Windows would not replace
                output.rmdir()
            staging.replace(output)
        except TemporaryFailure:
            raise
        except UserError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        except OSError as error:
            raise not_written(output, error) from error
        sync_folder(output.parent)
        return pack.lock


def check_output(output: Path) -> None:
    """
    Raises:
        UserError: something is there.
    """
    check_folder(output, f"--output {output}")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output}: is there, and nothing is written over. Give a new folder.")


@contextmanager
def open_pack(path: Path) -> Iterator[Reader]:
    """
    Raises:
        UserError: no pack, a damaged one, or one whose paths lead elsewhere.
    """
    if path.is_dir():
        yield _Folder(path)
        return
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise UserError(f"--pack {path}: no such file or folder.") from error
    except OSError as error:
        raise UserError(f"--pack {path}: cannot be read ({reason(error)}).") from error
    with file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UserError(f"{path}: is no archive that pack makes ({reason(error)}). {_AGAIN}") from error
        with archive:
            yield _Tar(path, archive)


class _Tar:
    def __init__(self, path: Path, archive: tarfile.TarFile) -> None:
        self._path, self._archive = path, archive
        first = self._next()
        if first is None or first.name != LOCK_NAME or first.size > LARGEST_LOCK:
            raise UserError(f"{path}: does not begin with {LOCK_NAME}, so it is no pack, or was packed anew by another program. {_AGAIN}")
        with _named(path, LOCK_NAME), self._opened(first) as file:
            data = file.read()
        self.lock = read_lock(data, str(path))

    def files(self) -> Iterator[tuple[PackedFile, Callable[[], IO[bytes]]]]:
        listed = {file.path: file for file in self.lock.files}
        while (member := self._next()) is not None:
            packed = listed.pop(member.name, None)
            if packed is None:
                raise UserError(f"{self._path}: holds '{member.name:.200}', which its lock file does not list, or lists once. {_AGAIN}")
            if member.size != packed.size:
                raise UserError(f"{self._path}: '{packed.path}' has {member.size} bytes, by its lock file {packed.size}. {_AGAIN}")
            yield packed, lambda member=member: self._opened(member)
        if listed:
            raise UserError(f"{self._path}: lacks {len(listed)} of its files, first '{next(iter(listed))}': it is cut off. {_AGAIN}")

    def _next(self) -> tarfile.TarInfo | None:
        try:
            member = self._archive.next()
            self._archive.members = []  # pyrefly: ignore[missing-attribute] - it would keep all of them
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise UserError(f"{self._path}: is damaged or cut off ({reason(error)}). {_AGAIN}") from error
        if member is not None and (not member.isreg() or member.sparse is not None):
            raise UserError(f"{self._path}: '{member.name:.200}' is a link, folder or device, which no pack holds. Nothing was unpacked.")
        return member

    def _opened(self, member: tarfile.TarInfo) -> IO[bytes]:
        file = self._archive.extractfile(member)
        assert file is not None, "it is a regular file"
        return file


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        lock = folder / LOCK_NAME
        if not lock.is_file() or lock.stat().st_size > LARGEST_LOCK:
            raise UserError(f"--pack {folder}: holds no {LOCK_NAME}, so it is no pack. Give the folder or archive that pack has made.")
        try:
            self.lock = read_lock(lock.read_bytes(), str(folder))
        except OSError as error:
            raise UserError(f"{lock}: cannot be read ({reason(error)}).") from error

    def files(self) -> Iterator[tuple[PackedFile, Callable[[], IO[bytes]]]]:
        root = real_path(self._folder)
        for packed in self.lock.files:
            path = self._folder / packed.path
            if real_path(path) != root / packed.path or not path.is_file():
                raise UserError(f"{self._folder}: '{packed.path}' is missing, or a link. {_AGAIN}")
            yield packed, lambda path=path: _opened(path)


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}).") from error


def _take_up(staging: Path, lock: Lock) -> None:
    """Remove what a killed run has left where it is not of this pack: files that are not listed, or not whole."""
    if staging.is_symlink():  # what it leads to is not of a killed run
        staging.unlink()
    if not staging.is_dir():
        return
    listed = {file.path for file in lock.files}
    for path in [*staging.rglob("*")]:
        if path.is_symlink() or path.is_file() and path.relative_to(staging).as_posix() not in listed:
            path.unlink()
    for path in sorted((path for path in staging.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # it holds files
            path.rmdir()


def _fill(staging: Path, source: Path, pack: Reader, advance: Callable[[int], object]) -> None:
    for packed, opened in pack.files():
        target = staging / packed.path
        if _is_there(target, packed, advance):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        part = staging / PART_NAME
        try:
            with _named(source, packed.path), opened() as file:
                checked = Checking(file, advance)
                write_file(part, checked)
            _compare(source, packed, checked.count, checked.sha256)
            part.replace(target)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _is_there(target: Path, packed: PackedFile, advance: Callable[[int], object]) -> bool:
    """Whether a killed run has left the file, whole."""
    if not target.is_file() or target.stat().st_size != packed.size:
        return False
    with target.open("rb") as file:
        return digest_of(file, advance)[1] == packed.sha256


def _compare(source: Path, packed: PackedFile, size: int, sha256: str) -> None:
    if (size, sha256) != (packed.size, packed.sha256):
        what = f"has {size} bytes, by its lock file {packed.size}" if size != packed.size else "differs from its checksum in the lock file"
        raise UserError(f"{source}: '{packed.path}' {what}: the pack is damaged. {_AGAIN}")


@contextmanager
def _named(source: Path, name: str) -> Iterator[None]:
    """Faults of reading become those of the pack; those of writing stay."""
    try:
        yield
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{source}: '{name}' is cut off ({reason(error)}). {_AGAIN}") from error
