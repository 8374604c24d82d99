"""Operations, bytes and seconds of one training step, from plain numbers: what the planner decides by and the benchmark compares with.

    forward of a block     linears / rate + attention / rate + adapters + TRAFFIC_FORWARD units / bandwidth
    backward of a block    input gradients / rate + 2.5 attention / rate + 2 adapters + TRAFFIC_BACKWARD units / bandwidth
                           + what its level recomputes

The backward pass of frozen linears costs as much as their forward pass, not twice as much, as weights need no gradients. Traffic is what
the operations between the large products read and write; it takes time of its own, because nothing is computed meanwhile.

A unit is one bf16 tensor (B, N, D) of both streams' states: tokens * width * 2 bytes. Memory and traffic of everything that is as long as
the clip are multiples of it, so one count holds for all sizes and widths.

Where the numbers come from:

* Operations: from the widths of the linears (docs/explanation/model.md, "Blocks"), checked in
  tests/unit/test_memory_plan.py.
* Units kept and in flight at each level: what torch's allocator gives to a step of real-size blocks of 2.3 on a simulated card
  (benchmarks/peaks.py, docs/development/benchmarks.md). What is kept is counted a second time on the compiled graphs without running them
  (benchmarks/block_counts.py); tests/unit/test_block_budgets.py fails where the block departs from them.
* Traffic: an estimate. REACHED: an H200 at 768x512x121 (2026-11-26). Eight blocks take 158 ms there in bf16 and 138 in fp8, forward and
  backward; the model says 153 and 140.
* Rates of the card: measured when a run starts, in a quarter of a second (memory/card.py).
"""

from dataclasses import dataclass

ATTENTION_BACKWARD = 2.5
"""Floating point operations of attention's backward pass over those of its forward pass: scores are recomputed."""

