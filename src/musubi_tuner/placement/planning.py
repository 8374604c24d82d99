"""From settings, the largest batch and the machine to how a model is held and run.

What a training step must find room for, on the device and on the host:

    device  |  weights that stay  |  slots  |  adapters  |  what blocks keep for backward  |  the block in flight  |  margin
            |  (resident blocks,  |  (two   |  gradients |  0 ........ block ........ 47   |
            |   all else)         | buffers)|  optimizer |  recompute level of each         |
                                      ^
    host    |  weights of the streamed blocks, pinned  |  block inputs, on the smallest cards  |  reserve for loaders and the system

Four choices trade this room for time, and none of them changes what is learned but for the rounding of quantization:

* The weight format. Fewer bits leave room and are multiplied faster where the card can, but round. The first and last blocks hurt most by
  it, so they stay unquantized, and so does all that is small or sensitive (gates, modulation, projections).
* Streamed blocks. A frozen weight is read twice a step and never written, so a block may wait in host memory and come into one of two
  slots while its predecessor computes. Copies cost nothing as long as they are shorter than the computation that they hide behind; what is
  longer stalls the step. A batch with more tokens computes longer on the same copies: that is what a larger batch_size buys. Processes on
  one machine may share the host memory of these weights ("sharers"), so that eight cards do not pin eight copies.
* The recompute level of each block (activation checkpointing, `memory.checkpointing.Recompute`). What a block does not keep for its
  backward pass is computed a second time. The first blocks recompute more, as what they keep would be kept longest.
* Block inputs on the host, the last resort, where every block recomputes everything and only its input is kept.

`memory.plan` enumerates the combinations and predicts bytes and seconds of each from `memory.step_model`. This file says what it may choose
among (`Limits`), and turns the numbers of its `Plan` into blocks (`Placement`). The prediction is not trusted: `placement.prove` runs two
steps of the largest batch, and has a new plan made for a smaller budget where they run out of memory.
"""

import ast
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.memory.card import COPIED, GIB, free_memory, measure_rates
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.compiling import obstacle_to_compiling
from musubi_tuner.memory.pinning import can_pin
from musubi_tuner.memory.plan import Limits, Plan, choose_plan, count_levels, leanest_plan
from musubi_tuner.memory.step_model import CardRates, ModelShape, Workload
from musubi_tuner.memory.streaming import spread
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

_UNQUANTIZED_AT_EACH_END = 2
_FEW_BLOCKS = 12
"""Models of fewer blocks than this are quantized in all of them."""

_WORTH_A_REMEDY = 0.05
"""Share of a step's time that waits for weights, above which the banner says what helps."""

