"""Memory of a training step against its plan, on a machine without a card: torch's own allocator works on the simulated one.

    python -m benchmarks.peaks                                    48 blocks: every level, compiled and not, bf16 and fp8, three lengths
    python -m benchmarks.peaks --formats nf4 --levels everything --run compiled
    python -m benchmarks.peaks --network lokr --run eager         other adapters; "eager" compiles small kernels neither, as without triton

Columns: what the planner says; the most that a step (forward, backward, clipping, AdamW) has allocated, weights included; and the smallest
limit of the allocator within which it still runs, which counts what lies unused between its pieces. It needs a CUDA build of torch
(benchmarks/simulated_card), and says so where there is none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.block_counts import RANK, SHAPES, TEXT_TOKENS, config_section
from benchmarks.simulated_card import Card, run_within
from musubi_tuner.runtime.allocator import GROWING, VARIABLE

if TYPE_CHECKING:
    from musubi_tuner.networks.lora_ltxv2 import LoRANetwork

BLOCKS = 48
LENGTHS = ("512x768x49", "768x512x121", "1280x704x121")
ON_HOST = "inputs_on_host"
LEVELS = ("nothing", "feed_forward", "all_but_attention", "everything", ON_HOST)
_CARD_GB = 320.0
_STEP = 0.01
"""By which the limit is lowered, of what is allocated."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to hold and run the blocks, all of them alike."""

    weight_format: str
    level: str
    compiled: bool
    network_type: str = "lora"
    keeps_scores: bool = False
    """Attention is run by products and a softmax."""

    @property
    def inputs_on_host(self) -> bool:
        return self.level == ON_HOST

    @property
    def recompute(self) -> str:
        return "everything" if self.inputs_on_host else self.level


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes."""

    planned: int
    allocated: int
    needed: int


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    if not Card.is_here():
        return run_within("benchmarks.peaks", argv, gigabytes=_CARD_GB, settings={VARIABLE: GROWING})
    Card()
    from musubi_tuner.memory.attention import use_attention

    use_attention((options.attention,) if options.attention else ("flash", "efficient"))  # the fastest of those that load here
    print("| weights | blocks | recompute | clip | planned GB | allocated | needed |\n|---|---|---|---|---|---|---|")
    for weight_format in options.formats:
        for run in options.run:
            for level in options.levels:
                variant = Variant(weight_format, level, run == "compiled", options.network, options.attention == "math")
                for shape, peak in measure(variant, options.shapes):
                    cells = (weight_format, run, level.replace("_", " "), shape, f"{peak.planned / 1e9:.2f}")
                    found = (f"{value / 1e9:.2f} ({value / peak.planned - 1:+.1%})" for value in (peak.allocated, peak.needed))
                    print(f"| {' | '.join((*cells, *found))} |", flush=True)
    return 0


def measure(variant: Variant, shapes: Sequence[str]) -> Iterator[tuple[str, Peak]]:
    """A model of 48 blocks, and its steps at these shapes."""
    import torch

    from benchmarks import step_models as models
    from musubi_tuner.ltxv2.transformer.config import TransformerConfig
    from musubi_tuner.memory import compiling
    from musubi_tuner.memory.checkpointing import Recompute

    torch._dynamo.reset()
    compiling.compiler_failure = lambda device: None if variant.compiled else "counted as where triton is missing"
    torch.cuda.set_per_process_memory_fraction(1.0)
    config = TransformerConfig.from_checkpoint_config(config_section(False, BLOCKS))
    device, dtype = torch.device("cuda"), torch.bfloat16
    weights, adapters = models.make_weights(config, device, dtype), models.make_adapters(config, RANK)
    low_bit = sum(value.numel() for name, value in weights.items() if models.in_few_bits(name, value))
    total = sum(value.numel() for value in weights.values())
    ours = models.ours(
        "ours", config, weights, adapters, level=Recompute(variant.recompute), compiled=variant.compiled,
        weight_format=None if variant.weight_format == "bf16" else variant.weight_format, inputs_on_host=variant.inputs_on_host,
        network_type=variant.network_type,
    )  # fmt: skip
    weights.clear()
    update = models.updater(ours)
    for shape in shapes:
        sample = models.make_sample(config, SHAPES[shape], TEXT_TOKENS, device, dtype)

        def step(sample: models.Sample = sample) -> None:
            ours.forward(sample).backward()
            update()

        planned = _planned(variant, shape, low_bit, total, ours.network)
        allocated, needed = _peaks(step)
        yield shape, Peak(planned, allocated, needed)


def _planned(variant: Variant, shape: str, low_bit: int, total: int, network: LoRANetwork | None) -> int:
    from benchmarks.plans import rates
    from benchmarks.step import model_and_work
    from musubi_tuner.memory.attention import SCORE_BYTES
    from musubi_tuner.memory.plan import Limits, candidates
    from musubi_tuner.placement.adapters import bytes_in_flight

    assert network is not None, "ours has one"
    usual, work = model_and_work(shape, BLOCKS)
    each = low_bit // BLOCKS
    model = type(usual)(
        blocks=BLOCKS, video_dim=usual.video_dim, audio_dim=usual.audio_dim, block_weights=each, other_weights=total - each * BLOCKS
    )
    work = type(work)(
        video_tokens=work.video_tokens, audio_tokens=work.audio_tokens, text_tokens=work.text_tokens, clips=1,
        trainable=sum(parameter.numel() for parameter in network.parameters()), optimizer_bytes=8,
        adapters_in_flight=bytes_in_flight(network, video_tokens=work.video_tokens, audio_tokens=work.audio_tokens, compute_bytes=2),
        scores_bytes=SCORE_BYTES if variant.keeps_scores else 0,
    )  # fmt: skip
    limits = Limits(
        device_bytes=2**60, host_bytes=2**60, formats=(variant.weight_format,), unquantized=0, streamed=0, level=variant.recompute,
        compiled=variant.compiled,
    )  # fmt: skip
    plans = candidates(model, work, rates("H100 80G"), limits)
    return next(plan.device_bytes for plan in plans if plan.inputs_on_host == variant.inputs_on_host)


def _peaks(step: Callable[[], None]) -> tuple[int, int]:
    """(allocated, needed) bytes of a step; the limit is lowered until a step fails."""
    import torch

    for _ in range(2):
        step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    needed = reserved
    whole = torch.cuda.get_device_properties(0).total_memory
    while needed > allocated:
        limit = needed - int(_STEP * allocated)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / whole)
        try:
            step()
        except torch.OutOfMemoryError:
            break
        needed = limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    return allocated, needed


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peaks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8"], choices=["bf16", "fp8", "int8", "nf4"], help="default: bf16 fp8")
    parser.add_argument("--shapes", nargs="+", default=list(LENGTHS), choices=list(SHAPES), help="default: %(default)s")
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS, help="default: all")
    parser.add_argument(
        "--run",
        nargs="+",
        default=["compiled", "eager"],
        choices=["compiled", "eager"],
        help="default: both; eager is without compiled small kernels too",
    )
    parser.add_argument("--network", default="lora", choices=["lora", "dora", "lokr", "loha"], help="type of adapter (default: lora)")
    parser.add_argument("--attention", choices=["flash", "efficient", "math"], help="its kernel (default: flash, or efficient for masks)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
