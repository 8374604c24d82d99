"""Signals that ask a program to end: Ctrl-C, SIGTERM, SIGHUP, on Windows Ctrl-Break and the console's close.

A program that can finish what it is at enters `Interrupt`; anywhere else they are all the same as Ctrl-C (`EndAsCtrlC`).
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
ASKING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Those that this system has."""
_AT_ONCE = {getattr(signal, name) for name in ("SIGINT", "SIGBREAK") if hasattr(signal, name)}
"""Typed by a person, who means it when it comes twice. What sends the others sends SIGKILL when it is out of patience."""

_STDOUT, _STDERR = 1, 2
_ECHO_SECONDS = 1.0
"""torchrun sends its processes the Ctrl-C that they have had from the terminal a second time."""


class EndAsCtrlC:
    """From now on each of these signals raises KeyboardInterrupt; one that is ignored (nohup) stays ignored."""

    def __init__(self) -> None:
        self.asked = False
        """Libraries that are imported at that moment turn the KeyboardInterrupt into errors of their own."""
        for number in ASKING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        raise KeyboardInterrupt


def end_at_once(code: int) -> None:
    """From now on each of these signals ends the process with `code`: it is about to end anyway."""
    for number in ASKING:
        signal.signal(number, lambda *_: os._exit(code))


def leave(code: int) -> NoReturn:
    """End the process without waiting for threads of libraries, which the interpreter would do."""
    logging.shutdown()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(code)


class Interrupt:
    """While it is entered, the first signal sets `requested`, so that the step is finished; a second Ctrl-C ends at once.

    A launcher that has gone sets it too: `accelerate launch` hands no signal on, and what it has started would go on unseen.
    """

    def __init__(self) -> None:
        self._asked: float | None = None
        self._parent = launcher_pid()

    @property
    def requested(self) -> bool:
        if self._asked is None and self._parent is not None and os.getppid() != self._parent:
            self._ask("the launcher has gone")
        return self._asked is not None

    def __enter__(self) -> "Interrupt":
        self._terminals = [number for number in (_STDOUT, _STDERR) if os.isatty(number)]
        kept = [number for number in ASKING if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in ASKING if number not in kept}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            if number == getattr(signal, "SIGHUP", None):
                self._leave_terminal()
            self._ask("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        elif number in _AT_ONCE and not ("TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._asked < _ECHO_SECONDS):
            raise KeyboardInterrupt

    def _ask(self, what: str) -> None:
        self._asked = time.monotonic()
        text = f"\n{what}: this step (or preview) is finished and the run saved; Ctrl-C again ends at once and saves nothing\n"
        try:
            os.write(_STDERR, text.encode())  # print and logging may be in the middle of a line of their own
        except OSError:  # nobody is left to read it
            self._leave_terminal()

    def _leave_terminal(self) -> None:
        """Writing to a terminal that has been closed is an error; what would be said goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)


def launcher_pid() -> int | None:
    """The process of `accelerate launch` or torchrun that has started this one; None where there is none, and on Windows, where a parent
    that has gone cannot be told."""
    started = "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform == "win32" or not started or (parent := os.getppid()) == 1:
        return None
    command = Path(f"/proc/{parent}/cmdline")
    if command.is_file():  # the variables may have been set by hand, or have come from a launcher further up
        words = command.read_bytes()
        return parent if b"accelerate" in words or b"torch" in words else None
    return parent
