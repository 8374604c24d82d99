"""The planner against the step model: within budget, better with more, and what it says of the released models."""

import dataclasses
import itertools

import pytest
import torch

from benchmarks.plans import RELEASED, full_table, rl_table, streamed_plan, streamed_table
from benchmarks.plans import rates as rates_of
from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.memory.attention import SCORE_BYTES
from musubi_tuner.memory.plan import SLOTS, Limits, candidates, choose_plan, count_levels, fits, leanest_plan
from musubi_tuner.memory.step_model import (
    LEVELS,
    CardRates,
    ModelShape,
    Workload,
    attention_operations,
    block_seconds,
    floor_seconds,
    gradient_operations,
    linear_operations,
    text_bytes,
    unit_bytes,
)
from musubi_tuner.placement.planning import Machine, describe_placement, place_by_plan, state_bytes
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.optimizer import make_optimizer
from tests.conftest import REPOSITORY

GB = 10**9
LARGE = ModelShape(blocks=48, video_dim=4096, audio_dim=2048, block_weights=386_500_000, other_weights=430_000_000)


def work(video_tokens: int = 6144, audio_tokens: int = 126, clips: int = 1) -> Workload:
    return Workload(
        video_tokens=video_tokens, audio_tokens=audio_tokens, text_tokens=1024, clips=clips, trainable=214_000_000, optimizer_bytes=8
    )


def limits(device_gb: float, host_gb: float, **fixed: object) -> Limits:
    """All formats, unless said otherwise."""
    return Limits(device_bytes=int(device_gb * GB), host_bytes=int(host_gb * GB), **({"formats": ("bf16", "fp8", "nf4")} | fixed))


def rates(bf16: float = 148, low: float = 279, forward: float = 145, backward: float = 120, bandwidth: float = 0.92, host: float = 25):
    """A card of 24 GB, in TFLOP/s, TB/s and GB/s."""
    return CardRates(
        bf16=bf16 * 1e12, low_bit=low * 1e12, attention_forward=forward * 1e12, attention_backward=backward * 1e12,
        bandwidth=bandwidth * 1e12, host_to_device=host * 1e9,
    )  # fmt: skip


def test_counts_are_those_of_the_real_block():
    """TFLOP of one block at 6144 video, 126 audio and 1024 text tokens, as counted by a dispatch mode (docs/development/benchmarks.md)."""
    assert linear_operations(LARGE, work()) / 1e12 == pytest.approx(3.439 - 0.031, rel=0.01)
    assert gradient_operations(LARGE, work()) / 1e12 == pytest.approx(3.384 - 0.062, rel=0.01)
    assert attention_operations(LARGE, work()) / 1e12 == pytest.approx(0.735, rel=0.002)


def test_two_clips_are_twice_one():
    single, double = work(1000, 50), work(2000, 100, clips=2)
    for count in (linear_operations, gradient_operations, attention_operations):
        assert count(LARGE, double) == pytest.approx(2 * count(LARGE, single))


def test_cards_that_share_their_streamed_blocks_do_with_half_of_the_host_memory_each():
    alone = choose_plan(LARGE, work(), rates(), limits(22, 18))
    apart = choose_plan(LARGE, work(), rates(), limits(22, 9))
    together = choose_plan(LARGE, work(), rates(), limits(22, 9, sharers=2))
    assert (together.streamed, together.levels) == (alone.streamed, alone.levels) and together.host_bytes == alone.host_bytes // 2
    assert apart.streamed < alone.streamed and apart.seconds > together.seconds


def test_each_recompute_level_keeps_less_and_takes_longer():
    seconds = [sum_of(block_seconds(LARGE, work(), rates(), level, weight_format="bf16", compiled=True)) for level in LEVELS]
    assert seconds == sorted(seconds) and [level.kept for level in LEVELS] == sorted((level.kept for level in LEVELS), reverse=True)
    assert floor_seconds(LARGE, work(), rates()) < 48 * seconds[0]


def sum_of(seconds) -> float:
    return seconds.forward + seconds.backward


