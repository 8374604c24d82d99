"""`pytest tests/parity --weights FILE`: the parity of every component on a checkpoint of one's own (`test_weights.py`)."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--weights", type=Path, default=None, help="a checkpoint, or the folder of a split pack, for tests/parity/test_weights.py"
    )
