"""Chooses how a model is held and run on a card: weight format, streamed blocks, recompute levels, place of block inputs. Plain numbers in
and out, so that any card can be planned for on any machine.

The terms of a plan, for B blocks of which S are streamed through `slots` slots and Q are left unquantized (placement/planning.py draws
where they lie and says what each choice trades):

    device bytes    other weights + Q full blocks + (B - Q - S + slots) blocks in the weight format
                    + trainable weights * (master weight + copies + optimizer states)
                                                (where the model itself is trained no master, and the states of `slots` blocks in place
                                                 of those of S)
                    + the most that is held at any moment of the backward pass:
                          what the blocks that have not yet run backward keep, by their levels     (3 units where inputs are on the host)
                          + gradients of the others         (of all, where they accumulate; of one block, where they are used up at once)
                          + what the block in flight takes

    host bytes      S blocks in the weight format, divided by the processes that share them
                    + the optimizer states of S blocks, where they are trained
                    + what the blocks keep, where block inputs are on the host

    seconds         sum of forward + sum of backward of the blocks at their levels + stalls

    stalls          max(0, copies - forward) + max(0, copies - backward)

The backward pass runs from the last block to the first: what blocks keep shrinks, gradients grow, and where levels are mixed the first
blocks take more in flight and keep less. Each stretch of blocks of one level is largest at one of its ends, so these moments are looked at.

Stalls: (S - slots) blocks are copied in each direction, and block inputs once to the host and once back. Of trained blocks, S and their
states go back to the host in the backward pass, and their states come to the card in it; the bus carries both directions at once, and the
slower one counts. Copies run beside the computation of the whole direction, evenly spread over it, so only what they take longer is waited
for.

Units, the seconds of a block and the sources of all numbers are in memory/step_model.py. The whole space is enumerated: two neighboring
levels at most are mixed, which leaves about seven thousand plans for each weight format of 48 blocks. The prediction is verified by trial
steps (placement/prove.py), after which a plan that does not fit is made again for less.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from musubi_tuner.memory.step_model import (
    ATTENTION_KEPT,
    BYTES_PER_WEIGHT,
    INT8_IN_FLIGHT,
    LEVELS,
    BlockSeconds,
    CardRates,
    Level,
    ModelShape,
    Workload,
    block_seconds,
    floor_seconds,
    scores_in_flight,
    text_bytes,
    unit_bytes,
)

SLOTS = 2
_ON_THE_WAY = 3.0
"""Units on the device where block inputs wait on the host: those of a block, of the next one, and of one that is being copied."""
WORSE = {"float32": 1.0, "bf16": 1.0, "int8": 1.3, "fp8": 1.3, "nf4": 1.7}
"""Fewer bits must pay: a plan is scored by its seconds times this, so bf16 is left only for what is faster by as much, or fits at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a plan must keep to: the memory that it may take, and what is fixed; None is for the planner to choose."""

    device_bytes: int
    host_bytes: int
    """For pinned weights and activations, in addition to what the process and its loaders take."""
    formats: tuple[str, ...]
    """Formats to choose among, in the compute dtype's name or fewer bits."""
    compute_bytes: int = 2
    """Of one weight that stays in the compute dtype."""
    unquantized: int = 4
    """First and last blocks that stay in the compute dtype where the others are in few bits."""
    streamed: int | None = None
    level: str | None = None
    """Recompute level of all blocks."""
    compiled: bool = True
    sharers: int = 1
    """Processes that share the host memory of the streamed weights; a plan counts one's part."""
    inputs_may_wait: bool = True
    """Whether block inputs may be put on the host; not where what all blocks share takes gradients (memory/engine.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to hold and run the model."""

    weight_format: str
    streamed: int
    levels: tuple[str, ...]
    """Recompute level of each block, from the first to the last."""
    inputs_on_host: bool
    """Block inputs that are kept wait in host memory; only where every block recomputes everything."""
    device_bytes: int
    """Predicted peak."""
    host_bytes: int
    seconds: float
    """Predicted, of one step of one batch."""
    stalled: float
    """Of these, waiting for streamed weights or block inputs: what the copies take longer than the computation beside them."""
    floor: float
    """Seconds of this card without recomputation, traffic or waiting, in bf16."""

    @property
    def score(self) -> float:
        return self.seconds * WORSE[self.weight_format]