def test_plans_stay_in_the_budget_and_get_better_with_more():
    shapes = (work(384, 0), work(14080, 126))
    for one in shapes:
        best = {}
        for device, host in itertools.product((8, 16, 24, 80), (8, 16, 48)):
            given = limits(device, host)
            plan = choose_plan(LARGE, one, rates(), given)
            best[device, host] = plan
            if plan is None:
                assert not fits(leanest_plan(LARGE, one, rates(), given), limits(device, 10_000)) or host < 48
            else:
                assert plan.device_bytes <= given.device_bytes and plan.host_bytes <= given.host_bytes
        for (device, host), plan in best.items():
            for (more_device, more_host), better in best.items():
                if plan is not None and more_device >= device and more_host >= host:
                    assert better is not None and better.score <= plan.score * 1.0002


def test_the_best_plan_is_the_best_of_all():
    given = limits(24, 16)
    chosen = choose_plan(LARGE, work(), rates(), given)
    others = [plan for plan in candidates(LARGE, work(), rates(), given) if fits(plan, given)]
    assert len(others) > 100 and chosen.score <= min(plan.score for plan in others) + 1e-4


def test_released_models_fit_the_cards_that_people_own():
    """768x512x49 with sound in 16 GB with 32 GB of host memory; 24 GB at 6k tokens without waiting for weights."""
    small = choose_plan(LARGE, work(2688, 51), rates(87, 166, 86, 72, 0.66), limits(15.5, 18))
    assert small is not None
    middle = choose_plan(LARGE, work(), rates(), limits(23.5, 18))
    assert middle is not None and middle.stalled < 0.15 * middle.seconds
    large = choose_plan(LARGE, work(), rates(711, 1066, 620, 515, 4.3, 50), limits(139, 100))
    assert large.weight_format == "bf16" and large.streamed == 0 and count_levels(large) == {"nothing": 48}


def test_plans_in_few_bits_need_three_graphs_at_most():
    """One for the ends in full precision, and two levels of the others; as many blocks are on either as without such ends."""
    alike = {(48,), *((count, 48 - count) for count in range(1, 48))}
    for weight_format, ends in (("bf16", 0), ("fp8", 2)):
        plans = list(candidates(LARGE, work(), rates(), limits(80, 48, formats=(weight_format,), streamed=0)))
        kinds = [{(level, ends <= place < 48 - ends) for place, level in enumerate(plan.levels)} for plan in plans]
        assert max(map(len, kinds)) == (3 if ends else 2)
        assert {tuple(count_levels(plan).values()) for plan in plans} == alike
        assert all(set(plan.levels) == {"everything"} for plan in plans if plan.inputs_on_host)


def test_what_is_fixed_is_kept_to():
    plan = choose_plan(LARGE, work(), rates(), limits(24, 48, formats=("fp8",), streamed=20, level="everything"))
    assert (plan.weight_format, plan.streamed, set(plan.levels)) == ("fp8", 20, {"everything"})
    assert plan.host_bytes >= 20 * LARGE.block_weights


def test_waiting_for_weights_is_counted():
    few = choose_plan(LARGE, work(64, 2), rates(), limits(139, 48, formats=("bf16",), streamed=48))
    assert few.stalled > 0.5 * few.seconds
    assert few.device_bytes < 48 * 2 * LARGE.block_weights
    assert SLOTS * 2 * LARGE.block_weights < few.device_bytes


def test_the_banner_says_what_is_recomputed_and_what_waits():
    def rows(batch: Workload, device_gb: int, **options: object) -> list[tuple[str, str]]:
        machine = Machine(device=torch.device("cpu"), device_bytes=device_gb * GB, host_bytes=110 * GB, rates=rates(), low_rates={})
        placed = place_by_plan(MemoryOptions(compile=True, weight_format="bf16", **options), machine, LARGE, batch, full_format="bf16")
        return describe_placement(placed, torch.bfloat16)

    roomy, long, stalled = rows(work(), 139), rows(work(30_000, 2), 22), rows(work(64, 2), 139, blocks_to_swap=48)
    assert ("recomputation", "none (48 blocks)") in roomy
    assert ("recomputation", "everything (48 blocks), block inputs on the host") in long
    assert any("of it waits for streamed weights, which a larger batch_size would hide" in text for _, text in stalled)
    assert not any("waits" in text for _, text in (*roomy, *long))


def test_block_inputs_do_not_wait_where_they_take_gradients():
    """In 22 GB nothing else fits."""
    machine = Machine(device=torch.device("cpu"), device_bytes=22 * GB, host_bytes=110 * GB, rates=rates(), low_rates={})
    given = (MemoryOptions(compile=True, weight_format="bf16"), machine, LARGE, work(30_000, 2))
    assert place_by_plan(*given, full_format="bf16").inputs_on_host
    with pytest.raises(UserError, match="no plan fits"):
        place_by_plan(*given, full_format="bf16", trains_outside_blocks=True)


