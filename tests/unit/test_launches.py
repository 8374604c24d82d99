"""A block may not launch more kernels than it does, counted on a simulated card where torch is built with CUDA."""

import re
import subprocess
import sys

import pytest

from benchmarks import simulated_card
from benchmarks.launches import KINDS, kind_of

BUDGETS = {"bf16": (307, 132.1), "fp8": (338, 152.4)}
"""Launches of one block at 768x512x121, rank 32 on attention, nothing recomputed, and units that its compiled kernels move."""


def test_every_line_of_the_log_is_of_a_kind():
    lines = {
        "product 4096x6144x4096 type 14": "product",
        "compiled triton_poi_fused_0": "compiled",
        "kernel _ZN13pytorch_flash16flash_fwd_kernel": "attention",
        "kernel _ZN2at6native18elementwise_kernel": "other kernel",
        "copy card to card 516096": "copy",
        "fill": "fill",
    }
    assert {line: kind_of(line) for line in lines} == lines
    assert set(lines.values()) == set(KINDS)


@pytest.mark.skipif(simulated_card.obstacle() is not None, reason=str(simulated_card.obstacle()))
@pytest.mark.parametrize("weight_format", BUDGETS)
def test_a_block_launches_no_more(weight_format):
    """Minutes of compiling."""
    command = [sys.executable, "-m", "benchmarks.launches", "--formats", weight_format]
    found = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    total = re.search(r"\*\*(\d+)\*\* \| ([\d.]+) ", found)
    launches, units = BUDGETS[weight_format]
    assert total and int(total[1]) <= launches and float(total[2]) <= units, found
