"""One Ctrl-C finishes the step and saves; the second one ends at once."""

import signal
from types import FrameType


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