def test_a_format_that_the_card_lacks_is_refused_and_a_slower_one_is_not_chosen():
    def machine(**low: float) -> Machine:
        return Machine(device=torch.device("cuda"), device_bytes=22 * GB, host_bytes=18 * GB, rates=rates(), low_rates=low)

    def chosen(found: Machine, wanted: str = "auto") -> str | None:
        options = MemoryOptions(compile=True, weight_format=wanted)
        return place_by_plan(options, found, LARGE, work(), full_format="bf16").weight_format

    assert chosen(machine(int8=250e12, fp8=270e12)) == "fp8" and chosen(machine(int8=280e12, fp8=270e12)) == "int8"
    assert chosen(machine(fp8=100e12)) != "fp8" and chosen(machine(fp8=100e12), "fp8") == "fp8"
    with pytest.raises(UserError, match="--weight_format fp8: this card .* does not multiply in fp8.* int8, nf4, bf16"):
        chosen(machine(int8=280e12), "fp8")


def held_beside_weights(plan) -> float:
    """Bytes that a plan of streaming nothing, in bf16, expects for a step."""
    return plan.device_bytes - 2 * LARGE.weights - work().trainable * (4 + work().optimizer_bytes)


def one_level(level: str, workload: Workload, **fixed: object):
    return next(candidates(LARGE, workload, rates(), limits(99, 99, formats=("bf16",), streamed=0, level=level, **fixed)))


def test_gradients_and_what_blocks_keep_are_not_both_whole_at_once():
    """Of a short clip the end of the backward pass is the largest moment, of a long one its beginning; gradients that wait are always
    there."""
    unit = unit_bytes(LARGE, work())
    gradients, text = 4 * work().trainable, text_bytes(LARGE, work())
    long = held_beside_weights(one_level("everything", work()))
    assert long == pytest.approx((48 + LEVELS[-1].in_flight) * unit + 2 * text, rel=0.01)
    waiting = held_beside_weights(one_level("everything", dataclasses.replace(work(), accumulates=True)))
    assert waiting == pytest.approx(long + gradients, rel=0.001)
    still = work(video_tokens=96, audio_tokens=0)
    assert held_beside_weights(one_level("everything", still)) == pytest.approx(gradients, rel=0.12)


def test_mixed_levels_take_what_their_largest_moment_takes():
    """The more blocks recompute everything, the less; but for the last few, as such a block takes the most in flight, and the
    gradients of the blocks behind it are there by then."""
    plans = {
        plan.levels.count("everything"): plan
        for plan in candidates(LARGE, work(), rates(), limits(99, 99, formats=("bf16",), streamed=0))
        if set(plan.levels) <= {"everything", "all_but_attention"} and not plan.inputs_on_host
    }
    sizes = [held_beside_weights(plans[count]) for count in sorted(plans)]
    smallest = sizes.index(min(sizes))
    assert 40 <= smallest < 48 and sizes[0] > 1.5 * sizes[-1]
    assert sizes[:smallest] == sorted(sizes[:smallest], reverse=True) and sizes[smallest:] == sorted(sizes[smallest:])


def test_block_inputs_on_the_host_leave_three_of_them():
    plans = list(candidates(LARGE, work(), rates(), limits(99, 99, formats=("bf16",), streamed=0, level="everything")))
    on_device, on_host = plans
    assert on_host.inputs_on_host and on_host.host_bytes == int(48 * unit_bytes(LARGE, work()))
    assert on_host.device_bytes < on_device.device_bytes


def test_what_adapters_take_in_flight_is_in_every_plan():
    given = limits(80, 48, streamed=10)
    plain, more = (list(candidates(LARGE, dataclasses.replace(work(), adapters_in_flight=extra), rates(), given)) for extra in (0.0, 1e9))
    assert {round((one.device_bytes - other.device_bytes) / 1e9, 2) for one, other in zip(more, plain, strict=True)} == {1.0}


def test_a_copy_of_the_trained_weights_is_in_every_plan():
    """Of the policy that made rollouts: 0.8 GiB at rank 32 on attention."""
    given, copied = limits(80, 48, streamed=10), dataclasses.replace(work(), copy_bytes=4.0)
    plain, more = (list(candidates(LARGE, batch, rates(), given)) for batch in (work(), copied))
    assert {round((one.device_bytes - other.device_bytes) / 2**30, 2) for one, other in zip(more, plain, strict=True)} == {0.8}