def choose_plan(shape: ModelShape, work: Workload, rates: CardRates, limits: Limits) -> Plan | None:
    """The plan with the best score that stays within the limits; None where none does. Of equally good ones, that which has least wait on
    the host: copies that a plan hides take the bus, and pinned memory, all the same."""
    fitting = [plan for plan in candidates(shape, work, rates, limits) if fits(plan, limits)]
    return min(fitting, key=lambda plan: (round(plan.score, 4), plan.streamed, plan.inputs_on_host, plan.device_bytes), default=None)


def leanest_plan(shape: ModelShape, work: Workload, rates: CardRates, limits: Limits) -> Plan:
    """The plan that needs the least device memory, for the message that says what is missing."""
    return min(candidates(shape, work, rates, limits), key=lambda plan: (plan.device_bytes, plan.host_bytes))


def fits(plan: Plan, limits: Limits) -> bool:
    return plan.device_bytes <= limits.device_bytes and plan.host_bytes <= limits.host_bytes


def candidates(shape: ModelShape, work: Workload, rates: CardRates, limits: Limits) -> Iterator[Plan]:
    """Every combination of format, number of streamed blocks, mixture of two neighboring recompute levels, and place of block inputs."""
    for weight_format in limits.formats:
        seconds = {
            level.name: block_seconds(shape, work, rates, level, weight_format=weight_format, compiled=limits.compiled) for level in LEVELS
        }
        most = shape.blocks if weight_format in ("bf16", "float32") else shape.blocks - limits.unquantized
        ways = [
            (levels, inputs_on_host, _most_held(shape, work, limits, weight_format, levels, inputs_on_host=inputs_on_host))
            for levels in _mixtures(shape.blocks, limits.level, unquantized=shape.blocks - most)
            for inputs_on_host in (False, True)
            if not inputs_on_host or (limits.inputs_may_wait and set(levels) == {LEVELS[-1].name})
        ]
        for streamed in [limits.streamed] if limits.streamed is not None else range(most + 1):
            for levels, inputs_on_host, held in ways:
                yield _plan(shape, work, rates, limits, weight_format, streamed, levels, inputs_on_host, held, seconds)


def _mixtures(blocks: int, fixed: str | None, *, unquantized: int) -> Iterator[tuple[str, ...]]:
    """The first blocks recompute more: what they keep would be kept longest. First and last ones that stay unquantized are all on one of
    the two levels, as each level of each format is a graph to compile."""
    names = [level.name for level in LEVELS]
    if fixed is not None:
        yield (fixed,) * blocks
        return
    first = unquantized // 2
    last, inner = unquantized - first, blocks - unquantized
    for less, more in itertools.pairwise(names):
        for count in range(blocks):
            ends = more if count > inner else less
            within = count - unquantized if ends == more else count
            yield (ends,) * first + (more,) * within + (less,) * (inner - within) + (ends,) * last
    yield (names[-1],) * blocks


def _plan(
    shape: ModelShape,
    work: Workload,
    rates: CardRates,
    limits: Limits,
    weight_format: str,
    streamed: int,
    levels: Sequence[str],
    inputs_on_host: bool,
    held: float,
    seconds: dict[str, BlockSeconds],
) -> Plan:
    low_block = shape.block_weights * BYTES_PER_WEIGHT[weight_format]
    unquantized = 0 if weight_format in ("bf16", "float32") else limits.unquantized
    full_block = shape.block_weights * limits.compute_bytes
    slots = min(SLOTS, streamed)
    device = (
        shape.other_weights * limits.compute_bytes + unquantized * full_block + (shape.blocks - unquantized - streamed + slots) * low_block
    )
    if work.shards > 1:
        device = device / work.shards + SLOTS * full_block + shape.other_weights * limits.compute_bytes
    device += work.trainable * (work.master_bytes + work.copy_bytes) / work.shards
    states, states_on_host = state_bytes_of(shape, work, streamed)
    device += states
    unit = unit_bytes(shape, work) * limits.compute_bytes / 2
    host = streamed * low_block / limits.sharers + states_on_host
    if inputs_on_host:
        host += len(levels) * max(unit_bytes(shape, one) for one in (work, *work.others)) * limits.compute_bytes / 2
    device += held
    forward = sum(seconds[name].forward for name in levels)
    backward = sum(seconds[name].backward for name in levels)
    copied = max(0, streamed - SLOTS) * low_block / rates.host_to_device if streamed else 0.0
    fetched = len(levels) * unit / rates.host_to_device if inputs_on_host else 0.0
    back = (streamed * low_block + states_on_host) / rates.host_to_device if work.trained_in_blocks else 0.0
    to_card = copied + fetched + states_on_host / rates.host_to_device
    stalled = max(0.0, copied - forward) + max(0.0, max(to_card, back) - backward)
    if inputs_on_host:
        stalled += max(0.0, fetched - forward)
    return Plan(
        weight_format=weight_format,
        streamed=streamed,
        levels=tuple(levels),
        inputs_on_host=inputs_on_host,
        device_bytes=int(device),
        host_bytes=int(host),
        seconds=forward + backward + stalled,
        stalled=stalled,
        floor=floor_seconds(shape, work, rates),
    )


