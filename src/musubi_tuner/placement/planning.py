"""From a run's settings, data and machine to how the model is held and run."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.dataset.items import Item
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.memory.card import GIB, free_memory, measure_rates
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.compiling import obstacle_to_compiling
from musubi_tuner.memory.plan import Budget, Plan, Wishes, choose_plan, count_rungs, leanest_plan
from musubi_tuner.memory.step_model import CardRates, ModelShape, Workload
from musubi_tuner.memory.streaming import spread
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

AUDIO_STEPS_PER_SECOND = 25
_KEPT_AT_EACH_END = 2
_FEW_BLOCKS = 12
"""Models of fewer blocks than this keep none of them out of quantization."""

_OPTIMIZER_BYTES = {"adamw8bit": 2.0, "pagedadamw8bit": 2.0, "adafactor": 0.1, "sgd": 0.0, "lion": 4.0, "prodigy": 16.0, "came": 4.1}
_USUAL_OPTIMIZER_BYTES = 8.0
AVERAGE_BYTES = 4.0
"""Of a moving average of the weights, for each of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is to plan with, read once."""

    device: torch.device
    budget: Budget
    rates: CardRates
    low_rates: Mapping[str, float]
    """Operations per second of a whole linear in each low-bit format that the device multiplies in."""
    sharers: int = 1
    """Processes that can have the streamed weights in common."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How the model is held and run."""

    weight_format: str | None
    """None: all weights in the compute dtype."""
    kept: frozenset[int]
    """Blocks that stay in the compute dtype where the others are in few bits."""
    streamed: tuple[int, ...]
    rungs: tuple[Recompute | None, ...]
    inputs_on_host: bool
    compiled: bool
    sharers: int = 1
    """Processes that have the streamed blocks in common."""
    plan: Plan | None
    """None where nothing was planned: on the CPU without a cap."""


def kept_blocks(blocks: int) -> frozenset[int]:
    """First and last blocks, whose quantization errors weigh most."""
    if blocks < _FEW_BLOCKS:
        return frozenset()
    return frozenset((*range(_KEPT_AT_EACH_END), *range(blocks - _KEPT_AT_EACH_END, blocks)))


