"""Programs that a program runs: what becomes of them when it is killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATIENCE = 30.0
DRIVER = """
import sys
from musubi_tuner.runtime.children import run_command
sys.exit(run_command("rl-rounds", sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes")
@pytest.mark.parametrize("start", ["while it waits", "at once"])
def test_what_a_killed_program_had_started_ends_too(tmp_path: Path, start: str) -> None:
    """By a signal that nobody can hand on. Its program waits for a file that never comes; its end closes our pipe."""
    os.mkfifo(tmp_path / "rl.toml")
    flags = [f"--{name}={tmp_path / 'rl.toml'}" for name in ("rl_config", "rl_prompts", "rl_heldout_prompts")]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert driver.stderr is not None
    if start == "while it waits":
        end = time.monotonic() + PATIENCE
        while not (opened := _opens_for_reading(tmp_path / "rl.toml")) and time.monotonic() < end:
            time.sleep(0.05)
        assert opened and driver.poll() is None
    else:
        time.sleep(0.5)
    driver.kill()
    driver.wait()
    os.set_blocking(driver.stderr.fileno(), False)
    said, end = b"", time.monotonic() + PATIENCE
    while time.monotonic() < end:
        part = driver.stderr.read()
        if part == b"":  # nobody has it open any more
            break
        said += part or b""
        time.sleep(0.05)
    else:
        pytest.fail("what it had started is still there")
    assert b"Traceback" not in said and (start == "at once" or b"interrupted" in said)


def _opens_for_reading(pipe: Path) -> bool:
    """Whether a process waits at its other end; it goes on to wait for what is never written, as this end stays open."""
    try:
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    return True
