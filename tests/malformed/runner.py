"""Runs one malformed input through a program's `main`, in this process, and says what came of it.

An outcome is `refused` (a `UserError`), `code N`, `exit`, `TRACEBACK Type at file:line` or `HANG at file:line`. A hang is ended after
`SECONDS` of work; memory is bounded, so that an absurd allocation is a traceback and not a dead machine.
"""

import contextlib
import io
import logging
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from musubi_tuner.runtime.errors import UserError
from tests.malformed.base import MAINS, Malformed, furnish

SECONDS, WAITING_SECONDS = 10, 60
"""Of the processor's time, and on the clock: more than any accepted input takes by far, on a busy machine too."""
_MEMORY = 6 * 2**30
"""Bytes of address space beside those of the libraries."""
_KEPT = 4000
_LONGEST_MESSAGE = 20_000
_OURS = re.compile(r"musubi_tuner/(.*)")


class _TooLong(BaseException):
    """Not an `Exception`, so that no handler of the programs takes it."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one input."""

    id: str
    outcome: str
    text: str
    """The message, or the end of the output or of the traceback."""
    wrong: str
    """What is wrong about it; empty: nothing."""
    seconds: float

    @property
    def family(self) -> str:
        return self.id.partition("/")[0]


def bound_memory() -> None:
    """No allocation beyond what the tiny models can need: it raises instead."""
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def run_one(malformed: Malformed, world: Path, *, keep: Path | None = None) -> Result:
    """Run an input in a folder of its own.

    Args:
        keep: where the folder goes, to be run again by hand; None: it is removed.
    """
    above = Path(tempfile.mkdtemp(prefix="malformed ")) if keep is None else keep
    scratch, before = above / "scratch", Path.cwd()
    try:
        furnish(scratch, world, for_tools=malformed.family.endswith("_tools") or malformed.family == "scores")
        malformed.prepare(scratch)
        os.chdir(scratch)
        started = time.monotonic()
        outcome, text = _outcome(malformed)
        seconds = time.monotonic() - started
    finally:
        os.chdir(before)
        if keep is None:
            shutil.rmtree(above, ignore_errors=True)
    return Result(malformed.id, outcome, text[-_KEPT:], judge(malformed, outcome, text), round(seconds, 2))


def _outcome(malformed: Malformed) -> tuple[str, str]:
    with _quiet() as output:
        try:
            with _alarm():
                code = MAINS[malformed.program](malformed.argv)
            return f"code {code}", output.getvalue()
        except UserError as error:
            return "refused", str(error)
        except SystemExit:
            return "exit", output.getvalue()
        except _TooLong as error:
            return f"HANG at {_place(error)}", traceback.format_exc()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"TRACEBACK {type(error).__name__} at {_place(error)}", traceback.format_exc()


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Everything that is written goes into the text; loggers and torch are as they were in the end."""
    output = io.StringIO()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=output, force=True)
    ours = logging.getLogger("musubi_tuner")
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        try:
            yield output
        finally:
            ours.setLevel(logging.NOTSET)
            torch.set_grad_enabled(True)
            logging.basicConfig(level=logging.WARNING, force=True)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """`_TooLong` where the block takes too long, again and again, in case something takes it."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, WAITING_SECONDS))
    before = [signal.signal(number, ring) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds, 1)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def _place(error: BaseException) -> str:
    """The innermost line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if found := _OURS.search(Path(frame.filename).as_posix()):
            return f"{found[1]}:{frame.lineno}"
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"


def judge(malformed: Malformed, outcome: str, text: str) -> str:
    """What is wrong about an outcome, in words; empty where nothing is."""
    is_refused = outcome == "refused" or outcome.startswith("code ") and outcome != "code 0"
    if outcome.startswith(("TRACEBACK", "HANG")):
        return outcome
    if outcome == "exit":
        return "exits without a word of what is wrong"
    if "Traceback (most recent call last)" in text:
        return "a traceback in its output"
    is_named = not malformed.names or any(name in text for name in malformed.names)
    if malformed.expect == "told" and not is_refused and not is_named:
        return f"taken without a word of {' or '.join(malformed.names)}"
    if malformed.expect == "refused" and not is_refused:
        return "wrongly accepted"
    if malformed.expect == "accepted" and is_refused:
        return "wrongly refused"
    if outcome == "refused" and not text.strip():
        return "an empty message"
    if outcome == "refused" and len(text) > _LONGEST_MESSAGE:
        return f"a message of {len(text)} characters"
    if is_refused and not is_named:
        return f"the message does not name {' or '.join(malformed.names)}"
    return ""
