"""Memory and speed flags through the real program: same result where the arithmetic is the same, and no crash in any combination."""

import dataclasses
import itertools
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from musubi_tuner import ltxv2_train_network
from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.config.network import NetworkOptions
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.items import Draw
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.memory import pinning
from musubi_tuner.memory.attention import use_default_attention
from musubi_tuner.memory.pinning import PinningFailed
from musubi_tuner.placement import planning, prove
from musubi_tuner.placement.load import ModelRequest
from musubi_tuner.placement.planning import BatchTokens
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.processes import processes
from musubi_tuner.training import setup
from musubi_tuner.training.objective import BatchObjective, FlowMatching
from tests import training_parts as parts


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("data"), tiny_family, "av", held_out=False)


def run(data, output, *extra: str, steps: int = 3) -> dict[str, torch.Tensor]:
    flags = ["--output_dir", str(output), "--save_precision", "float32", "--max_train_steps", str(steps), *extra]
    assert ltxv2_train_network.main(data.arguments(*flags)) == 0
    return load_file(output / "ltxv2_lora.safetensors")


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps one precision for a process; a test with another one needs a clean slate, and leaves one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "flags",
    [
        ("--blocks_to_swap", "1"),
        ("--blocks_to_swap", "2"),
        ("--no-gradient_checkpointing",),
        ("--gradient_checkpointing", "--blocks_to_swap", "2"),
    ],
)
def test_flags_that_change_no_arithmetic_change_no_bit(data, plain, tmp_path, flags):
    ours = run(data, tmp_path, *flags)
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("planned", [(), ("--vram_gb", "4")], ids=["by hand", "planned"])
def test_the_flag_decides_whether_blocks_are_recomputed(data, tmp_path, planned):
    """A backward pass costs twice a forward pass; the adapters' part is small, so recomputing makes it three of two."""

    def operations(flag: str) -> int:
        config = ltxv2_train_network.parse_arguments(data.arguments("--output_dir", str(tmp_path), flag, *planned))
        with processes() as group:
            built, inputs = parts.build(config, group)
            batch = make_batch([Draw(inputs.items[0], epoch=0, repeat=0)], "av", built.rules)
            with FlopCounterMode(display=False) as counter:
                built.objective.backward(batch)
        return counter.get_total_flops()

    assert operations("--gradient_checkpointing") > 1.25 * operations("--no-gradient_checkpointing")


def test_attention_kernels_differ_in_rounding_alone(data, plain, tmp_path, monkeypatch):
    """ADP-18."""
    enabled = []
    noise = FlowMatching.noise

    def watched(self, batch):
        backends = torch.backends.cuda
        enabled.append((backends.math_sdp_enabled(), backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled()))
        return noise(self, batch)

    monkeypatch.setattr(FlowMatching, "noise", watched)
    try:
        ours = run(data, tmp_path, "--attn_mode", "math")
    finally:
        use_default_attention()
    assert set(enabled) == {(True, False, False)}, "the kernel of the steps is the one that was asked for"
    differences = torch.cat([(ours[name] - plain[name]).abs().flatten() for name in plain])
    assert float(differences.quantile(0.999)) < 1e-6
    assert float(differences.max()) < 1e-4, "Adam makes steps of full size of gradients that are rounding alone: a tenth of one"


@pytest.mark.parametrize(("weight_format", "swapped"), list(itertools.product(("fp8", "int8", "nf4"), ("0", "2"))))
def test_low_bit_weights_train_and_preview(data, plain, tmp_path, caplog, weight_format, swapped):
    """MEM-04: every format, streamed or not, trains and previews before step 0."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rain on a roof --w 64 --h 64 --f 9 --s 2\n", encoding="utf-8")
    flags = ["--weight_format", weight_format, "--blocks_to_swap", swapped]
    flags += ["--sample_prompts", str(prompts), "--sample_at_first", "--text_encoder", str(data.encoder)]
    with caplog.at_level(logging.INFO):
        ours = run(data, tmp_path / "out", *flags)
    assert "relative error of" in caplog.text and weight_format in caplog.text
    assert any((tmp_path / "out").rglob("*.mp4"))
    learned, wanted = (torch.cat([one[name].flatten() for name in plain if "lora_B" in name]) for one in (ours, plain))
    assert float(torch.nn.functional.cosine_similarity(learned, wanted, dim=0)) > 0.8, "three steps of Adam turn signs into sizes"


@pytest.mark.parametrize("weight_format", ["fp8", "int8", "nf4"])
def test_low_bit_weights_train_in_bf16(data, tmp_path, weight_format, fresh_accelerator):
    lora = run(data, tmp_path, "--weight_format", weight_format, "--blocks_to_swap", "1", "--mixed_precision", "bf16")
    assert all(bool(torch.isfinite(value).all()) for value in lora.values())


def test_a_cap_is_planned_for_proved_and_kept_to(data, plain, tmp_path, caplog):
    """The planner with this machine's measured rates; a cap between the leanest plan and the whole model."""
    with caplog.at_level(logging.INFO):
        ours = run(data, tmp_path, "--vram_gb", "0.04")
    assert "predicted" in caplog.text and "forward and backward of the largest batch" in caplog.text
    assert ours.keys() == plain.keys()


