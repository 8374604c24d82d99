"""How a model is held on a card while it samples: weight format and streamed blocks. Plain numbers in and out.

    device bytes    other weights + Q full blocks + (B - Q - S + slots) blocks in the weight format + networks beside the model
                    + what one block takes while it runs (`UNITS`) + the texts of the passes
                    + where weights are streamed, the states of the other passes, which wait before and behind the block (`WAITING`)
                    + where attention keeps its scores (`math`), those of the largest one (`SCORES`)

    seconds         passes * forward of the blocks, or the copies of the streamed ones where these take longer: a step copies them once,
                    as all its passes go through a block before the next one does

Units are those of memory/step_model.py, counted on a simulated card by `python -m benchmarks.sampling`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from musubi_tuner.memory.plan import SLOTS, WORSE, Limits
from musubi_tuner.memory.step_model import BYTES_PER_WEIGHT, LEVELS, CardRates, ModelShape, Workload, block_seconds, text_bytes, unit_bytes

UNITS, UNITS_COMPILED, UNITS_COMPILED_LOW_BIT = 16.4, 13.2, 14.5
"""Of a block that runs without gradients."""
INT8_UNITS = 4.5
"""More in int8, whose products have 32 bits."""
WAITING = 3.0
"""Units for each pass beside the one that runs: its states before the block and behind it, and what it reads besides."""
SCORES = 2.3
"""Tensors as large as the scores of the largest attention, where its kernel keeps them: the scores and their softmax, and what
they are made of in float32."""
_TEXT = 1.3
"""Keys and values of the text, over those of one block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingWork:
    """The largest sample."""

    video_tokens: int
    """With those of keyframes and references."""
    audio_tokens: int
    text_tokens: int
    passes: int
    """Of one step: the prompt's own, and one for each guidance that is on."""
    networks_bytes: int
    """Of the networks beside the model."""
    masked_tokens: int = 0
    """That attend under a mask of all their pairs, as a reference of some strength has it; 0 = without."""
    scores_bytes: int = 0
    """As of `Workload`."""

    @property
    def largest_scores(self) -> int:
        """Pairs of tokens in the largest attention."""
        longest = max(self.video_tokens, self.audio_tokens)
        return longest * max(longest, self.text_tokens)

    @property
    def as_workload(self) -> Workload:
        return Workload(
            video_tokens=self.video_tokens,
            audio_tokens=self.audio_tokens,
            text_tokens=self.text_tokens,
            clips=1,
            trainable=0,
            optimizer_bytes=0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingPlan:
    """One way to hold the model."""

    weight_format: str
    streamed: int
    device_bytes: int
    """Predicted peak."""
    host_bytes: int
    seconds: float
    """Of one step with all its passes."""
    stalled: float
    """Of these, waiting for streamed weights."""

    @property
    def score(self) -> float:
        return self.seconds * WORSE[self.weight_format]


def choose_sampling_plan(shape: ModelShape, work: SamplingWork, rates: CardRates, limits: Limits) -> SamplingPlan | None:
    """The plan with the best score that stays within the limits; None where none does."""
    fitting = [
        plan
        for plan in sampling_plans(shape, work, rates, limits)
        if plan.device_bytes <= limits.device_bytes and plan.host_bytes <= limits.host_bytes
    ]
    return min(fitting, key=lambda plan: (round(plan.score, 4), plan.streamed), default=None)


def sampling_plans(shape: ModelShape, work: SamplingWork, rates: CardRates, limits: Limits) -> Iterator[SamplingPlan]:
    """Every format with every number of streamed blocks."""
    workload = work.as_workload
    unit, text = (count * limits.compute_bytes / 2 for count in (unit_bytes(shape, workload), text_bytes(shape, workload)))
    for weight_format in limits.formats:
        full = weight_format in ("bf16", "float32")
        unquantized = 0 if full else limits.unquantized
        low_block = shape.block_weights * BYTES_PER_WEIGHT[weight_format]
        forward = block_seconds(shape, workload, rates, LEVELS[0], weight_format=weight_format, compiled=limits.compiled).forward
        computing = work.passes * shape.blocks * forward
        most = shape.blocks - unquantized
        for streamed in [min(limits.streamed, most)] if limits.streamed is not None else range(most + 1):
            slots = min(SLOTS, streamed)
            device = shape.other_weights * limits.compute_bytes + unquantized * shape.block_weights * limits.compute_bytes
            device += (shape.blocks - unquantized - streamed + slots) * low_block + work.networks_bytes
            device += limits.compute_bytes * work.masked_tokens**2
            device += (_units(weight_format, limits) + WAITING * (work.passes - 1) * bool(streamed)) * unit + _TEXT * text
            device += SCORES * work.scores_bytes * shape.heads * work.largest_scores
            device += work.passes * limits.compute_bytes * work.text_tokens * (shape.video_dim + shape.audio_dim)
            if weight_format == "nf4":
                device += 4.0 * shape.video_dim**2 * limits.compute_bytes  # a weight as it is multiplied by
            copying = max(0, streamed - slots) * low_block / rates.host_to_device
            yield SamplingPlan(
                weight_format=weight_format,
                streamed=streamed,
                device_bytes=int(device),
                host_bytes=int(streamed * low_block),
                seconds=max(computing, copying),
                stalled=max(0.0, copying - computing),
            )


def _units(weight_format: str, limits: Limits) -> float:
    low = weight_format in ("fp8", "int8")
    units = UNITS if not limits.compiled else UNITS_COMPILED_LOW_BIT if low else UNITS_COMPILED
    return units + INT8_UNITS * (weight_format == "int8")