def test_a_plan_holds_every_batch_that_may_be_the_largest():
    """One clip, and 16 stills whose texts take more where their keys and values are kept."""
    clip, stills = work(2688, 51), work(16 * 64, 0, clips=16)
    given = limits(1000, 1000, streamed=0, formats=("bf16",))
    found = {}
    for name, one in (("clip", clip), ("stills", stills), ("both", dataclasses.replace(clip, others=(stills,)))):
        found[name] = list(candidates(LARGE, one, rates(), given))
    larger = set()
    for alone, other, both in zip(*found.values(), strict=True):
        assert both.device_bytes == max(alone.device_bytes, other.device_bytes) and both.host_bytes >= alone.host_bytes
        assert both.seconds == alone.seconds, "the first is the one that is timed"
        larger.add(alone.device_bytes < other.device_bytes)
    assert larger == {True, False}


@pytest.mark.parametrize(
    ("tokens", "level", "gigabytes"),
    [(2688, "everything", 3.17), (6144, "everything", 18.0), (14080, "everything", 98.7), (6144, "nothing", 11.8)],
)
def test_scores_of_attention_are_planned_for_where_its_kernel_keeps_them(tokens, level, gigabytes):
    """What a step took more on a simulated card, uncompiled: `python -m benchmarks.peaks --attention math --run eager`."""
    given = limits(1000, 1000, streamed=0, formats=("bf16",), level=level, compiled=False)
    usual = work(tokens, 51 if tokens < 3000 else 126)
    scored = dataclasses.replace(usual, scores_bytes=SCORE_BYTES)
    found = [next(iter(candidates(LARGE, one, rates(), given))) for one in (usual, scored)]
    assert found[1].device_bytes - found[0].device_bytes == pytest.approx(gigabytes * GB, rel=0.06, abs=1.1 * GB)


def test_of_equally_good_plans_the_one_without_inputs_on_the_host_is_chosen():
    """Copies that hide behind the computation cost nothing in the count; the room that they make is not needed."""
    fixed = limits(80, 48, level="everything", streamed=0, formats=("bf16",))
    on_device, on_host = candidates(LARGE, work(), rates(), fixed)
    assert on_host.inputs_on_host and on_host.score == on_device.score and on_host.device_bytes < on_device.device_bytes
    assert not choose_plan(LARGE, work(), rates(), fixed).inputs_on_host
    less = dataclasses.replace(fixed, device_bytes=on_device.device_bytes - 1)
    assert choose_plan(LARGE, work(), rates(), less).inputs_on_host, "where it is needed"


def test_where_no_plan_fits_the_cap_and_small_sizes_are_named():
    machine = Machine(device=torch.device("cuda"), device_bytes=2**20, host_bytes=0, rates=rates(), low_rates={})
    options = MemoryOptions(vram_gb=0.001, compile=False)
    with pytest.raises(UserError, match=r"1\.0 MiB by --vram_gb 0\.001 and 0\.0 GiB may .*in 1 clip.*larger --vram_gb"):
        place_by_plan(options, machine, LARGE, work(), full_format="bf16")


def whole(**changes: object) -> Workload:
    """A step that trains the model's own weights in bf16."""
    own = {"trainable": LARGE.weights, "optimizer_bytes": 2.0, "master_bytes": 0.0, "gradient_bytes": 2.0, "trains_model": True}
    return dataclasses.replace(work(), **(own | changes))


def test_full_finetuning_takes_weights_gradients_and_states_once():
    fixed = limits(10_000, 0, formats=("bf16",), streamed=0, level="everything")
    (plan,) = (plan for plan in candidates(LARGE, whole(), rates(), fixed) if not plan.inputs_on_host)
    least = LARGE.weights * (2 + 2 + 2)
    assert least < plan.device_bytes < least + 10 * GB
    (fused,) = (plan for plan in candidates(LARGE, whole(updates_within_backward=True), rates(), fixed) if not plan.inputs_on_host)
    less = plan.device_bytes - fused.device_bytes
    assert 0.85 < less / (LARGE.weights * 2) < 1, "all gradients but one block's; what a block takes in flight is there in their place"
    (half,) = (plan for plan in candidates(LARGE, whole(shards=2), rates(), fixed) if not plan.inputs_on_host)
    assert half.device_bytes - least / 2 < 10 * GB, "and two blocks that are gathered"


