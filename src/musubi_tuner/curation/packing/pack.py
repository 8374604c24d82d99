"""Writing a pack: an uncompressed tar, or a folder. Whole or not at all, a block at a time, the same bytes for the same caches."""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

from musubi_tuner.curation.packing.contents import Content, Contents
from musubi_tuner.curation.packing.lock import LOCK_NAME, Lock, PackedFile, lock_bytes
from musubi_tuner.runtime.disk import not_written, reason, sync_folder
from musubi_tuner.runtime.errors import TemporaryFailure, UserError

BLOCK = 2**20


class Readable(Protocol):
    """Bytes in order."""

    def read(self, size: int = -1, /) -> bytes: ...


class Container(Protocol):
    """What files are added to."""

    def add(self, path: str, size: int, content: Readable) -> None: ...


def pack(contents: Contents, output: Path, mode: str, *, as_archive: bool, advance: Callable[[int], object]) -> Lock:
    """
    Args:
        output: of which nothing is there.
        advance: called with bytes; each byte is read twice, once for its checksum.

    Raises:
        TemporaryFailure: no room.
        UserError: something is there, it cannot be written, or a cache file changes meanwhile. Nothing is left.
    """
    files = []
    for content in contents.files:
        with _opened(content) as file:
            size, sha256 = digest_of(file, advance)
        files.append(PackedFile(content.path, size, sha256))
    lock = Lock(mode=mode, datasets=contents.datasets, encoders=contents.encoders, files=tuple(files))
    data = lock_bytes(lock)
    check_room(output, lock.size + len(data))
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _archive(temporary) if as_archive else _folder(temporary) as container:
            container.add(LOCK_NAME, len(data), io.BytesIO(data))
            for content, packed in zip(contents.files, files, strict=True):
                with _opened(content) as file:
                    checked = Checking(file, advance)
                    container.add(packed.path, packed.size, checked)
                    if checked.read(1) or checked.sha256 != packed.sha256:
                        raise UserError(f"{content.source}: has changed while it was packed. Let caching end, then pack again.")
        if os.path.lexists(output):
            raise UserError(f"--output {output}: is there by now. Nothing was replaced; give another name.")
        temporary.replace(output)
    except OSError as error:
        raise not_written(output, error) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
    sync_folder(output.parent)
    return lock


class Checking:
    """A file whose bytes are counted and hashed as they are read."""

    def __init__(self, file: Readable, advance: Callable[[int], object]) -> None:
        self._file, self._advance, self._digest = file, advance, hashlib.sha256()
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self.count += len(data)
        self._advance(len(data))
        return data

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def digest_of(file: Readable, advance: Callable[[int], object]) -> tuple[int, str]:
    """Size and SHA-256 of what is left of a file."""
    checked = Checking(file, advance)
    while checked.read(BLOCK):
        pass
    return checked.count, checked.sha256


def check_room(output: Path, size: int) -> None:
    """
    Raises:
        TemporaryFailure: the disk has less room.
    """
    there = next((one for one in output.absolute().parents if one.is_dir()), None)
    if there is not None and (free := shutil.disk_usage(there).free) < size:
        raise TemporaryFailure(
            f"{output}: needs {size / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB left. Make room, or write to another disk."
        )


@contextlib.contextmanager
def _opened(content: Content) -> Iterator[IO[bytes]]:
    if isinstance(content.source, bytes):
        yield io.BytesIO(content.source)
        return
    try:
        file = content.source.open("rb")
    except OSError as error:
        raise UserError(f"{content.source}: cannot be read ({reason(error)}).") from error
    with file:
        yield file


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[Container]:
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive:
            yield _Tar(archive)
        file.flush()
        os.fsync(file.fileno())


class _Tar:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive

    def add(self, path: str, size: int, content: Readable) -> None:
        """Without dates, owners and rights of this machine."""
        member = tarfile.TarInfo(path)
        member.size, member.mode = size, 0o644
        try:
            self._archive.addfile(member, content)  # pyrefly: ignore[bad-argument-type] - it only reads
        except OSError as error:
            if error.errno is None:  # tarfile: the file has become shorter
                raise UserError(f"{path}: has changed while it was packed. Let caching end, then pack again.") from error
            raise


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[Container]:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    yield _Folder(path)


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, path: str, size: int, content: Readable) -> None:
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, content)


def write_file(path: Path, content: Readable) -> None:
    """All that is left of `content`, a block at a time, lasting."""
    with path.open("wb") as file:
        while data := content.read(BLOCK):
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.flush()
        os.fsync(file.fileno())
