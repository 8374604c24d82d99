"""Chooses how a model is held and run on a card: weight format, streamed blocks, recomputation, host memory. Plain numbers in and out."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from musubi_tuner.memory.step_model import (
    BYTES_PER_WEIGHT,
    RUNGS,
    TRANSIENT_UNITS,
    BlockSeconds,
    CardRates,
    ModelShape,
    Workload,
    block_seconds,
    floor_seconds,
    unit_bytes,
)

SLOTS = 2
ADAPTER_BYTES = 4 + 4 + 2
"""Of each trainable weight: float32 master, float32 gradient, and its copy in the compute dtype."""
WORSE = {"float32": 1.0, "bf16": 1.0, "int8": 1.3, "fp8": 1.3, "nf4": 1.7}
"""Fewer bits must pay: a plan is scored by its seconds times this, so bf16 is left only for what is faster by as much, or fits at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What may be used, in bytes."""

    device: int
    host: int
    """For pinned weights and activations, beside what the process and its loaders take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the user has fixed; None is for the planner to choose."""

    formats: tuple[str, ...]
    """Formats to choose among, in the compute dtype's name or fewer bits."""
    compute_bytes: int = 2
    """Of one weight that stays in the compute dtype."""
    kept_blocks: int = 4
    """First and last blocks that stay in the compute dtype where the others are in few bits."""
    streamed: int | None = None
    rung: str | None = None
    compiled: bool = True
    sharers: int = 1
    """Processes that have the streamed weights in common; a plan counts one's part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to hold and run the model."""

    weight_format: str
    streamed: int
    rungs: tuple[str, ...]
    """Of each block, from the first to the last."""
    inputs_on_host: bool
    """Block inputs that are kept wait in host memory; only where every block is on the last rung."""
    device_bytes: int
    """Predicted peak."""
    host_bytes: int
    seconds: float
    """Predicted, of one step of one batch."""
    stalled: float
    """Of these, waiting for weights."""
    floor: float
    """Seconds of this card without recomputation, traffic or waiting, in bf16."""

    @property
    def score(self) -> float:
        return self.seconds * WORSE[self.weight_format]


def choose_plan(shape: ModelShape, work: Workload, rates: CardRates, budget: Budget, wishes: Wishes) -> Plan | None:
    """The plan with the best score that stays in the budget; None where none does."""
    fitting = [plan for plan in candidates(shape, work, rates, wishes) if fits(plan, budget)]
    return min(fitting, key=lambda plan: (round(plan.score, 4), plan.streamed, plan.device_bytes), default=None)


def leanest_plan(shape: ModelShape, work: Workload, rates: CardRates, wishes: Wishes) -> Plan:
    """The plan that needs the least device memory, for the message that says what is missing."""
    return min(candidates(shape, work, rates, wishes), key=lambda plan: (plan.device_bytes, plan.host_bytes))


def fits(plan: Plan, budget: Budget) -> bool:
    return plan.device_bytes <= budget.device and plan.host_bytes <= budget.host


def candidates(shape: ModelShape, work: Workload, rates: CardRates, wishes: Wishes) -> Iterator[Plan]:
    """Every combination of format, number of streamed blocks, mixture of two neighboring rungs, and place of block inputs."""
    for weight_format in wishes.formats:
        seconds = {
            rung.name: block_seconds(shape, work, rates, rung, weight_format=weight_format, compiled=wishes.compiled) for rung in RUNGS
        }
        most = shape.blocks if weight_format in ("bf16", "float32") else shape.blocks - wishes.kept_blocks
        for streamed in [wishes.streamed] if wishes.streamed is not None else range(most + 1):
            for rungs in _mixtures(shape.blocks, wishes.rung):
                for inputs_on_host in (False, True) if rungs[0] == rungs[-1] == RUNGS[-1].name else (False,):
                    yield _plan(shape, work, rates, wishes, weight_format, streamed, rungs, inputs_on_host, seconds)


def _mixtures(blocks: int, fixed: str | None) -> Iterator[tuple[str, ...]]:
    """The first blocks recompute more: what they keep would be kept longest."""
    names = [rung.name for rung in RUNGS]
    if fixed is not None:
        yield (fixed,) * blocks
        return
    for less, more in itertools.pairwise(names):
        for count in range(blocks):
            yield (more,) * count + (less,) * (blocks - count)
    yield (names[-1],) * blocks


def _plan(
    shape: ModelShape,
    work: Workload,
    rates: CardRates,
    wishes: Wishes,
    weight_format: str,
    streamed: int,
    rungs: Sequence[str],
    inputs_on_host: bool,
    seconds: dict[str, BlockSeconds],
) -> Plan:
    low_block = shape.block_weights * BYTES_PER_WEIGHT[weight_format]
    kept = 0 if weight_format in ("bf16", "float32") else wishes.kept_blocks
    full_block = shape.block_weights * wishes.compute_bytes
    slots = min(SLOTS, streamed)
    device = shape.other_weights * wishes.compute_bytes + kept * full_block + (shape.blocks - kept - streamed + slots) * low_block
    device += work.trainable * (ADAPTER_BYTES + work.optimizer_bytes)
    unit = unit_bytes(shape, work)
    kept_units = {rung.name: rung.units for rung in RUNGS}
    stored = sum(kept_units[name] for name in rungs) * unit
    deepest = max(kept_units[name] if name != RUNGS[-1].name else RUNGS[0].units for name in rungs)
    host = streamed * low_block / wishes.sharers
    if inputs_on_host:
        host += stored
        stored = 2 * unit
    device += stored + (deepest + TRANSIENT_UNITS) * unit
    forward = sum(seconds[name].forward for name in rungs)
    backward = sum(seconds[name].backward for name in rungs)
    copied = max(0, streamed - SLOTS) * low_block / rates.host_to_device if streamed else 0.0
    fetched = len(rungs) * unit / rates.host_to_device if inputs_on_host else 0.0
    stalled = max(0.0, copied - forward) + max(0.0, copied + fetched - backward)
    if inputs_on_host:
        stalled += max(0.0, fetched - forward)
    return Plan(
        weight_format=weight_format,
        streamed=streamed,
        rungs=tuple(rungs),
        inputs_on_host=inputs_on_host,
        device_bytes=int(device),
        host_bytes=int(host),
        seconds=forward + backward + stalled,
        stalled=stalled,
        floor=floor_seconds(shape, work, rates),
    )


def count_rungs(plan: Plan) -> dict[str, int]:
    """{rung: blocks on it}, least recomputation first."""
    return {rung.name: plan.rungs.count(rung.name) for rung in RUNGS if rung.name in plan.rungs}