def in_blocks(**changes: object) -> Workload:
    """The same, updated within the backward pass, so that blocks may be streamed with their states."""
    inside = LARGE.block_weights
    return whole(**{"trained_in_blocks": 48 * inside, "trained_in_largest": inside, "updates_within_backward": True} | changes)


def test_trained_blocks_take_their_states_with_them():
    """To the host, but for those of two blocks that are on the card."""

    def plan(streamed: int, host_to_device: float = 50e9):
        fixed = limits(10_000, 10_000, formats=("bf16",), streamed=streamed, level="everything", inputs_may_wait=False)
        (found,) = candidates(LARGE, in_blocks(), dataclasses.replace(rates(), host_to_device=host_to_device), fixed)
        return found

    block = LARGE.block_weights * (2 + 2)
    assert plan(0).host_bytes == 0 and plan(24).host_bytes == 24 * block
    assert plan(0).device_bytes - plan(24).device_bytes == pytest.approx(22 * block, abs=2)
    fast, slow = plan(24), plan(24, 1e9)
    assert fast.stalled == 0
    forward = 22 * LARGE.block_weights * 2 / 1e9
    assert slow.stalled == pytest.approx(
        forward + max(forward + 24 * block / 2e9, 24 * block / 1e9) - (fast.seconds - fast.stalled), rel=1e-3
    )


def test_a_card_of_24_gb_trains_the_released_transformer_where_the_host_has_room():
    plan, ram = streamed_plan(RELEASED["19 B"], "RTX 4090", "AdamW8bit", "768x512x121")
    assert plan is not None and plan.streamed > 40 and ram == 96
    machine = Machine(device=torch.device("cuda"), device_bytes=22 * GB, host_bytes=40 * GB, rates=rates_of("RTX 4090"), low_rates={})
    options = MemoryOptions(compile=False, weight_format="bf16")
    with pytest.raises(
        UserError, match=r"48 blocks streamed.* takes \d+\.\d GiB on the device and 69\.1 GiB pinned on the host; .* 37\.3 GiB may"
    ):
        place_by_plan(options, machine, RELEASED["19 B"], in_blocks(), full_format="bf16", trains_outside_blocks=True)


def test_full_finetuning_multiplies_three_times_where_a_lora_does_twice():
    assert gradient_operations(LARGE, whole()) == 2 * linear_operations(LARGE, whole())
    assert floor_seconds(LARGE, whole(), rates()) > 1.3 * floor_seconds(LARGE, work(), rates())


def test_the_page_on_full_finetuning_has_the_numbers_of_the_planner():
    """`python -m benchmarks.plans full_finetune` prints them."""
    page = (REPOSITORY / "docs" / "how-to" / "full_finetuning.md").read_text(encoding="utf-8")
    assert full_table("768x512x121") in page and streamed_table("768x512x121") in page


def test_the_page_on_reinforcement_learning_has_the_numbers_of_the_planner():
    """`python -m benchmarks.plans rl` prints them."""
    page = (REPOSITORY / "docs" / "how-to" / "reinforcement_learning.md").read_text(encoding="utf-8")
    assert rl_table() in page


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("AdamW", {}), ("AdamW", {"amsgrad": "True"}), ("torch.optim.Adam", {"amsgrad": "True"}), ("SGD", {}), ("SGD", {"momentum": "0.0"}),
        ("SGD", {"momentum": "0.9"}), ("torch.optim.SGD", {"momentum": "0.9", "nesterov": "True"}), ("Lion", {}), ("Prodigy", {}),
        ("CAME", {}), ("AdamWScheduleFree", {}), ("AdamW8bit", {"min_8bit_size": "1"}), ("Lion8bit", {"min_8bit_size": "1"}),
    ],
)  # fmt: skip
def test_states_are_planned_as_the_optimizer_has_them(name, args):
    weight = torch.nn.Parameter(torch.randn(512, 512))
    weight.grad = torch.randn_like(weight)
    optimizer = make_optimizer(name, [weight], 1e-3, args)
    optimizer.step()
    held = sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)) / weight.numel()
    assert state_bytes(name, args, averaged=False) == pytest.approx(held, abs=0.1)
