"""Progress on a terminal and in a log file, and log lines beside it."""

import io
import logging
import os
import re
import sys
import time

import pytest

from musubi_tuner.runtime import progress
from musubi_tuner.runtime.progress import LogHandler, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Terminal:
    """Takes the place of stderr."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda fallback: os.terminal_size((columns, 24)))
    monkeypatch.setenv("COLUMNS", str(columns))
    return screen


def lines_of(screen: io.StringIO) -> list[str]:
    return [line.strip() for line in re.split(r"[\r\n]", screen.getvalue()) if line.strip()]


def test_a_log_file_gets_plain_lines(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with Progress("training", 400, unit="step") as bar:
        for _ in range(400):
            bar.advance(seconds=2.0)
    assert file.getvalue() == "training: 400 of 400 steps (100 %), 2 s/step, 13:20 in all\n"


def test_plain_lines_come_by_time_and_share(monkeypatch):
    file, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("Latents", 100, unit="clip") as bar:
        for _ in range(100):
            now[0] += 3
            bar.advance()
    shown = [int(re.search(r": (\d+) of", line)[1]) for line in file.getvalue().splitlines()]
    assert shown == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100], "every tenth, as thirty seconds lie between"


def test_time_left_is_of_the_steps_alone(monkeypatch):
    screen = terminal(monkeypatch, 200)
    with Progress("training", 10, unit="step", done=4) as bar:
        bar.show(loss="0.5")
        bar.advance(seconds=30.0)
        bar.advance(seconds=30.0)
    assert "6/10, 30 s/step, 02:00 left, loss 0.5" in lines_of(screen)[-1]


def test_figures_that_do_not_fit_are_left_out_whole(monkeypatch):
    screen = terminal(monkeypatch, 80)
    with Progress("training", 1000, unit="step") as bar:
        bar.show(loss_video="0.3121", loss_audio="0.2212", lr="0.0001", grad_norm="0.3333")
        for _ in range(3):
            bar.advance(seconds=1.0)
    last = lines_of(screen)[-1]
    assert len(last) <= 80 and "loss_video 0.3121" in last and "grad_norm" not in last
    assert re.search(r"(loss_video 0\.3121|loss_audio 0\.2212|lr 0\.0001)$", last)


def test_a_line_of_the_log_is_never_glued_to_the_bar(monkeypatch):
    screen = terminal(monkeypatch, 100)
    log = logging.getLogger("test of the terminal")
    handler = LogHandler(screen)
    log.addHandler(handler)
    log.propagate = False
    with Progress("training", 3, unit="step") as bar:
        bar.advance(seconds=1.0)
        log.warning("previews of step 1")
        bar.advance(seconds=1.0)
    log.removeHandler(handler)
    assert "previews of step 1" in lines_of(screen)


def test_other_processes_show_nothing(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with Progress("training", 3, unit="step", shown=False) as bar:
        bar.advance(3)
    assert file.getvalue() == ""


def test_high_rates_are_plain_numbers(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with Progress("comparing", 3, unit="clip") as bar:
        bar.advance(3, seconds=0.0001)
    assert ", 30,000 clips/s, " in file.getvalue()


def test_an_hour_is_written_as_one():
    assert [progress._clock(seconds) for seconds in (0, 59.6, 3599, 3600, 86399)] == ["00:00", "01:00", "59:59", "1:00:00", "23:59:59"]


def test_symbols_of_units_have_no_plural(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with Progress("joining", 400, unit="MB") as bar:
        bar.advance(400, seconds=4.0)
    assert file.getvalue() == "joining: 400 of 400 MB (100 %), 100 MB/s, 00:04 in all\n"


def test_nothing_to_do_is_no_error(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with Progress("splitting", 0, unit="MB") as bar:
        bar.advance(0)
    assert not file.getvalue()
