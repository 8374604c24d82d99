"""What the planner would choose on cards that people own: `python -m benchmarks.plans`. Modelled from data sheets, not measured.

python -m benchmarks.plans 18                what a LoRA takes, with 18 GiB of host memory that may be pinned
python -m benchmarks.plans full_finetune     what --full_finetune takes at 19 and 22 billion weights: on one card, on several that
                                             share, and on one with blocks that wait in host memory
python -m benchmarks.plans rl                what a round of reinforcement learning takes: 64 samples of 384x256, 49 frames
"""

import dataclasses
import sys

import torch

from benchmarks.block_counts import SHAPES, TEXT_TOKENS
from musubi_tuner.memory.card import DEVICE_SHARE, GIB, HOST_RESERVE
from musubi_tuner.memory.plan import Limits, Plan, choose_plan, count_levels, leanest_plan
from musubi_tuner.memory.sampling_plan import SamplingPlan, SamplingWork, choose_sampling_plan, sampling_plans
from musubi_tuner.memory.step_model import CardRates, ModelShape, Workload
from musubi_tuner.placement.full_finetuning import bytes_of_an_update
from musubi_tuner.placement.planning import state_bytes
from musubi_tuner.reinforcement.objective import COPY_BYTES

MODEL = ModelShape(blocks=48, video_dim=4096, audio_dim=2048, block_weights=386_500_000, other_weights=430_000_000)
RANK_32_ATTENTION = 214_000_000

RELEASED = {"19 B": MODEL, "22 B": dataclasses.replace(MODEL, other_weights=MODEL.other_weights + 3_200_000_000)}
"""The transformer of each release, and with the text connectors (`--train_connectors`)."""
LARGEST_TENSOR, LARGEST_IN_BLOCK = 9 * 4096**2, 4 * 4096**2
OPTIMIZERS = (("AdamW", False), ("AdamW8bit", False), ("AdamW8bit", True), ("Adafactor", True))
"""With whether each weight is updated within the backward pass."""
STREAMING = ("RTX 4090", "RTX 5090", "H100 80G")
RAM = (32, 48, 64, 96, 128, 192, 256)
"""GB of host memory that machines have."""
SEVERAL = (("H100 80G", 1), ("H200", 1), ("H100 80G", 2), ("H200", 2), ("H100 80G", 8))

RL_CARDS, RL_HOST_GB = ("RTX 4090", "H100 80G"), 18.0
RL_SAMPLES, RL_STEPS, RL_LEVELS = 64, 8, 3
"""Of a round; steps of a sample, without guidance, as of a distilled model; noise levels at which it is learned."""
RL_TOKENS, RL_AUDIO_TOKENS = 7 * 8 * 12, 51
"""Of 384x256, 49 frames, at 24 a second."""

CARDS = {
    "H200": (139, 790, 1185, 620, 515, 4.3, 50, "fp8"),
    "H100 80G": (79, 740, 1110, 620, 515, 2.9, 50, "fp8"),
    "RTX 5090": (31.3, 209, 390, 180, 150, 1.6, 50, "fp8"),
    "RTX 4090": (23.5, 165, 310, 145, 120, 0.92, 25, "fp8"),
    "RTX 3090": (23.5, 71, 200, 62, 52, 0.85, 25, "int8"),
    "RTX 4080": (15.5, 97, 185, 86, 72, 0.66, 25, "fp8"),
}
"""GiB of memory; TFLOP/s in bf16, in few bits, of attention forward and backward; TB/s; GB/s from the host; the format of few bits.
Data sheets with float32 accumulation; attention and copies as published for the usual kernels."""


def rates(card: str) -> CardRates:
    """Products at 90 % of the data sheet."""
    _, bf16, low, forward, backward, bandwidth, host, _ = CARDS[card]
    return CardRates(
        bf16=0.9e12 * bf16, low_bit=0.9e12 * low, attention_forward=1e12 * forward, attention_backward=1e12 * backward,
        bandwidth=1e12 * bandwidth, host_to_device=1e9 * host,
    )  # fmt: skip


