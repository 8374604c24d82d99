"""What caching may launch and hold, and where the host may wait, counted on a simulated card where torch is built with CUDA."""

import subprocess
import sys

import pytest

from benchmarks import simulated_card


@pytest.mark.skipif(simulated_card.obstacle() is not None, reason=str(simulated_card.obstacle()))
@pytest.mark.parametrize(("encoder", "shapes"), [("gemma3", ["512x768x49"]), ("gemma4", [])])
def test_encoding_hardly_waits_and_holds_what_is_expected(encoder, shapes):
    command = [sys.executable, "-m", "benchmarks.encoding", "--shapes", *shapes, "--encoder", encoder, "--streamed", "4"]
    found = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()[2:]]
    numbers = {title: [float(cell) for cell in cells] for title, *cells in rows}
    assert len(numbers) == 5 + len(shapes)
    for title, (_, _, waits, at_most, expected) in numbers.items():
        assert waits <= (6 if "captions" in title else 0), found
        assert at_most <= expected * 1.01, found
    resident, streamed = (numbers[f"8 captions, 200 tokens, 4 layers, {count} of them streamed"] for count in (0, 4))
    assert streamed[1] == resident[1] + 4 and streamed[2] == resident[2], "a copy of each layer, which nobody waits for"