_NF4_BYTES = 0.5 + 2 / 64
BYTES_PER_WEIGHT = {"float32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "nf4": _NF4_BYTES}

TRAFFIC_FORWARD, TRAFFIC_BACKWARD = 94.0, 103.0
"""Units that a compiled block moves outside of its large products and attention: 34 and 98 by compiled kernels (benchmarks/launches.py),
the rest by LoRA's thin products, which take their time from memory too. Fitted to an H200."""
REACHED = 0.5
"""Share of a copy's rate at which they are moved, gaps between small kernels included."""
TRAFFIC_EAGER = 2.6
"""How many times more a block moves that is not compiled."""
TRAFFIC_QUANTIZED = 8.0
"""Units more in each direction where activations are quantized."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """What one recompute level (memory/checkpointing.py) keeps, takes in flight and costs."""

    name: str
    kept: float
    """Units for each block, its input included, where blocks are compiled."""
    kept_eager: float
    """The same where they are not."""
    keeps_text: bool
    """Whether keys and values of the text are kept besides."""
    in_flight: float
    """Units beside all that is kept, while one block runs backward: what it recomputes, and what lies between its operations."""
    in_flight_low_bit: float
    """The same in fp8 and int8."""
    in_flight_eager: float
    linears_recomputed: float
    """Share of the forward pass's frozen products that is recomputed."""
    attention_recomputed: bool


LEVELS = (
    Level(
        name="nothing", kept=16.2, kept_eager=17.2, keeps_text=True, in_flight=9.6, in_flight_low_bit=10.6, in_flight_eager=23.0,
        linears_recomputed=0.0, attention_recomputed=False,
    ),
    Level(
        name="feed_forward", kept=12.2, kept_eager=13.2, keeps_text=True, in_flight=14.0, in_flight_low_bit=15.6, in_flight_eager=27.0,
        linears_recomputed=0.25, attention_recomputed=False,
    ),
    Level(
        name="all_but_attention", kept=3.6, kept_eager=3.6, keeps_text=False, in_flight=26.6, in_flight_low_bit=31.6, in_flight_eager=36.6,
        linears_recomputed=0.75, attention_recomputed=False,
    ),
    Level(
        name="everything", kept=1.0, kept_eager=1.0, keeps_text=False, in_flight=38.2, in_flight_low_bit=40.8, in_flight_eager=39.2,
        linears_recomputed=0.75, attention_recomputed=True,
    ),
)  # fmt: skip
"""The feed-forward's second product is in none: nobody needs its output."""
INT8_IN_FLIGHT = 6.5
"""Units more in int8, compiled or not: its products have 32 bits."""


ATTENTION_KEPT = 2.6
"""Units among those kept on all levels but the last that are outputs of attention. A kernel that keeps its scores is made of products, so
the levels see no attention and keep none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A transformer's sizes."""

    blocks: int
    video_dim: int
    audio_dim: int
    block_weights: int
    """Weights of the large linears of one block, which can be stored in few bits."""
    other_weights: int
    """All the rest, which stays in the compute dtype."""
    heads: int = 32
    """Of attention, in both streams."""

    @property
    def weights(self) -> int:
        return self.blocks * self.block_weights + self.other_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One step's sizes; tokens are those of the whole batch of clips."""

    video_tokens: int
    audio_tokens: int
    text_tokens: int
    clips: int
    trainable: int
    optimizer_bytes: float
    """Of the optimizer's states, for each trainable weight."""
    master_bytes: float = 4.0
    """Of each trainable weight beside the model's own; 0 where these are what is trained."""
    copy_bytes: float = 0.0
    """Of each trainable weight: a copy that stays as it was, such as the policy that made rollouts."""
    gradient_bytes: float = 4.0
    """Of each trainable weight."""
    trains_model: bool = False
    """The model's own weights are trained, so its linears have gradients of their weights too."""
    trained_in_blocks: int = 0
    """Of the model's own trained weights, those in its blocks, whose states are streamed with them (training/streamed_states.py)."""
    trained_in_largest: int = 0
    """Of these, in the block that has most."""
    updates_within_backward: bool = False
    """Gradients are used up as soon as they are complete: those of one block are there at a time."""
    update_bytes: float = 0.0
    """What the update of the largest tensor takes while it is made."""
    update_in_block_bytes: float = 0.0
    """The same of the largest tensor of a block, which is updated beside what blocks keep where `updates_within_backward`."""
    accumulates: bool = False
    """Whether gradients of earlier batches wait while a batch is computed."""
    adapters_in_flight: float = 0.0
    """Bytes that the adapters of one block take while it runs backward, beside what those of a LoRA do (placement/adapters.py)."""
    scores_bytes: int = 0
    """Of one score of attention, where its kernel keeps them (`math`); 0 = it keeps none."""
    shards: int = 1
    """Processes that hold a part each of weights, gradients and states; each gathers two blocks, and what lies outside of them."""
    others: tuple["Workload", ...] = ()
    """Other batches of the run that may take more memory; a plan holds all of them."""


def linear_operations(shape: ModelShape, work: Workload) -> float:
    """Of one block's frozen linears in the forward pass (docs/explanation/model.md, "Blocks", for the widths)."""
    d, a = shape.video_dim, shape.audio_dim
    video = (14 * d * d + 4 * d * a) * work.video_tokens
    audio = (14 * a * a + 4 * a * a) * work.audio_tokens
    text = (2 * d * d + 2 * a * a) * work.text_tokens * work.clips
    return 2.0 * (video + audio + text)


def gradient_operations(shape: ModelShape, work: Workload) -> float:
    """Of one block's linears in the backward pass: gradients of inputs alone, and none of the text, where they are frozen."""
    if work.trains_model:
        return 2 * linear_operations(shape, work)
    text = 2.0 * (2 * shape.video_dim**2 + 2 * shape.audio_dim**2) * work.text_tokens * work.clips
    return linear_operations(shape, work) - text


def attention_operations(shape: ModelShape, work: Workload) -> float:
    """Of one block's attention in the forward pass, each clip by itself."""
    v, a, t = work.video_tokens / work.clips, work.audio_tokens / work.clips, work.text_tokens
    video = 4 * v * (v + t) * shape.video_dim
    audio = 4 * (a * a + a * t + 2 * v * a) * shape.audio_dim
    return work.clips * (video + audio)


def scores_in_flight(shape: ModelShape, work: Workload) -> float:
    """Bytes that attention takes for its scores while one block runs backward: the weights of all its attentions, which are recomputed
    together, and three tensors as large as those of the largest one."""
    v, a, t = work.video_tokens / work.clips, work.audio_tokens / work.clips, work.text_tokens
    of_each = (v * v, v * t, a * a, a * t, v * a, v * a)
    return work.scores_bytes * shape.heads * work.clips * (sum(of_each) + 3 * max(of_each))


def adapter_operations(shape: ModelShape, work: Workload) -> float:
    """Of one block's adapters, forward and backward."""
    if work.trains_model:
        return 0.0
    tokens = (work.video_tokens + work.audio_tokens) / 2
    return 3 * 2.0 * work.trainable / shape.blocks * tokens


def text_bytes(shape: ModelShape, work: Workload) -> float:
    """Keys and values of the text in one block."""
    return 2.0 * 2 * (shape.video_dim + shape.audio_dim) * work.text_tokens * work.clips


def unit_bytes(shape: ModelShape, work: Workload) -> float:
    return 2.0 * (work.video_tokens * shape.video_dim + work.audio_tokens * shape.audio_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class CardRates:
    """What a card reaches, measured or assumed: operations and bytes a second."""

    bf16: float
    low_bit: float
    """fp8 or int8 linears, conversion of their inputs and gradients included; that of bf16 where the card has neither."""
    attention_forward: float
    attention_backward: float
    bandwidth: float
    host_to_device: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSeconds:
    """One block's time in each direction."""

    forward: float
    backward: float


def block_seconds(shape: ModelShape, work: Workload, rates: CardRates, level: Level, *, weight_format: str, compiled: bool) -> BlockSeconds:
    """Products, attention and traffic one after the other."""
    low = weight_format in ("fp8", "int8")
    rate = rates.low_bit if low else rates.bf16
    linear, gradient, attention = linear_operations(shape, work), gradient_operations(shape, work), attention_operations(shape, work)
    adapters = adapter_operations(shape, work) / 3 / rates.bf16
    traffic = unit_bytes(shape, work) / (REACHED * rates.bandwidth) * (1.0 if compiled else TRAFFIC_EAGER)
    quantizing = TRAFFIC_QUANTIZED * traffic if low else 0.0
    unpacking = shape.block_weights * (BYTES_PER_WEIGHT["nf4"] + 2 * 2) / rates.bandwidth if weight_format == "nf4" else 0.0
    forward = linear / rate + attention / rates.attention_forward + adapters + TRAFFIC_FORWARD * traffic + quantizing + unpacking
    backward = gradient / rate + ATTENTION_BACKWARD * attention / rates.attention_backward + 2 * adapters
    backward += TRAFFIC_BACKWARD * traffic + quantizing + unpacking + level.linears_recomputed * linear / rate
    if level.attention_recomputed:
        backward += attention / rates.attention_forward + TRAFFIC_FORWARD * traffic
    return BlockSeconds(forward=forward, backward=backward)


def floor_seconds(shape: ModelShape, work: Workload, rates: CardRates) -> float:
    """No recomputation, no traffic: products and attention at the card's bf16 rates."""
    attention = attention_operations(shape, work)
    products = linear_operations(shape, work) + gradient_operations(shape, work) + adapter_operations(shape, work)
    return shape.blocks * (
        products / rates.bf16 + attention / rates.attention_forward + ATTENTION_BACKWARD * attention / rates.attention_backward
    )
