"""Pinned host memory, what may be planned with, and where the device's memory ends. On a GPU: tests/gpu."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch

from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.memory import card, pinning
from musubi_tuner.memory.card import GIB, allocator_share, cap_device_memory, free_memory
from musubi_tuner.memory.offload import HostStore
from musubi_tuner.memory.pinning import PinningFailed, can_pin, pin, pinnable_bytes, pinned_bytes, pinned_memory
from musubi_tuner.memory.regions import aligned
from musubi_tuner.placement import planning, prove
from musubi_tuner.placement.planning import Machine
from musubi_tuner.placement.prove import pinning_budget

CUDA = torch.device("cuda")


@pytest.mark.parametrize(("available", "platform", "wanted"), [(50, "win32", 31), (20, "win32", 20), (50, "linux", 50)])
def test_windows_lets_half_of_the_memory_be_pinned(available: int, platform: str, wanted: int) -> None:
    """A GiB of it is for other things."""
    assert pinnable_bytes(available * GIB, 64 * GIB, platform) == wanted * GIB


@pytest.mark.parametrize(
    ("platform", "ram_gb", "host"), [("win32", None, 31), ("win32", 20.0, 14), ("linux", None, 52), ("linux", 20.0, 14)]
)
def test_the_plan_may_pin_what_the_system_allows(platform: str, ram_gb: float | None, host: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=58 * GIB, total=64 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15 * GIB, 16 * GIB))
    monkeypatch.setattr(card.sys, "platform", platform)
    for settings, share in (("expandable_segments:True", 0.9 if platform == "win32" else 0.94), ("", 0.9)):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", settings)
        assert free_memory(CUDA, None, ram_gb) == (int(15 * GIB * share), host * GIB)
    assert free_memory(torch.device("cpu"), 4.0, None)[1] == 52 * GIB, "nothing is pinned there"


@pytest.mark.parametrize(
    ("vram_gb", "platform", "wanted"),
    [(None, "linux", None), (8.0, "linux", 0.5), (15.5, "linux", 14 / 16), (None, "win32", 14 / 16), (8.0, "win32", 0.5)],
)
def test_the_allocator_ends_at_the_cap_and_on_windows_where_free_memory_does(
    vram_gb: float | None, platform: str, wanted: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a card of 16 GiB, 13 of them free and one that the allocator holds already."""
    assert allocator_share(14 * GIB, 16 * GIB, vram_gb, platform) == wanted
    calls = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (13 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, index: calls.append(share))
    monkeypatch.setattr(card.sys, "platform", platform)
    cap_device_memory(CUDA, vram_gb)
    cap_device_memory(torch.device("cpu"), vram_gb)
    assert calls == ([] if wanted is None else [wanted])


def test_each_budget_after_a_refusal_is_smaller() -> None:
    assert pinning_budget(planned=46, granted=23) == 20
    assert pinning_budget(planned=46, granted=60) == 40, "what was granted beside the plan is no progress"
    assert pinning_budget(planned=46, granted=0) == 0


@pytest.mark.parametrize(("sharers", "wanted"), [(1, 20), (2, 10), (8, 2.5)])
def test_a_plan_after_a_refusal_counts_each_process_its_part(sharers: int, wanted: float) -> None:
    machine = Machine(device=CUDA, device_bytes=GIB, host_bytes=50 * GIB, rates=None, low_rates={}, sharers=sharers)
    placement = SimpleNamespace(plan=SimpleNamespace(host_bytes=40 * GIB), sharers=sharers)
    found = prove._with_less_to_pin(machine, placement, prove.Failure("pinning", "refused", pinned=23 * GIB))
    assert found == dataclasses.replace(machine, host_bytes=int(wanted * GIB))


