"""Options of parity tests: `--weights FILE`, a checkpoint of one's own (`test_weights.py`); `--flow-factory CHECKOUT`
(`test_stochastic_steps.py`).
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--weights", type=Path, default=None, help="a checkpoint, or the folder of a split pack, for tests/parity/test_weights.py"
    )
    parser.addoption(
        "--flow-factory", type=Path, default=None, help="a checkout of Flow-Factory, for tests/parity/test_stochastic_steps.py"
    )