_OPTIMIZER_BYTES = {
    "adamw8bit": 2.0, "pagedadamw8bit": 2.0, "adafactor": 0.1, "sgd": 0.0, "lion": 4.0, "lion8bit": 1.0, "prodigy": 16.0, "came": 4.1,
}  # fmt: skip
_ASKED_FOR = {("sgd", "momentum"), ("adam", "amsgrad"), ("adamw", "amsgrad")}
"""Arguments that, where they are not 0, add a float32 state to each weight."""
_USUAL_OPTIMIZER_BYTES = 8.0
_AVERAGE_BYTES = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTokens:
    """Tokens of the largest batch, all its clips together; the text's are of each clip."""

    video: int
    audio: int
    text: int
    clips: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is to plan with, read once."""

    device: torch.device
    device_bytes: int
    """May be used."""
    host_bytes: int
    """May be pinned by this process."""
    rates: CardRates
    low_rates: Mapping[str, float]
    """Operations per second of a whole linear in each low-bit format that the device multiplies in."""
    sharers: int = 1
    """Processes of this machine that share the host memory of streamed weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How the model is held and run."""

    weight_format: str | None
    """None: all weights in the compute dtype."""
    unquantized: frozenset[int]
    """Blocks that stay in the compute dtype where the others are in few bits."""
    streamed: tuple[int, ...]
    """Blocks whose weights wait in host memory."""
    levels: tuple[Recompute | None, ...]
    """Of each block; None keeps whatever autograd keeps."""
    inputs_on_host: bool
    compiled: bool
    sharers: int = 1
    """As `Machine.sharers`."""
    plan: Plan | None
    """The prediction; None where nothing was planned, on the CPU without a cap."""


def unquantized_blocks(blocks: int) -> frozenset[int]:
    """First and last blocks, whose quantization errors weigh most."""
    if blocks < _FEW_BLOCKS:
        return frozenset()
    return frozenset((*range(_UNQUANTIZED_AT_EACH_END), *range(blocks - _UNQUANTIZED_AT_EACH_END, blocks)))


def read_machine(device: torch.device, options: MemoryOptions, *, processes: int, sharers: int = 1) -> Machine | None:
    """None on a CPU whose memory is not capped: there is nothing to plan.

    Args:
        processes: on this machine; each has a part of its host memory.
        sharers: as `Machine.sharers`.
    """
    if device.type != "cuda" and options.vram_gb is None:
        return None
    pins = device.type != "cuda" or can_pin(COPIED)
    rates, low_rates = measure_rates(device, pins=pins)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what measuring took counts as free again
    device_bytes, host_bytes = free_memory(device, options.vram_gb, options.ram_gb)
    if not pins:
        log.warning(
            "WARNING: the system does not let %d MiB of host memory be pinned, so nothing is planned to wait there (on Linux 'ulimit -l' "
            "may be the limit, on Windows other programs that use the card)",
            COPIED >> 20,
        )
        host_bytes = 0
    return Machine(
        device=device, device_bytes=device_bytes, host_bytes=host_bytes // processes, rates=rates, low_rates=low_rates, sharers=sharers
    )


def state_bytes(optimizer_type: str, args: Mapping[str, str], *, averaged: bool) -> float:
    """Bytes beside its gradient of each trained weight, near enough to plan by: the optimizer's states, and a moving average of it.

    Args:
        args: of `--optimizer_args`, which the optimizer takes.
    """
    name = optimizer_type.lower().rpartition(".")[2]
    states = _OPTIMIZER_BYTES.get(name, _USUAL_OPTIMIZER_BYTES)
    states += 4.0 * sum((name, key) in _ASKED_FOR and bool(ast.literal_eval(value)) for key, value in args.items())
    return states + (_AVERAGE_BYTES if averaged else 0)


def place_by_hand(options: MemoryOptions, blocks: int, device: torch.device, *, sharers: int = 1) -> Placement:
    """What the flags say, and plain defaults for the rest."""
    weight_format = options.wanted_format if options.wanted_format not in ("auto", "bf16") else None
    unquantized = unquantized_blocks(blocks) if weight_format else frozenset()
    level = None if options.gradient_checkpointing is False else Recompute.EVERYTHING
    return Placement(
        weight_format=weight_format,
        unquantized=unquantized,
        streamed=streamed_blocks(blocks, unquantized, asked_for(options, blocks, unquantized) or 0),
        levels=(level,) * blocks,
        inputs_on_host=False,
        compiled=compiles(options, device),
        sharers=sharers,
        plan=None,
    )


def place_by_plan(
    options: MemoryOptions, machine: Machine, shape: ModelShape, work: Workload, *, full_format: str, trains_outside_blocks: bool = False
) -> Placement:
    """The best plan that fits.

    Args:
        full_format: `bf16` or `float32`, the compute dtype.
        trains_outside_blocks: so that what all blocks share (modulation, text) may take gradients.

    Raises:
        UserError: nothing fits (says what is missing and what would help), or a format that the device does not multiply in.
    """
    compiled = compiles(options, machine.device)
    formats, rates = formats_to_choose(options, machine, full_format)
    unquantized = unquantized_blocks(shape.blocks)
    limits = Limits(
        device_bytes=machine.device_bytes,
        host_bytes=machine.host_bytes,
        formats=formats,
        compute_bytes=4 if full_format == "float32" else 2,
        unquantized=len(unquantized),
        streamed=asked_for(options, shape.blocks, unquantized if formats != (full_format,) else frozenset()),
        level={None: None, True: Recompute.EVERYTHING.value, False: Recompute.NOTHING.value}[options.gradient_checkpointing],
        compiled=compiled,
        sharers=machine.sharers,
        inputs_may_wait=not trains_outside_blocks,
    )
    plan = choose_plan(shape, work, rates, limits)
    if plan is None:
        raise UserError(_nothing_fits(leanest_plan(shape, work, rates, limits), machine, work, options.vram_gb))
    full = plan.weight_format == full_format
    return Placement(
        weight_format=None if full else plan.weight_format,
        unquantized=frozenset() if full else unquantized,
        streamed=streamed_blocks(shape.blocks, frozenset() if full else unquantized, plan.streamed),
        levels=tuple(Recompute(name) for name in plan.levels),
        inputs_on_host=plan.inputs_on_host,
        compiled=compiled,
        sharers=machine.sharers,
        plan=plan,
    )


def formats_to_choose(options: MemoryOptions, machine: Machine, full_format: str) -> tuple[tuple[str, ...], CardRates]:
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
    """Whether blocks are compiled; warns where that is not possible and would have paid."""
    if options.compile is not None:
        return options.compile
    obstacle = obstacle_to_compiling(device)
    if obstacle is not None and device.type == "cuda":
        log.warning("WARNING: blocks run uncompiled, and a step takes about half as long again: %s", obstacle)
    return obstacle is None


def describe_weights(placement: Placement, dtype: torch.dtype) -> str:
    """In which format they are, and where."""
    blocks, full = len(placement.levels), str(dtype).removeprefix("torch.")
    weights = placement.weight_format or full
    if placement.unquantized:
        weights += f" ({len(placement.unquantized)} of {blocks} blocks in {full})"
    if placement.streamed:
        weights += f", {len(placement.streamed)} of {blocks} blocks streamed from host memory"
        weights += f" that {placement.sharers} processes share" if placement.sharers > 1 else ""
    return weights


def describe_placement(placement: Placement, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Rows for the banner."""
    full = str(dtype).removeprefix("torch.")
    names = {None: "none, left to autograd", Recompute.NOTHING: "none"}
    counts = {level: placement.levels.count(level) for level in placement.levels}
    recomputed = ", ".join(
        f"{names.get(level) or str(level).replace('_', ' ')} ({count} block{'s' if count > 1 else ''})" for level, count in counts.items()
    )
    rows = [
        ("weights", describe_weights(placement, dtype)),
        ("recomputation", recomputed + (", block inputs on the host" if placement.inputs_on_host else "")),
        ("blocks", "compiled" if placement.compiled else "not compiled"),
    ]
    if (plan := placement.plan) is None:
        return rows
    rows.append(("predicted", f"{plan.device_bytes / GIB:.2f} GiB on the device, {plan.host_bytes / GIB:.2f} GiB pinned on the host"))
    reached, stalled = plan.floor / plan.seconds, plan.stalled / plan.seconds
    rows.append(("", f"{plan.seconds:.3f} s for the largest batch; products and attention alone would take {reached:.0%} of it in {full}"))
    if stalled > _WORTH_A_REMEDY:
        rows.append(("", f"{stalled:.0%} of it waits for streamed weights, which a larger batch_size would hide"))
    return rows


