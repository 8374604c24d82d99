"""What a run has compiled, the next one takes from torch's cache on disk, and never what was compiled for something else."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from musubi_tuner.memory.attention import use_attention, use_default_attention
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.quantized import QuantizedLinear, quantize


class SmallBlock(nn.Module):
    """A trained weight on a frozen linear in fp8."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
        self.frozen = QuantizedLinear(quantize(weight, "fp8"), None, 16)
        self.trained = nn.Parameter(torch.ones(16))

    def forward(self, states, inputs):
        return torch.tanh(self.frozen(states[0])) * self.trained, None


def step(level: Recompute) -> tuple[float, dict[str, int]]:
    """The gradient's sum of a run over clips of three lengths that has compiled nothing yet, and what its cache says."""
    torch._dynamo.reset()
    counters.clear()
    block = SmallBlock()
    engine = BlockEngine([block], [level], max_rank=4, compiled=True, sequence_axes=lambda states, inputs: [(states[0], 1)])
    for length in (5, 7, 3):
        after, _ = engine(block, (torch.ones(1, length, 16), None), None)
        after.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    found = counters["aot_autograd"]
    return float(block.trained.grad.sum()), {name: found[f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")}


@pytest.fixture
def empty_cache(cpp_compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    yield
    use_default_attention()
    torch._dynamo.reset()


def test_the_next_run_takes_its_graphs_from_the_disk(empty_cache):
    """With a recompute policy and an autograd function of our own, which torch by itself would keep no graph of."""
    first, found = step(Recompute.FEED_FORWARD)
    assert found == {"hit": 0, "miss": 1, "bypass": 0}
    again, found = step(Recompute.FEED_FORWARD)
    assert found == {"hit": 1, "miss": 0, "bypass": 0} and again == first
    assert step(Recompute.EVERYTHING)[1]["hit"] == 0, "another level is another graph"


def test_a_graph_holds_the_attention_kernel_that_it_was_traced_with():
    """So one of another order of kernels, or of other code of ours, is none that torch may take."""
    use_attention(("math",))
    alone = torch.compiler.config.cache_key_tag
    use_default_attention()
    assert torch.compiler.config.cache_key_tag != alone