def plan_for(card: str, shape: str, *, host_gb: float) -> Plan | None:
    """A LoRA of rank 32 on attention with AdamW, batch 1, sound, compiled blocks."""
    frames, rows, columns, steps = SHAPES[shape]
    work = Workload(
        video_tokens=frames * rows * columns, audio_tokens=steps, text_tokens=TEXT_TOKENS, clips=1, trainable=RANK_32_ATTENTION,
        optimizer_bytes=8,
    )  # fmt: skip
    limits = Limits(
        device_bytes=int(DEVICE_SHARE * CARDS[card][0] * GIB), host_bytes=int(host_gb * GIB), formats=("bf16", CARDS[card][7], "nf4")
    )
    return choose_plan(MODEL, work, rates(card), limits)


def table(host_gb: float) -> str:
    """One row for each card and shape; `host_gb` may be pinned."""
    head = "| card | clip | weights | streamed | recomputed | GiB on the card | GiB pinned | s a step | of the floor |"
    lines = [head, "|---" * 9 + "|"]
    for card in CARDS:
        for shape in SHAPES:
            plan = plan_for(card, shape, host_gb=host_gb)
            if plan is None:
                lines.append(f"| {card} | {shape} | does not fit |" + " |" * 6)
                continue
            recomputed = ", ".join(f"{name.replace('_', ' ')} ({count})" for name, count in count_levels(plan).items())
            recomputed += ", inputs on the host" if plan.inputs_on_host else ""
            lines.append(
                f"| {card} | {shape} | {plan.weight_format} | {plan.streamed} of 48 | {recomputed} | {plan.device_bytes / GIB:.1f} | "
                f"{plan.host_bytes / GIB:.1f} | {plan.seconds:.2f} | {plan.floor / plan.seconds:.0%} |"
            )
    return "\n".join(lines)


def full_work(model: ModelShape, shards: int, optimizer: str, clip: str, *, within_backward: bool) -> Workload:
    """A step of `--full_finetune` in bf16, batch 1, with sound."""
    frames, rows, columns, steps = SHAPES[clip]
    return Workload(
        video_tokens=frames * rows * columns, audio_tokens=steps, text_tokens=TEXT_TOKENS, clips=1, trainable=model.weights,
        optimizer_bytes=state_bytes(optimizer, {}, averaged=False), master_bytes=0.0, gradient_bytes=2.0, trains_model=True,
        trained_in_blocks=model.blocks * model.block_weights, trained_in_largest=model.block_weights,
        updates_within_backward=within_backward, update_bytes=LARGEST_TENSOR * bytes_of_an_update(torch.bfloat16),
        update_in_block_bytes=LARGEST_IN_BLOCK * bytes_of_an_update(torch.bfloat16), shards=shards,
    )  # fmt: skip


def full_plan(model: ModelShape, card: str, shards: int, optimizer: str, clip: str, *, within_backward: bool) -> tuple[Plan, bool]:
    """Of `--full_finetune` with all of it on the cards, and whether it fits; the leanest plan where none does."""
    work = full_work(model, shards, optimizer, clip, within_backward=within_backward)
    limits = Limits(
        device_bytes=int(DEVICE_SHARE * CARDS[card][0] * GIB), host_bytes=0, formats=("bf16",), streamed=0, compiled=shards == 1,
        inputs_may_wait=False,
    )  # fmt: skip
    found = choose_plan(model, work, rates(card), limits)
    return (found, True) if found is not None else (leanest_plan(model, work, rates(card), limits), False)


def streamed_plan(model: ModelShape, card: str, optimizer: str, clip: str) -> tuple[Plan | None, int]:
    """The plan on one card whose blocks may wait in host memory, and the least RAM of a machine, in GB, in which one fits; that of the
    largest and None where none does."""
    work = full_work(model, 1, optimizer, clip, within_backward=True)
    for gigabytes in RAM:
        limits = Limits(
            device_bytes=int(DEVICE_SHARE * CARDS[card][0] * GIB), host_bytes=int(gigabytes * GIB) - HOST_RESERVE, formats=("bf16",),
            inputs_may_wait=False,
        )  # fmt: skip
        if plan := choose_plan(model, work, rates(card), limits):
            return plan, gigabytes
    return None, RAM[-1]


