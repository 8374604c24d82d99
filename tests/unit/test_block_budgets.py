"""The block at real size may not get more expensive unnoticed: counts on tensors without storage against committed budgets."""

import pytest

from benchmarks.block_counts import SHAPES, count_block
from benchmarks.step import model_and_work
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.step_model import LEVELS, text_bytes, unit_bytes

SHAPE = SHAPES["768x512x121"]

BUDGETS = {
    Recompute.NOTHING: (15.8, 5.222, 990),
    Recompute.FEED_FORWARD: (11.8, 6.051, 1000),
    Recompute.ALL_BUT_ATTENTION: (2.6, 7.832, 1074),
    Recompute.EVERYTHING: (0.0, 8.568, 1080),
}
"""Units kept beside the input, TFLOP of the backward pass (its minimum is 5.22), and operations before fusion."""


@pytest.mark.parametrize("level", BUDGETS)
def test_a_block_stays_in_its_budget(level):
    units, flops, operations = BUDGETS[level]
    counts = count_block(level, SHAPE)
    assert counts.saved_units <= units * 1.01 + 0.05
    assert counts.saved_units >= 0.9 * units, "a cheaper block is good news: write the new number down"
    assert counts.forward_flops / 1e12 == pytest.approx(4.175, rel=0.002)
    assert counts.backward_flops / 1e12 == pytest.approx(flops, rel=0.005)
    assert counts.forward_operations <= 500 and counts.backward_operations <= 1.02 * operations
    assert counts.forward_bytes <= 0.0205e12 and counts.backward_bytes <= 0.0535e12
    planned = next(one for one in LEVELS if one.name == level)
    model, work = model_and_work("768x512x121", 48)
    kept = planned.kept + planned.keeps_text * text_bytes(model, work) / unit_bytes(model, work)
    assert abs(counts.saved_units + 1 - kept) < 0.15, "what the planner reckons with"
