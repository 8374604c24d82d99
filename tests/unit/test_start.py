"""What sets a machine up: which torch fits which driver, and the scripts that find a Python."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tools.graphics_driver import Card, read_answer, torch_indexes

REPOSITORY = Path(__file__).resolve().parents[2]
ANSWER = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      CUDA Version: {cuda}     |
+-----------------------------------------+------------------------+----------------------+
"""


@pytest.mark.parametrize(
    ("cuda", "builds"),
    [("13.1", ["cu130", "cu129", "cu128", "cu126"]), ("13.0", ["cu130", "cu129", "cu128", "cu126"]), ("12.8", ["cu128", "cu126"]),
     ("12.6", ["cu126"])],
)  # fmt: skip
def test_no_build_is_newer_than_the_driver(cuda, builds):
    card = read_answer(ANSWER.format(cuda=cuda))
    assert cuda in card.told
    assert [index.rpartition("/")[2] for index in torch_indexes(card)] == builds


def test_an_old_driver_is_told_and_gets_the_build_for_the_cpu():
    card = read_answer(ANSWER.format(cuda="12.2"))
    assert card.cuda is None and "runs CUDA 12.2; torch needs 12.6. Update the driver" in card.told
    assert [index.rpartition("/")[2] for index in torch_indexes(card, "linux")] == ["cpu"]
    assert torch_indexes(Card(None, ""), "darwin") == []
    assert read_answer("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.").cuda is None


def test_help_is_given_and_nothing_is_installed():
    answer = subprocess.run([sys.executable, str(REPOSITORY / "start.py"), "--help"], capture_output=True, text=True, check=True)
    assert "--dry_run" in answer.stdout and ".venv" in answer.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_shell_script_passes_over_pythons_that_are_too_old(tmp_path):
    """And starts from any folder."""
    folder = tmp_path / "of programs"
    folder.mkdir()
    for name, text in (
        ("python3.13", "#!/bin/sh\nexit 1\n"),
        ("python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'),
        ("nvidia-smi", f"#!/bin/sh\ncat <<'E'\n{ANSWER.format(cuda='12.8')}E\n"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(stat.S_IRWXU)
    paths = os.pathsep.join([str(folder), "/usr/bin", "/bin"])
    answer = subprocess.run(
        [str(REPOSITORY / "start.sh"), "--dry_run"],
        cwd=tmp_path,
        env={**os.environ, "PATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.splitlines()[0] == "NVIDIA driver for CUDA 12.8." and "/cu128" in answer.stdout and "/cu130" not in answer.stdout


def test_words_that_it_does_not_know_are_refused():
    answer = subprocess.run([sys.executable, str(REPOSITORY / "start.py"), "--gpu"], capture_output=True, text=True, check=False)
    assert answer.returncode == 2 and "unknown: --gpu" in answer.stderr


def test_windows_gets_its_line_ends():
    data = (REPOSITORY / "start.bat").read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n") > 10
