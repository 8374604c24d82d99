"""Malformed input through the programs' own `main`: no traceback, no hang, nothing wrongly accepted, and messages that name what is wrong.

A fixed thousand of what `python -m tests.malformed` makes without end, families mixed by `tests.malformed.session.SHARES`: of 138 inputs
14 are pictures, sound and video, and about half go through training. They run in a process of their own, whose memory is bounded.
"""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COUNT = 1000

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="hangs are ended by signals that Windows lacks")


def test_malformed_input_is_refused_in_words(tmp_path: Path) -> None:
    words = ["--count", str(COUNT), "--work", str(tmp_path)]
    run = subprocess.run([sys.executable, "-m", "tests.malformed", *words], cwd=REPOSITORY, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr[-2000:]}\nOne alone: python -m tests.malformed --work FOLDER --id ID"
