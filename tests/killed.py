"""Runs a program, and again and again killed by SIGKILL at moments that are spread over all that it does to files.

    python -m tests.killed FOLDER COUNT WORDS...     of `ltxv2`, such as: checkpoint convert ...

A moment is before a file or folder below FOLDER is opened to be written, made, renamed or removed, or between two pieces of a checkpoint
that is written. Each round begins with the folder as it was; processes are forked from this one, which has imported everything. The
last line is JSON: what the folder holds after an undisturbed run, after each kill, and after the same command was run again behind it.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from musubi_tuner.command import dispatch
from musubi_tuner.conversion.checkpoint import streaming

_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


_LAST = 4
"""So many rounds are killed at the last moments, where what is new takes the place of what is old; the others are spread over all."""


def main() -> None:
    folder, count, words = Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3:]
    before = folder.with_name(f"{folder.name} before")
    shutil.copytree(folder, before, symlinks=True)
    at: list[float] = [float("inf")]
    seen = _moments(folder, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == at[0] else None)

    def run() -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = dispatch(words)
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with contextlib.redirect_stdout(io.StringIO()):
        assert dispatch(words) == 0
    found, moments = {"whole": held(folder), "rounds": []}, seen[0]
    for number in range(count):
        shutil.rmtree(folder)
        shutil.copytree(before, folder, symlinks=True)
        is_spread = number < count - _LAST
        seen[0], at[0] = 0, 1 + number * (moments - _LAST) // (count - _LAST) if is_spread else moments - count + 1 + number
        killed = run()
        left, at[0] = held(folder), float("inf")
        again = run()
        found["rounds"].append({"at": f"{number} of {count}", "killed": killed, "left": left, "again": again, "whole": held(folder)})
    print(f"\n{json.dumps(found)}")


def _moments(folder: Path, reached: Callable[[int], None]) -> list[int]:
    """Call `reached` with the number of each moment; how many there have been, which can be set back."""
    seen, beginning, pieces = [0], str(folder) + os.sep, streaming._pieces

    def next_moment() -> None:
        seen[0] += 1
        reached(seen[0])

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _EVENTS or not str(arguments[0]).startswith(beginning):
            return
        flags = arguments[2] if event == "open" else None
        if event != "open" or isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
            next_moment()

    def told(part: streaming.Part) -> Iterator[bytes | memoryview]:
        for piece in pieces(part):
            next_moment()
            yield piece

    streaming._pieces = told
    sys.addaudithook(hear)
    return seen


def held(folder: Path) -> dict[str, str]:
    """SHA-256 by path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    main()
