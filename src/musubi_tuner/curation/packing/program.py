"""`ltxv2 dataset pack` and `unpack`: from their options to files, and what is told at the end."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.packing import PackConfig, UnpackConfig
from musubi_tuner.curation.packing import unpack as unpacking
from musubi_tuner.curation.packing.contents import Contents, gather
from musubi_tuner.curation.packing.lock import TOML_NAME, Lock, windows_fault
from musubi_tuner.curation.packing.pack import pack as write_pack
from musubi_tuner.runtime.disk import check_folder
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import real_path
from musubi_tuner.runtime.program import quoted
from musubi_tuner.runtime.progress import Progress
from musubi_tuner.runtime.tables import format_table

log = logging.getLogger(__name__)

_MB = 10**6


def pack(options: PackConfig) -> int:
    """Pack the caches of a dataset; returns the exit code.

    Raises:
        UserError: caches that training would refuse, or something is at the place of the pack.
    """
    chosen = options.packing
    if os.path.lexists(chosen.output):
        raise UserError(f"--output {chosen.output}: is there, and nothing is written over. Give another name.")
    check_folder(chosen.output.parent, f"--output {chosen.output}")
    contents = gather(load_dataset_config(options.dataset.dataset_config), chosen.ltx_mode)
    with _Bytes("packing", 2 * _size(contents)) as bar:
        lock = write_pack(contents, chosen.output, chosen.ltx_mode, as_archive=chosen.is_archive, advance=bar.advance)
    if name := windows_fault(file.path for file in lock.files):
        log.warning("WARNING: '%s' is no name that Windows takes; this pack cannot be unpacked there", name)
    _tell(lock)
    print(f"packed into {chosen.output}\nThere: ltxv2 dataset unpack {quoted(chosen.output.name)} --output FOLDER")
    return 0


def unpack(options: UnpackConfig) -> int:
    """Unpack or check a pack; returns the exit code.

    Raises:
        UserError: what `unpacking.unpack` raises.
    """
    chosen = options.unpacking
    output = None if chosen.output is None else real_path(chosen.output)
    if output is not None:
        unpacking.check_output(output)
    with unpacking.open_pack(chosen.pack) as opened:
        size = opened.lock.size
    with _Bytes("checking" if output is None else "unpacking", size) as bar:
        if output is None:
            lock = unpacking.check(chosen.pack, bar.advance)
        else:
            lock = unpacking.unpack(chosen.pack, output, bar.advance)
    _tell(lock)
    if chosen.output is None:
        print(f"{chosen.pack}: every file is as it was packed")
    else:
        print(f"Train with --dataset_config {quoted(chosen.output / TOML_NAME)} --ltx_mode {lock.mode}")
    return 0


def _size(contents: Contents) -> int:
    return sum(len(one.source) if isinstance(one.source, bytes) else _size_of(one.source) for one in contents.files)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # told of when it is opened
        return 0


def _tell(lock: Lock) -> None:
    print(format_table([(one.get("label"), one.get("clips")) for one in lock.datasets], ("dataset", "clips")))
    rows = [
        (one.get("kind"), one.get("files"), str(one.get("encoder_fingerprint", "-"))[:16], one.get("model_version", "-"))
        for one in lock.encoders
    ]
    print(f"\n{format_table(rows, ('kind', 'files', 'encoder', 'model'))}\n")
    print(f"{len(lock.files)} files, {lock.size / _MB:,.1f} MB, for --ltx_mode {lock.mode}")


class _Bytes:
    """A bar over bytes, in MB."""

    def __init__(self, title: str, size: int) -> None:
        self._bar = Progress(title, -(-size // _MB), unit="MB")
        self._size, self._bytes = size, 0

    def __enter__(self) -> "_Bytes":
        self._bar.__enter__()
        return self

    def __exit__(self, *given: Any) -> None:
        self._bar.__exit__(*given)

    @property
    def advance(self) -> Callable[[int], None]:
        return self._advance

    def _advance(self, count: int) -> None:
        before = self._megabytes()
        self._bytes += count
        if (more := self._megabytes() - before) > 0:
            self._bar.advance(more)

    def _megabytes(self) -> int:
        """Whole ones, and at the end the one that was begun."""
        return -(-self._bytes // _MB) if self._bytes >= self._size else self._bytes // _MB