def asked_for(options: MemoryOptions, blocks: int, unquantized: frozenset[int]) -> int | None:
    """`--blocks_to_swap`, no more than can be streamed: blocks that stay in full precision stay on the card too."""
    count, most = options.blocks_to_swap, blocks - len(unquantized)
    if count is not None and count > most:
        staying = f", of which {len(unquantized)} stay on the card in full precision" if unquantized else ""
        log.warning("WARNING: --blocks_to_swap %d: the model has %d blocks%s; %d are streamed", count, blocks, staying, most)
    return None if count is None else min(count, most)


def streamed_blocks(blocks: int, unquantized: frozenset[int], count: int) -> tuple[int, ...]:
    choice = [index for index in range(blocks) if index not in unquantized]
    return tuple(choice[place] for place in spread(len(choice), min(count, len(choice))))


def _nothing_fits(leanest: Plan, machine: Machine, work: Workload, vram_gb: float | None) -> str:
    recomputed = ", ".join(count_levels(leanest)).replace("_", " ")
    smaller = "" if work.trains_model else ", a smaller --network_dim, or AdamW8bit"
    capped = "" if vram_gb is None else f" by --vram_gb {vram_gb:g}"
    return (
        f"no plan fits: the leanest one ({leanest.weight_format}, {leanest.streamed} blocks streamed, recomputing {recomputed}) takes "
        f"{size_in_words(leanest.device_bytes)} on the device and {size_in_words(leanest.host_bytes)} pinned on the host; "
        f"{size_in_words(machine.device_bytes)}{capped} and {size_in_words(machine.host_bytes)} may be used. The largest batch has "
        f"{work.video_tokens} video tokens in {work.clips} clip(s): use a smaller resolution, fewer frames or batch_size 1 in the dataset "
        f"file{smaller}; close other programs that hold memory"
        f"{'' if vram_gb is None else ', or give a larger --vram_gb'}."
    )


def size_in_words(count: int) -> str:
    """Bytes as people read them: small ones in MiB."""
    return f"{count / GIB:.1f} GiB" if count == 0 or count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"