def test_of_several_processes_the_gravest_failure_decides_and_the_least_memory() -> None:
    """All plan for the one that has the least."""

    def gather(own: prove.Failure | None) -> list[prove.Failure | None]:
        return [own, None, prove.Failure("pinning", "other", pinned=7), prove.Failure("memory", "of the device")]

    def refused() -> None:
        raise PinningFailed(1, 9, "out of memory")

    with pytest.raises(prove.PlanFailed) as failed:
        prove._in_all(SimpleNamespace(gather=gather), refused)
    assert failed.value.failure == prove.Failure("pinning", "other", pinned=7)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """A driver that pins 1 MiB: what it has registered, by address."""
    registered: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        if sum(registered.values()) + size > 2**20:
            return 2
        registered[address] = size
        return 0

    runtime = SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=registered.pop,
        cudaGetErrorString=lambda code: "out of memory",
        cudaError=SimpleNamespace(success=0),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pinning, "_forget_error", lambda runtime: registered.__setitem__(0, 0))
    return registered


def test_memory_is_pinned_at_its_exact_size_until_it_goes(driver: dict[int, int]) -> None:
    buffer = pinned_memory(300_000)
    other = torch.zeros(1000)
    pin(other)
    assert buffer.shape == (300_000,) and driver == {buffer.data_ptr(): 300_000, other.data_ptr(): 4000}
    assert pinned_bytes() == 304_000
    del buffer
    gc.collect()
    assert pinned_bytes() == sum(driver.values()) == 4000


def test_a_refusal_says_what_was_granted_and_leaves_no_error_behind(driver: dict[int, int]) -> None:
    kept = [pinned_memory(2**19), pinned_memory(2**18)]
    with pytest.raises(PinningFailed, match=r"^1 MiB of host memory .*out of memory.*--ram_gb.*--weight_format nf4") as failed:
        pinned_memory(2**20)
    assert failed.value.granted == 2**19 + 2**18 == sum(one.numel() for one in kept)
    assert 0 in driver, "CUDA would blame the next kernel"


def test_where_nothing_can_be_pinned_rates_are_measured_and_nothing_is_planned_to_wait_on_the_host(driver, monkeypatch, caplog) -> None:
    """The driver pins 1 MiB."""
    assert can_pin(2**20) and not can_pin(2**20 + 1)
    gc.collect()
    assert sum(driver.values()) == 0, "nothing stays pinned"
    measured = []
    monkeypatch.setattr(planning, "measure_rates", lambda device, *, pins: measured.append(pins) or (None, {}))
    monkeypatch.setattr(planning, "free_memory", lambda *given: (15 * GIB, 50 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    machine = planning.read_machine(CUDA, MemoryOptions(), processes=1)
    assert (machine.device_bytes, machine.host_bytes, measured) == (15 * GIB, 0, [False])
    assert "does not let 136 MiB of host memory be pinned" in caplog.text
    monkeypatch.setattr(planning, "COPIED", 2**20)
    assert planning.read_machine(CUDA, MemoryOptions(), processes=2).host_bytes == 25 * GIB and measured == [False, True]


def states(*tokens: int) -> list[torch.Tensor]:
    return [torch.randn(1, count, 24) for count in tokens]


def test_states_come_back_and_their_buffers_are_used_again() -> None:
    """Also for clips of other sizes: no more is held than the largest states take, at their exact size."""
    store, largest = HostStore(), sum(aligned(96 * count) for count in (30, 7))
    for sizes in ((30, 7), (10, 20), (30, 7), (1, 2)):
        given = [states(*sizes) for _ in range(3)]
        kept = [store.put(one) for one in given]
        for one, wanted in zip(reversed(kept), reversed(given), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(store.take(one), wanted, strict=True))
        assert [buffer.numel() for buffer in store._free] == [largest] * 3


def test_a_larger_clip_replaces_buffers_that_are_too_small() -> None:
    store = HostStore()
    for sizes in ((3,), (9,)):
        for one in [store.put(states(*sizes)) for _ in range(2)]:
            store.take(one)
    assert [buffer.numel() for buffer in store._free] == [aligned(96 * 9)] * 2


def test_states_that_came_back_are_gone_when_their_block_is_done() -> None:
    """What `put` gave lives on in autograd's graph until the backward pass of all blocks has ended."""
    store = HostStore()
    kept = [store.put(states(3)) for _ in range(3)]
    taken = weakref.ref(store.take(kept[2])[0])
    assert taken() is None and kept[1].back is not None, "the next ones are on their way"
