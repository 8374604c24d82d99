"""Which attention kernels are chosen and asked for, as torch itself reports it. Which one runs on a GPU is seen in tests/gpu."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.config.network import NetworkOptions
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.memory import attention
from musubi_tuner.memory.attention import KERNELS, KernelTimes, choose_kernels, try_kernels, use_attention, use_default_attention
from musubi_tuner.placement import prove
from musubi_tuner.placement.load import ModelRequest
from musubi_tuner.placement.planning import BatchTokens
from musubi_tuner.runtime.errors import UserError
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


@pytest.mark.parametrize("order", [("flash", "efficient", "math"), ("efficient", "cudnn", "math"), ("math",), tuple(KERNELS)])
def test_the_given_kernels_alone_are_tried_in_their_order_until_the_default_returns(order: tuple[str, ...]) -> None:
    before = state()
    use_attention(("math",))
    use_attention(order)
    priority, enabled = state()
    assert priority[: len(order)] == [int(KERNELS[name]) for name in order]
    assert {name for name, is_on in enabled.items() if is_on} == set(order)
    use_default_attention()
    assert state() == before


@pytest.mark.parametrize("name", KERNELS)
def test_the_choice_changes_nothing_on_the_cpu_but_rounding(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 33, 16, generator=generator) for _ in range(3))
    mask = torch.rand(2, 1, 33, 33, generator=generator) > 0.3
    order = (name,) if name == "math" else (name, *(other for other in KERNELS if other != name))
    for attention_mask in (None, mask):
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        use_attention(order)
        result = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        use_default_attention()
        assert torch.equal(result, expected) if name != "math" else torch.allclose(result, expected, atol=1e-6)


H200 = KernelTimes({"cudnn": 3.69, "flash": 4.4, "efficient": 12.0}, {"cudnn": 5.77, "efficient": 16.9}, {})
ADA = KernelTimes({"flash": 9.0, "cudnn": 9.5, "efficient": 12.0}, {"cudnn": 14.0, "efficient": 12.5}, {})
UNLIKE = KernelTimes({"cudnn": 10.0, "flash": 10.5, "efficient": 14.0}, {"cudnn": 15.6, "efficient": 14.0}, {})
BROKEN = KernelTimes({"flash": 9.0, "efficient": 12.0}, {"efficient": 12.5}, {"cudnn": "no plan was found"})
FLASH_ALONE = KernelTimes({"flash": 9.0}, {}, {})


@pytest.mark.parametrize(
    ("times", "rare", "plain", "masked"),
    [
        (H200, True, "cudnn", "cudnn"),
        (H200, False, "cudnn", "cudnn"),
        (ADA, True, "flash", "efficient"),
        (ADA, False, "flash", "efficient"),
        (UNLIKE, True, "cudnn", "cudnn"),
        (UNLIKE, False, "flash", "efficient"),
        (BROKEN, False, "flash", "efficient"),
        (FLASH_ALONE, False, "flash", "math"),
    ],
)
def test_masked_and_plain_attention_have_the_fastest_kernels_that_one_order_gives_them(times, rare, plain, masked) -> None:
    choice = choose_kernels(times, masks_are_rare=rare)
    assert (choice.plain, choice.masked) == (plain, masked)
    assert choice.order[0] == plain and set(choice.order) == {*times.plain, "math"} and not set(choice.order) & set(times.failed)
    taken = next(name for name in choice.order if name in times.masked or name == "math")
    assert taken == masked, "what torch makes of the order, as it gives no mask to a kernel that takes none"


def test_a_kernel_that_is_asked_for_comes_first_and_leaves_masks_to_the_fastest_that_takes_them() -> None:
    assert choose_kernels(ADA, asked="cudnn", masks_are_rare=False).order == ("cudnn", "flash", "efficient", "math")
    choice = choose_kernels(ADA, asked="flash", masks_are_rare=False)
    assert choice.order == ("flash", "efficient", "cudnn", "math")
    text = attention.describe_choice(ADA, choice, asked="flash")
    assert text == "flash, as asked; it takes no mask, so with one efficient 12500.00 ms, cudnn 14000.00 ms -> efficient"


@pytest.mark.parametrize(("times", "reason"), [(BROKEN, "no plan was found"), (FLASH_ALONE, "does not have it")])
def test_a_kernel_that_is_asked_for_and_does_not_run_is_refused(times: KernelTimes, reason: str) -> None:
    with pytest.raises(UserError, match=f"--attn_mode cudnn: .*{reason}.*Leave the flag out.*flash"):
        choose_kernels(times, asked="cudnn", masks_are_rare=True)


def test_no_kernel_at_all_is_told_with_the_reasons() -> None:
    with pytest.raises(UserError, match="no attention kernel runs .*math: no room"):
        choose_kernels(KernelTimes({}, {}, {"math": "no room"}), masks_are_rare=True)


def test_a_kernel_that_fails_in_one_form_is_in_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has two kernels: flash, which takes masks there, and the one that runs everywhere."""
    tried = []

    def attend(query, key, value, mask) -> None:
        tried.append((state()[0][0], mask is not None))
        if mask is not None and ENABLED["flash"]():
            raise RuntimeError("the plan was not found\nat some place")

    monkeypatch.setattr(attention, "_attend_and_return", attend)
    found = try_kernels(torch.device("cpu"), torch.float32, tokens=9, heads=2, head_dim=16)
    assert found.failed == {"flash": "the plan was not found"} and not found.plain and set(found.masked) == {"math"}
    monkeypatch.undo()
    whole = try_kernels(torch.device("cpu"), torch.float32, tokens=9, heads=2, head_dim=16)
    assert set(whole.plain) == set(whole.masked) == {"flash"} and not whole.failed