def state_bytes_of(shape: ModelShape, work: Workload, streamed: int) -> tuple[float, float]:
    """Bytes of the optimizer's states, (on the device, on the host), where so many blocks are streamed, evenly spread."""
    on_host = work.optimizer_bytes * work.trained_in_blocks * streamed / shape.blocks
    in_slots = work.optimizer_bytes * work.trained_in_largest * min(SLOTS, streamed)
    return work.optimizer_bytes * work.trainable / work.shards - on_host + in_slots, on_host


def _most_held(
    shape: ModelShape, work: Workload, limits: Limits, weight_format: str, levels: Sequence[str], *, inputs_on_host: bool
) -> float:
    """Of the largest batch, or of another one that takes more on these levels."""
    batches = (work, *work.others)
    return max(_held(shape, batch, limits, weight_format, levels, inputs_on_host=inputs_on_host) for batch in batches)


def _held(shape: ModelShape, work: Workload, limits: Limits, weight_format: str, levels: Sequence[str], *, inputs_on_host: bool) -> float:
    """The most bytes at any moment of a step, beside weights and optimizer states."""
    unit, text = (bytes_ * limits.compute_bytes / 2 for bytes_ in (unit_bytes(shape, work), text_bytes(shape, work)))
    low_bit = weight_format in ("fp8", "int8")
    gradients, scores = work.gradient_bytes * work.trainable, scores_in_flight(shape, work)
    if work.updates_within_backward:
        gradients /= len(levels)
    elif work.shards > 1:
        gradients = gradients / work.shards + SLOTS * gradients / len(levels)
    within = work.update_in_block_bytes * work.updates_within_backward
    transient = 4.0 * shape.video_dim**2 * limits.compute_bytes if weight_format == "nf4" else 0.0  # a weight as it is multiplied by

    def kept(level: Level) -> float:
        units = level.kept if limits.compiled else level.kept_eager
        if work.scores_bytes and not level.attention_recomputed:
            units -= ATTENTION_KEPT
        return units * unit + level.keeps_text * text

    def in_flight(level: Level) -> float:
        units = level.in_flight_eager
        if limits.compiled:
            units = level.in_flight_low_bit if low_bit else level.in_flight
        units += INT8_IN_FLIGHT * (weight_format == "int8")
        return max(units * unit, scores) + (2 - level.keeps_text) * text + transient + work.adapters_in_flight + within

    if inputs_on_host:
        inner = LEVELS[0] if limits.compiled else LEVELS[-1]  # how a block runs when its states are back
        states = kept(inner) if limits.compiled else 0.0
        return _ON_THE_WAY * unit + states + in_flight(inner) + gradients  # no block is larger than the first, the last to run
    most, stored, done = gradients + work.update_bytes, 0.0, 0
    by_name = {level.name: level for level in LEVELS}
    for name, group in itertools.groupby(levels):
        count, level = len(list(group)), by_name[name]
        for place in (1, count):
            behind = 1.0 if work.accumulates or work.updates_within_backward else (len(levels) - done - place) / len(levels)
            most = max(most, stored + place * kept(level) + gradients * behind + in_flight(level))
        stored, done = stored + count * kept(level), done + count
    return most


def count_levels(plan: Plan) -> dict[str, int]:
    """{recompute level: blocks on it}, least recomputation first."""
    return {level.name: plan.levels.count(level.name) for level in LEVELS if level.name in plan.levels}