def read_machine(device: torch.device, options: MemoryOptions, *, processes: int, sharers: int = 1) -> Machine | None:
    """None on a CPU whose memory is not capped: there is nothing to plan.

    Args:
        processes: on this machine; each has a part of its host memory.
        sharers: as `Machine.sharers`.
    """
    if device.type != "cuda" and options.vram_gb is None:
        return None
    rates, low_rates = measure_rates(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what measuring took counts as free again
    free = free_memory(device, options.vram_gb, options.ram_gb)
    budget = Budget(device=free.device, host=free.host // processes)
    return Machine(device=device, budget=budget, rates=rates, low_rates=low_rates, sharers=sharers)


def optimizer_bytes(name: str) -> float:
    """Of the optimizer's states for each trainable weight, near enough to plan by."""
    return _OPTIMIZER_BYTES.get(name.lower().rpartition(".")[2], _USUAL_OPTIMIZER_BYTES)


def token_counts(item: Item, mode: str) -> tuple[int, int]:
    """Video and audio tokens of a batch of items like this one."""
    clip, clips = item.clip, item.spec.batch_size
    video = 0 if mode == "audio" else ((clip.frames - 1) // 8 + 1) * (clip.height // 32) * (clip.width // 32)
    if video and (reference := clip.sidecars.get("reference")):
        video += ((reference.frames - 1) // 8 + 1) * (reference.height // 32) * (reference.width // 32)
    heard = mode != "video" and clip.has_audio
    audio = round((clip.end_seconds - clip.start_seconds) * AUDIO_STEPS_PER_SECOND) if heard else 0
    if "reference_audio" in clip.sidecars:
        audio *= 2  # it is as long as the clip at most
    return video * clips, audio * clips


def largest_item(items: Sequence[Item], mode: str) -> Item:
    """The item whose batch has the most tokens."""
    return max(items, key=lambda item: sum(token_counts(item, mode)))


def largest_workload(items: Sequence[Item], mode: str, *, text_tokens: int, trainable: int, state_bytes: float) -> Workload:
    """The batch with the most tokens; `state_bytes` are those kept for each trainable weight beside its gradient."""
    largest = largest_item(items, mode)
    video, audio = token_counts(largest, mode)
    return Workload(
        video_tokens=video,
        audio_tokens=audio,
        text_tokens=text_tokens,
        clips=largest.spec.batch_size,
        trainable=trainable,
        optimizer_bytes=state_bytes,
    )


def place_by_hand(options: MemoryOptions, blocks: int, device: torch.device, *, sharers: int = 1) -> Placement:
    """What the flags say, and plain defaults for the rest."""
    weight_format = options.wanted_format if options.wanted_format not in ("auto", "bf16") else None
    kept = kept_blocks(blocks) if weight_format else frozenset()
    rung = None if options.gradient_checkpointing is False else Recompute.EVERYTHING
    return Placement(
        weight_format=weight_format,
        kept=kept,
        streamed=_streamed(blocks, kept, _asked_for(options, blocks, kept) or 0),
        rungs=(rung,) * blocks,
        inputs_on_host=False,
        compiled=compiles(options, device),
        sharers=sharers,
        plan=None,
    )


def place_by_plan(
    options: MemoryOptions,
    machine: Machine,
    shape: ModelShape,
    work: Workload,
    *,
    full_format: str,
    factor: float = 1.0,
) -> Placement:
    """The best plan that fits.

    Args:
        full_format: `bf16` or `float32`, the compute dtype.
        factor: real bytes over predicted ones, where a trial has shown that they differ.

    Raises:
        UserError: nothing fits (says what is missing and what would help), or a format that the device does not multiply in.
    """
    compiled = compiles(options, machine.device)
    formats, rates = _formats(options, machine, full_format)
    kept = kept_blocks(shape.blocks)
    wishes = Wishes(
        formats=formats,
        compute_bytes=4 if full_format == "float32" else 2,
        kept_blocks=len(kept),
        streamed=_asked_for(options, shape.blocks, kept if formats != (full_format,) else frozenset()),
        rung={None: None, True: Recompute.EVERYTHING.value, False: Recompute.NOTHING.value}[options.gradient_checkpointing],
        compiled=compiled,
        sharers=machine.sharers,
    )
    budget = Budget(device=int(machine.budget.device / factor), host=machine.budget.host)
    plan = choose_plan(shape, work, rates, budget, wishes)
    if plan is None:
        raise UserError(_nothing_fits(leanest_plan(shape, work, rates, wishes), machine.budget, work))
    full = plan.weight_format == full_format
    return Placement(
        weight_format=None if full else plan.weight_format,
        kept=frozenset() if full else kept,
        streamed=_streamed(shape.blocks, frozenset() if full else kept, plan.streamed),
        rungs=tuple(Recompute(name) for name in plan.rungs),
        inputs_on_host=plan.inputs_on_host,
        compiled=compiled,
        sharers=machine.sharers,
        plan=plan,
    )


def _formats(options: MemoryOptions, machine: Machine, full_format: str) -> tuple[tuple[str, ...], CardRates]:
    """Formats to choose among, and the device's rates with that of the low-bit one among them."""
    wanted, low = options.wanted_format, machine.low_rates
    if wanted == "bf16":
        return (full_format,), machine.rates
    if wanted != "auto":
        if wanted in ("fp8", "int8") and wanted not in low and machine.device.type == "cuda":
            others = [name for name in ("fp8", "int8") if name in low]
            raise UserError(
                f"--weight_format {wanted}: this card with this build of torch does not multiply in {wanted}. Give no format (the plan "
                f"takes one that is faster here), or one of {', '.join((*others, 'nf4', 'bf16'))}."
            )
        return (wanted,), dataclasses.replace(machine.rates, low_bit=low.get(wanted, machine.rates.low_bit))
    fastest = max(low, key=low.__getitem__, default=None)
    if fastest is None or low[fastest] <= machine.rates.bf16:
        return (full_format, "nf4"), machine.rates
    return (full_format, fastest, "nf4"), dataclasses.replace(machine.rates, low_bit=low[fastest])


def compiles(options: MemoryOptions, device: torch.device) -> bool:
    """Whether blocks are compiled; says so where that is not possible and would have paid."""
    if options.compile is not None:
        return options.compile
    obstacle = obstacle_to_compiling(device)
    if obstacle is not None and device.type == "cuda":
        log.warning("WARNING: blocks run uncompiled, at less than half the speed: %s", obstacle)
    return obstacle is None


def model_shape(config: TransformerConfig, low_bit: int, total: int) -> ModelShape:
    """
    Args:
        low_bit: weights of the linears of all blocks that can be stored in few bits.
        total: weights of the whole model.
    """
    return ModelShape(
        blocks=config.num_layers,
        video_dim=config.video_dim,
        audio_dim=config.audio_dim,
        block_weights=low_bit // config.num_layers,
        other_weights=total - low_bit // config.num_layers * config.num_layers,
    )


def describe_placement(placement: Placement, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Rows for the banner."""
    blocks = len(placement.rungs)
    weights = placement.weight_format or str(dtype).removeprefix("torch.")
    if placement.kept:
        weights += f" ({len(placement.kept)} of {blocks} blocks in {str(dtype).removeprefix('torch.')})"
    streamed = f", {len(placement.streamed)} of {blocks} blocks streamed from host memory" if placement.streamed else ""
    if placement.streamed and placement.sharers > 1:
        streamed += f" that {placement.sharers} processes share"
    rows = [("weights", weights + streamed)]
    counts = {rung: placement.rungs.count(rung) for rung in placement.rungs}
    again = ", ".join(f"{(rung or 'nothing, all is kept').replace('_', ' ')} ({count})" for rung, count in counts.items())
    rows.append(("computed again", again + (", block inputs on the host" if placement.inputs_on_host else "")))
    rows.append(("blocks", "compiled" if placement.compiled else "not compiled"))
    plan = placement.plan
    if plan is not None:
        rows.append(("predicted", f"{plan.device_bytes / GIB:.2f} GiB on the device, {plan.host_bytes / GIB:.2f} GiB pinned on the host"))
        share, full = plan.floor / plan.seconds, str(dtype).removeprefix("torch.")
        rows.append(("", f"{plan.seconds:.3f} s for the largest batch: {share:.0%} of what this machine reaches at best in {full}"))
    return rows


def _asked_for(options: MemoryOptions, blocks: int, kept: frozenset[int]) -> int | None:
    """`--blocks_to_swap`, no more than can be streamed: blocks that stay in full precision stay on the card too."""
    count, most = options.blocks_to_swap, blocks - len(kept)
    if count is not None and count > most:
        staying = f", of which {len(kept)} stay on the card in full precision" if kept else ""
        log.warning("WARNING: --blocks_to_swap %d: the model has %d blocks%s; %d are streamed", count, blocks, staying, most)
    return None if count is None else min(count, most)


def _streamed(blocks: int, kept: frozenset[int], count: int) -> tuple[int, ...]:
    choice = [index for index in range(blocks) if index not in kept]
    return tuple(choice[place] for place in spread(len(choice), min(count, len(choice))))


def _nothing_fits(leanest: Plan, budget: Budget, work: Workload) -> str:
    rungs = ", ".join(count_rungs(leanest))
    return (
        f"no plan fits: the leanest one ({leanest.weight_format}, {leanest.streamed} blocks streamed, computing {rungs} again) takes "
        f"{leanest.device_bytes / GIB:.1f} GiB on the device and {leanest.host_bytes / GIB:.1f} GiB pinned on the host; "
        f"{budget.device / GIB:.1f} and {budget.host / GIB:.1f} GiB may be used. The largest batch has {work.video_tokens} video tokens: "
        "use a smaller resolution, fewer frames or batch_size 1 in the dataset file, a smaller --network_dim, or AdamW8bit; "
        "close other programs that hold memory."
    )
