"""Seconds of a step over the run: says so where they drift, as they do when memory is short or a card gets hot."""

import statistics

_FIRST = 5
"""Steps that are not counted: kernels are chosen and compiled in them."""
_WINDOW = 20
_DRIFT = 1.3


class Pace:
    """Compares the median of the last steps with that of the first ones."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._usual: float | None = None
        self._told = 1.0

    def add(self, seconds: float) -> str | None:
        """Take in one step; returns a warning the first time that steps have become slower by half as much again, and so on.

        Args:
            seconds: from the end of the step before to the end of this one, saving and previews left out.
        """
        self._seconds.append(seconds)
        if len(self._seconds) == _FIRST + _WINDOW and self._usual is None:
            self._usual = statistics.median(self._seconds[_FIRST:])
        if self._usual is None:
            return None
        self._seconds = self._seconds[-_WINDOW:]
        ratio = statistics.median(self._seconds) / self._usual if len(self._seconds) == _WINDOW else 1.0
        if ratio < _DRIFT * self._told:
            return None
        self._told = ratio
        return (
            f"steps have become slower: {self._usual:.3f} s in the beginning, {self._usual * ratio:.3f} s now ({ratio:.1f} times). "
            "Another program on the card or in memory, a hot card, or a full disk under the caches are usual causes."
        )
