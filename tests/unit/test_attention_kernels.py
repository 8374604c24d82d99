"""Which attention kernel is asked for, as torch itself reports it. Which one runs on a GPU is seen in tests/gpu."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.config.network import NetworkOptions
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.memory.attention import KERNELS, use_attention, use_default_attention
from musubi_tuner.placement import prove
from musubi_tuner.placement.load import ModelRequest
from musubi_tuner.placement.planning import BatchTokens
from musubi_tuner.runtime.processes import Processes

ENABLED = {
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
}


@pytest.fixture(autouse=True)
def torchs_own_order() -> Iterator[None]:
    yield
    use_default_attention()


def state() -> tuple[list[int], dict[str, bool]]:
    """The order in which torch tries kernels, and which of them it may take."""
    return torch._C._get_sdp_priority_order(), {name: enabled() for name, enabled in ENABLED.items()}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_the_named_kernel_is_the_first_choice_until_the_default_returns(name: str, masked: bool) -> None:
    before = state()
    use_attention(next(other for other in KERNELS if other != name))
    use_attention(name, masked=masked)
    order, enabled = state()
    assert order[0] == int(KERNELS[name]) and enabled[name]
    others = {other for other in KERNELS if other != name and enabled[other]}
    assert others == (set(KERNELS) - {name} if masked and name != "math" else set()), "where there are masks, the others stand by"
    use_default_attention()
    assert state() == before


@pytest.mark.parametrize("name", KERNELS)
def test_the_choice_changes_nothing_on_the_cpu_but_rounding(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 33, 16, generator=generator) for _ in range(3))
    mask = torch.rand(2, 1, 33, 33, generator=generator) > 0.3
    for attention_mask in (None, mask):
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        use_attention(name)
        result = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        use_default_attention()
        assert torch.equal(result, expected) if name != "math" else torch.allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize(("asked", "chosen"), [("auto", "efficient"), ("flash", "flash")])
def test_on_a_gpu_the_fastest_kernel_is_taken_and_shown(asked: str, chosen: str, tiny_family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are made up, as a CPU has none to measure."""
    monkeypatch.setattr(prove, "fastest_attention", lambda *arguments, **shape: {"efficient": 0.002, "flash": 0.003})
    request = ModelRequest(
        checkpoint=open_checkpoint(tiny_family.ltx23),
        mode="video",
        timestep_format="flowmatch_1_1000",
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        network=NetworkOptions(),
        seed=0,
        memory=MemoryOptions(attn_mode=asked),
        tokens=BatchTokens(video=64, audio=0, text=16, clips=1),
        processes=Processes(index=0, count=1),
    )
    ((row, text),) = prove._choose_attention(request)
    assert (row, text) == ("attention", "flash, as asked" if asked == "flash" else "efficient 2.00 ms, flash 3.00 ms -> efficient")
    order, enabled = state()
    assert order[0] == int(KERNELS[chosen]) and all(enabled.values())
