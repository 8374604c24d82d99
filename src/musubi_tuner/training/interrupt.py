"""One Ctrl-C finishes the step and saves; the second one ends at once."""

import os
import signal
from types import FrameType

_STDERR = 2
_TOLD = b"\nCtrl-C: this step (or preview) is finished and the run saved; Ctrl-C again ends at once and saves nothing\n"


class Interrupt:
    """While it is entered, `requested` tells whether somebody asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(_STDERR, _TOLD)  # print and logging may be in the middle of a line of their own