def test_a_cap_that_nothing_fits_says_what_is_missing(data, tmp_path):
    with pytest.raises(UserError, match="no plan fits: the leanest one .* GiB may be used.*resolution"):
        run(data, tmp_path, "--vram_gb", "0.001")


@pytest.mark.parametrize(("trained", "outside"), [("attn1", False), ("attn1|adaln_single.*linear_1", True)])
def test_a_plan_knows_of_what_is_trained_outside_the_blocks(data, tmp_path, monkeypatch, trained, outside):
    """Block inputs on the host would take it the gradients."""

    class Seen(Exception):
        pass

    def place(*arguments, trains_outside_blocks: bool, **named):
        raise Seen(trains_outside_blocks)

    monkeypatch.setattr(prove, "place_by_plan", place)
    with pytest.raises(Seen, match=str(outside)):
        run(data, tmp_path, "--vram_gb", "4", "--network_args", f"include_patterns={trained}")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("planned", [(), ("--vram_gb", "4")], ids=["by hand", "planned"])
def test_a_model_that_the_host_has_no_room_for_is_told_in_words(data, tmp_path, monkeypatch, error, planned):
    def load(request, placement):
        raise error

    monkeypatch.setattr(prove, "load_request", load)
    with pytest.raises(TemporaryFailure, match="ran out of memory while the model was loaded.*--blocks_to_swap"):
        run(data, tmp_path, *planned)


