"""A program that another one has started (`children.run_command`) ends with it, even where that one is killed and can tell nobody."""

import os
import signal
import sys
import time
from collections.abc import Mapping
from threading import Thread

_STARTED_BY = "LTXV2_STARTED_BY"
_LOOK_SECONDS = 0.5
_SYNCHRONIZE, _FOREVER = 0x00100000, 0xFFFFFFFF
"""Of the Windows API."""


def started_by_this() -> Mapping[str, str]:
    """The environment of a program that is to end with this process."""
    return os.environ | {_STARTED_BY: str(os.getpid())}


def end_with_parent() -> None:
    """From now on the end of what has started this process is a SIGTERM, so that training finishes its step and saves; nothing where it was
    started otherwise."""
    parent = os.environ.pop(_STARTED_BY, "")  # whatever this process starts is none of that one's
    if parent.isdecimal():
        Thread(target=_watch, args=(int(parent),), daemon=True, name="parent").start()


def _watch(parent: int) -> None:
    if sys.platform == "win32":  # a process keeps the number of a parent that has gone
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(_SYNCHRONIZE, False, parent)
        if handle:
            ctypes.windll.kernel32.WaitForSingleObject(handle, _FOREVER)
            signal.raise_signal(signal.SIGTERM)  # os.kill would end it at once
    else:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
