"""The one place that owns the progress bar, and the lines that are printed while one is shown.

On a terminal a bar is redrawn in place, and lines of the log appear above it (`LogHandler`). Anywhere else, in a log file or a pipe, a bar
is a plain line now and then, without control characters.
"""

import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_FORMAT = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}"
_FIXED_WIDTH = 22
"""Columns of that format beside title, counts and postfix."""
_PLAIN_SECONDS = 60.0
"""Between two plain lines; a tenth of the work may come sooner, but not within a sixth of this."""


class LogHandler(logging.StreamHandler):
    """Writes each record on lines of its own above the bars of the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)


class Progress:
    """A bar over `total` units; used as a context."""

    def __init__(self, title: str, total: int, *, unit: str, done: int = 0, shown: bool = True, leave: bool = True) -> None:
        """
        Args:
            unit: what is counted, in the singular; symbols in capitals, such as MB, have no plural.
            done: of them before this run.
            shown: False in processes other than the main one.
            leave: the finished bar stays on the screen.
        """
        self._title, self._total, self._unit, self._start = title, total, unit, done
        self._units = unit if unit.isupper() else f"{unit}s"
        self._count, self._seconds, self._begun = done, 0.0, time.monotonic()
        self._figures: dict[str, str] = {}
        self._said, self._said_count = self._begun, done
        self._plain = shown and not sys.stderr.isatty()
        self._bar: Any = None
        if shown and not self._plain:
            self._bar = tqdm(
                total=total, initial=done, desc=title, unit=unit, file=sys.stderr, leave=leave, bar_format=_FORMAT, dynamic_ncols=True
            )

    def advance(self, count: int = 1, *, seconds: float | None = None) -> None:
        """
        Args:
            seconds: that the work itself took, where other work lay between; the time that is left is reckoned by it.
        """
        self._count += count
        self._seconds = self._seconds + seconds if seconds is not None else time.monotonic() - self._begun
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(), refresh=False)
            self._bar.update(count)
        elif self._plain:
            self._say_now_and_then()

    def show(self, **figures: str) -> None:
        """Figures beside the bar, from the next step on; those that the terminal has no room for are left out from the end."""
        self._figures = figures

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._plain and self._count > self._said_count:
            self._say()

    def _text(self) -> str:
        """Rate, time left, figures; as many as fit."""
        parts = [self._rate(), f"{_clock(self._left())} left" if self._count < self._total else f"{_clock(self._seconds)} in all"]
        room = shutil.get_terminal_size((100, 24)).columns - _FIXED_WIDTH - len(self._title) - 2 * len(str(self._total))
        text = ", ".join(parts)
        for name, value in self._figures.items():
            if self._bar is not None and len(f"{text}, {name} {value}") > room:
                break
            text += f", {name} {value}"
        return text

    def _rate(self) -> str:
        done = self._count - self._start
        if not done or not self._seconds:
            return f"- s/{self._unit}"
        each = self._seconds / done
        if each >= 0.1:
            return f"{each:.3g} s/{self._unit}"
        return f"{1 / each:.3g} {self._units}/s" if each > 1e-3 else f"{1 / each:,.0f} {self._units}/s"

    def _left(self) -> float:
        done = self._count - self._start
        return self._seconds / done * (self._total - self._count) if done else 0.0

    def _say_now_and_then(self) -> None:
        waited = time.monotonic() - self._said
        by_share = self._total and self._count * 10 // self._total > self._said_count * 10 // self._total
        if waited >= _PLAIN_SECONDS or (by_share and waited >= _PLAIN_SECONDS / 6):
            self._say()

    def _say(self) -> None:
        self._said, self._said_count = time.monotonic(), self._count
        share = 100 * self._count // self._total if self._total else 100
        print(f"{self._title}: {self._count} of {self._total} {self._units} ({share} %), {self._text()}", file=sys.stderr, flush=True)


def counted(items: Sequence[Item], title: str, *, unit: str) -> Iterator[Item]:
    """The items, with a bar over them."""
    with Progress(title, len(items), unit=unit) as bar:
        for item in items:
            yield item
            bar.advance()


def _clock(seconds: float) -> str:
    """12:34, or 1:23:45 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes:02d}:{rest:02d}"