def full_table(clip: str) -> str:
    """One row for each model and way to update it, one column for each number of cards: GiB on each of them."""
    head = ["model", "optimizer", "weights", "gradients", "states", *(f"{count} x {card}" for card, count in SEVERAL)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, model in RELEASED.items():
        for optimizer, within in OPTIMIZERS:
            gradients = 2 * model.weights / (model.blocks if within else 1)
            sizes = (2 * model.weights, gradients, state_bytes(optimizer, {}, averaged=False) * model.weights)
            cells = [name, f"{optimizer}{', fused' * within}", *(f"{size / GIB:.1f}" for size in sizes)]
            for card, count in SEVERAL:
                if count > 1 and within:
                    cells.append("-")
                    continue
                plan, fits = full_plan(model, card, count, optimizer, clip, within_backward=within)
                cells.append(f"{plan.device_bytes / GIB:.0f}{'' if fits else ' (no)'}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def streamed_table(clip: str) -> str:
    """One row for each model, optimizer and card: what lies where, and what a step takes."""
    head = ("model", "optimizer, fused", "card", "blocks streamed", "GiB on the card", "GiB pinned", "RAM, GB", "s a step", "of it waiting")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, model in RELEASED.items():
        for optimizer in ("AdamW", "AdamW8bit", "Adafactor"):
            for card in STREAMING:
                plan, gigabytes = streamed_plan(model, card, optimizer, clip)
                if plan is None:
                    cells = ["does not fit", "", "", f"more than {gigabytes}", "", ""]
                else:
                    sizes = (f"{plan.device_bytes / GIB:.1f}", f"{plan.host_bytes / GIB:.1f}", str(gigabytes) if plan.streamed else "-")
                    cells = [f"{plan.streamed} of {model.blocks}", *sizes, f"{plan.seconds:.1f}", f"{plan.stalled / plan.seconds:.0%}"]
                lines.append(f"| {' | '.join((name, optimizer, card, *cells))} |")
    return "\n".join(lines)


def rl_plans(card: str) -> tuple[SamplingPlan, Plan, float]:
    """Of rollouts and of an update by NFT, and the seconds of the old policy's prediction, which a step of the update takes besides."""
    limits = Limits(
        device_bytes=int(DEVICE_SHARE * CARDS[card][0] * GIB), host_bytes=int(RL_HOST_GB * GIB), formats=("bf16", CARDS[card][7], "nf4")
    )
    sampled = SamplingWork(
        video_tokens=RL_TOKENS, audio_tokens=RL_AUDIO_TOKENS, text_tokens=TEXT_TOKENS, passes=1, networks_bytes=2 * RANK_32_ATTENTION
    )
    learned = Workload(
        video_tokens=RL_TOKENS, audio_tokens=RL_AUDIO_TOKENS, text_tokens=TEXT_TOKENS, clips=1, trainable=RANK_32_ATTENTION,
        optimizer_bytes=8, copy_bytes=COPY_BYTES,
    )  # fmt: skip
    rollouts = choose_sampling_plan(MODEL, sampled, rates(card), limits)
    update = choose_plan(MODEL, learned, rates(card), limits)
    assert rollouts is not None and update is not None, f"no plan fits {card}"
    held = dataclasses.replace(limits, formats=(update.weight_format,), streamed=update.streamed)
    without_gradients = next(iter(sampling_plans(MODEL, sampled, rates(card), held))).seconds
    return rollouts, update, without_gradients


def rl_table() -> str:
    """One row for each card and stage; decoding, rewards and the start of the programs are not in it."""
    head = "| card | stage | weights | streamed | GiB on the card | GiB pinned | s a step | steps | minutes |"
    lines = [head, "|---" * 9 + "|"]
    for card in RL_CARDS:
        rollouts, update, old = rl_plans(card)
        stages = (("rollouts", rollouts, rollouts.seconds, RL_STEPS), ("update", update, update.seconds + old, RL_LEVELS))
        for stage, plan, seconds, each in stages:
            steps = RL_SAMPLES * each
            lines.append(
                f"| {card} | {stage} | {plan.weight_format} | {plan.streamed} of 48 | {plan.device_bytes / GIB:.1f} | "
                f"{plan.host_bytes / GIB:.1f} | {seconds:.2f} | {steps} | {steps * seconds / 60:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["full_finetune"]:
        print(full_table("768x512x121"), streamed_table("768x512x121"), sep="\n\n")
    elif sys.argv[1:] == ["rl"]:
        print(rl_table())
    else:
        print(table(float(sys.argv[1]) if len(sys.argv) > 1 else 18.0))
