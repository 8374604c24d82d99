"""`pytest tests/parity --weights FILE`, on a tiny checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest

from musubi_tuner.ltxv2.weights import open_checkpoint
from tests.parity import test_weights as parity

REPOSITORY = Path(__file__).resolve().parents[2]


def test_parity_runs_on_a_file_of_ones_own(tiny_family):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/parity/test_weights.py"]
    answer = subprocess.run([*command, "--weights", str(tiny_family.ltx23)], cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.returncode == 0 and "5 passed" in answer.stdout, answer.stdout
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.returncode == 0 and "5 skipped" in answer.stdout and "needs --weights FILE" in answer.stdout


def test_the_first_block_that_differs_is_named(tiny_family, monkeypatch):
    blocks = iter(range(100))
    real = parity.run_theirs
    monkeypatch.setattr(parity, "run_theirs", lambda model, ours: tuple(one + (next(blocks) >= 2) for one in real(model, ours)))
    with pytest.raises(AssertionError, match=r"the first block that differs is 1; of 2: \[1\]"):
        parity.test_every_block_of_the_transformer_equals_diffusers(open_checkpoint(tiny_family.ltx23))