def test_a_compiler_that_fails_costs_speed_and_not_the_run(data, tmp_path, monkeypatch, caplog):
    """Of pictures alone, whose block comes to the compiler three times as fast."""
    import torch._inductor.config as inductor

    data = dataclasses.replace(data, mode="video")
    monkeypatch.setattr(planning, "obstacle_to_compiling", lambda device: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    missing = tmp_path / "no compiler"
    monkeypatch.setenv("CXX", str(missing))  # which names the compiler on Windows
    with inductor.patch({"cpp.cxx": (None, str(missing))}):
        run(data, tmp_path, "--vram_gb", "4")
        assert "blocks run uncompiled" in caplog.text and missing.name in caplog.text
        with pytest.raises(UserError, match=f"--compile: .*ompiler.*{missing.name}"):
            run(data, tmp_path / "b", "--vram_gb", "4", "--compile")


def load(data, trial, memory: MemoryOptions):
    """The model, and the machine and the placement of each plan that was made for it."""
    plans = []

    def watched(options, machine, *arguments, **named):
        placement = planning.place_by_plan(options, machine, *arguments, **named)
        plans.append((machine, placement))
        return placement

    with processes() as group, pytest.MonkeyPatch.context() as patch:
        patch.setattr(prove, "place_by_plan", watched)
        request = ModelRequest(
            checkpoint=open_checkpoint(data.model),
            mode="av",
            timestep_format="flowmatch_1_1000",
            device=torch.device("cpu"),
            dtype=torch.float32,
            network=NetworkOptions(network_dim=4),
            seed=0,
            memory=memory,
            tokens=BatchTokens(video=18, audio=18, text=16, clips=1),
            processes=group,
        )
        return prove.load_model(request, trial), plans


class FailsFirst:
    """A trial whose first passes raise an error each."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.proved = []

    def __call__(self, wrapper, network) -> float:
        self.proved.append(wrapper)
        if self.errors:
            raise self.errors.pop(0)
        return 0.5


def test_a_trial_that_runs_out_of_memory_is_planned_again_for_less(data, caplog, monkeypatch):
    """Nothing of the failed plan stays: the second one is proved as the first would have been. The allocator is capped before, once."""
    capped = []
    monkeypatch.setattr(prove, "cap_device_memory", lambda device, vram_gb: capped.append((device.type, vram_gb, len(trial.proved))))
    trial = FailsFirst(torch.OutOfMemoryError("no room"))
    loaded, ((first, _), (second, _)) = load(data, trial, MemoryOptions(vram_gb=4))
    proved = trial.proved
    assert loaded.wrapper is proved[1] is proved[2] and proved[0] is not proved[1]
    assert second.device_bytes == int(first.device_bytes / 1.15) and second.host_bytes == first.host_bytes
    assert "planning again as if all took 15 % more" in caplog.text
    assert loaded.notes[-1] == ("measured", "0.500 s, forward and backward of the largest batch")
    assert capped == [("cpu", 4, 0)]


def test_each_batch_that_may_be_the_largest_is_planned_for_and_tried(data, tmp_path, monkeypatch):
    tried, planned = [], []
    backward, plan, run_trial = BatchObjective.backward, prove.place_by_plan, prove._run_trial
    monkeypatch.setattr(setup, "largest_items", lambda items, *given, **named: tuple(items[:2]))
    monkeypatch.setattr(BatchObjective, "backward", lambda self, batch, *given: tried.append(batch.names) or backward(self, batch, *given))
    monkeypatch.setattr(prove, "place_by_plan", lambda *given, **named: planned.append(given[3]) or plan(*given, **named))
    monkeypatch.setattr(prove, "_run_trial", lambda *given: (run_trial(*given), tried.append("end"))[0])
    run(data, tmp_path, "--vram_gb", "4", steps=1)
    first, second = tried[:2]
    assert first != second and tried[: tried.index("end")] == [first, second] * 2, "two passes of each"
    (work,) = planned
    assert len(work.others) == 1 and work.others[0].video_tokens == work.video_tokens > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_wait_in_the_trial_as_they_do_in_a_step(data, tmp_path, monkeypatch, accumulation):
    """And none of them is left for the first step."""
    seen, run_trial = [], prove._run_trial

    def watched(loaded, trial, *arguments):
        def noted(wrapper, network):
            seen.append(trial(wrapper, network) and [parameter.grad.abs().sum() for parameter in network.parameters()])
            return 1.0

        answer = run_trial(loaded, noted, *arguments)
        assert all(parameter.grad is None for parameter in loaded.network.parameters())
        return answer

    monkeypatch.setattr(prove, "_run_trial", watched)
    run(data, tmp_path, "--vram_gb", "4", "--gradient_accumulation_steps", str(accumulation))
    first, second = (torch.stack(sums) for sums in seen)
    assert first.sum() > 0 and torch.allclose(second, accumulation * first, rtol=1e-3)


@pytest.mark.parametrize(
    "error",
    [PinningFailed(2**20, 3 * 2**10, "out of memory"), torch.AcceleratorError("CUDA error: out of memory")],
    ids=["ours", "torch's"],
)
def test_host_memory_that_cannot_be_pinned_is_planned_again_for_less(data, caplog, monkeypatch, error):
    """The toy's plans pin nothing, so less than that is nothing; tests/unit/test_pinning.py has numbers."""
    monkeypatch.setattr(pinning, "pinned_bytes", lambda: 3 * 2**10)
    trial = FailsFirst(error)
    loaded, ((first, _), (second, _)) = load(data, trial, MemoryOptions(vram_gb=4))
    assert len(trial.proved) == 3 and loaded.wrapper is trial.proved[1]
    assert first.host_bytes > 0 and second == dataclasses.replace(first, host_bytes=0)
    assert "planning again with 0.0 GiB" in caplog.text


def test_what_cuda_lacks_beside_pinned_memory_is_memory_of_the_device(data, monkeypatch):
    monkeypatch.setattr(pinning, "pinned_bytes", lambda: 0)
    trial = FailsFirst(torch.AcceleratorError("CUDA error: out of memory"))
    _, ((first, _), (second, _)) = load(data, trial, MemoryOptions(vram_gb=4))
    assert second.device_bytes == int(first.device_bytes / 1.15) and second.host_bytes == first.host_bytes


def test_pinning_that_always_fails_ends_in_words(data):
    """By the same number of trials; where fewer blocks cannot be streamed, at once."""
    trial = FailsFirst(*(PinningFailed(2**20, 2**30, "out of memory") for _ in range(9)))
    with pytest.raises(UserError, match="1 MiB of host memory could not be pinned beside 1.00 GiB .*--ram_gb.*--weight_format nf4"):
        load(data, trial, MemoryOptions(vram_gb=4))
    assert len(trial.proved) == 4
    trial = FailsFirst(*(PinningFailed(2**20, 0, "out of memory") for _ in range(9)))
    with pytest.raises(
        UserError, match="1 MiB of host memory could not be pinned .*With less, no plan fits: the leanest one .*2 blocks streamed"
    ):
        load(data, trial, MemoryOptions(vram_gb=4, blocks_to_swap=2))
    assert len(trial.proved) == 1


def test_contradicting_formats_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="--fp8_base and --weight_format nf4"):
        run(data, tmp_path, "--fp8_base", "--weight_format", "nf4")