@pytest.mark.parametrize(
    ("asked", "text", "first"),
    [
        ("auto", "flash 9.00 ms, efficient 12.00 ms -> flash; with a mask efficient 12.50 ms -> efficient", "flash"),
        ("flash", "flash, as asked; it takes no mask, so with one efficient 12.50 ms -> efficient", "flash"),
        ("efficient", "efficient, as asked", "efficient"),
        ("math", "math, as asked", "math"),
    ],
)
def test_on_a_gpu_the_choice_takes_effect_and_is_shown(asked, text, first, tiny_family, monkeypatch, caplog) -> None:
    """The times are made up, as a CPU has none to measure."""
    plain, masked = ({name: value / 1000 for name, value in times.items()} for times in (BROKEN.plain, BROKEN.masked))
    monkeypatch.setattr(prove, "try_kernels", lambda *arguments, **shape: KernelTimes(plain, masked, BROKEN.failed))
    assert prove._choose_attention(request_of(tiny_family, asked)) == ((("attention", text),), first == "math")
    order, enabled = state()
    assert order[0] == int(KERNELS[first]) and enabled["math"]
    assert not enabled["cudnn"], "it failed"
    assert ("cudnn failed in its trial and is not used: no plan was found" in caplog.text) == (asked != "math")


def request_of(tiny_family, asked: str = "auto", device: str = "cuda") -> ModelRequest:
    return ModelRequest(
        checkpoint=open_checkpoint(tiny_family.ltx23),
        mode="video",
        timestep_format="flowmatch_1_1000",
        device=torch.device(device),
        dtype=torch.bfloat16,
        network=NetworkOptions(),
        seed=0,
        memory=MemoryOptions(attn_mode=asked),
        tokens=BatchTokens(video=64, audio=0, text=16, clips=1),
        processes=Processes(index=0, count=1),
    )


def test_masks_are_rare_where_no_batch_of_the_run_has_several_clips(tiny_family, monkeypatch) -> None:
    """Not the largest one alone: its neighbors may be padded."""
    found = []
    monkeypatch.setattr(prove, "try_kernels", lambda *arguments, **shape: BROKEN)
    real = prove.choose_kernels
    monkeypatch.setattr(prove, "choose_kernels", lambda *given, **named: found.append(named["masks_are_rare"]) or real(*given, **named))
    request = request_of(tiny_family)
    for others in ((), (BatchTokens(video=32, audio=8, text=16, clips=4),)):
        prove._choose_attention(dataclasses.replace(request, other_tokens=others))
    assert found == [True, False]


def test_a_cpu_runs_the_kernels_that_it_has_and_refuses_the_others(tiny_family) -> None:
    for asked in ("flash", "math"):
        assert prove._choose_attention(request_of(tiny_family, asked, "cpu")) == ((("attention", f"{asked}, as asked"),), asked == "math")
    with pytest.raises(UserError, match="--attn_mode cudnn: the cpu does not have it.*flash, math"):
        prove._choose_attention(request_of(tiny_family, "cudnn", "cpu"))
    assert state()[1]["flash"] is False, "as was asked last"
    assert prove._choose_attention(request_of(tiny_family, "auto", "cpu")) == ((), False)
    assert all(state()[1].values()), "nothing of an earlier model's choice is left"


def test_a_card_that_has_no_other_kernel_keeps_its_scores(tiny_family, monkeypatch) -> None:
    """As those before sm_80 in bf16."""
    monkeypatch.setattr(prove, "try_kernels", lambda *arguments, **shape: KernelTimes({"math": 1.0}, {"math": 1.0}, {}))
    assert prove._choose_attention(request_of(tiny_family))[1]
