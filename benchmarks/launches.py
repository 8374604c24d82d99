"""Counts what a training step launches on a card, on a machine without one: launches of one block by kind, and what its
compiled kernels move. The host's time is counted by `python -m benchmarks.step --simulated`.

    python -m benchmarks.launches                           bf16 and fp8 at 768x512x121, rank 32 on attention, nothing recomputed
    python -m benchmarks.launches --formats int8 nf4 --level everything

It needs a CUDA build of torch, and says so where there is none (benchmarks/simulated_card). One block is a quarter of six blocks less two.
Moved: bytes that the kernels that are neither product nor attention read and write, as torch's compiler counts them, in units
(memory/step_model.py).
"""

import argparse
import collections
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.simulated_card import Card, run_within

_FEW, _MANY = 2, 6
KINDS = ("product", "attention", "compiled", "other kernel", "copy", "fill")


@dataclass(frozen=True, slots=True)
class Launches:
    """Of one block."""

    forward: collections.Counter[str]
    backward: collections.Counter[str]
    moved_units: float
    """Read and written by compiled kernels."""

    @property
    def total(self) -> int:
        return self.forward.total() + self.backward.total()


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    if not Card.is_here():
        return run_within("benchmarks.launches", argv)
    card = Card()
    print("| weights | direction | " + " | ".join(KINDS) + " | in all | moved units |")
    print("|---" * (len(KINDS) + 4) + "|")
    for weight_format in options.formats:
        found = count(card, weight_format, options.shape, options.level)
        for direction, counter in (("forward", found.forward), ("backward", found.backward)):
            cells = " | ".join(str(counter[kind]) for kind in KINDS)
            print(f"| {weight_format} | {direction} | {cells} | {counter.total()} | |")
        ends = f"**{found.total}** | {found.moved_units:.1f}"
        print(f"| {weight_format} | both |{' |' * len(KINDS)} {ends} |", flush=True)
    return 0


def count(card: Card, weight_format: str, shape: str, level: str) -> Launches:
    """Launches of one compiled block with the production engine."""
    import torch

    from benchmarks import step_models as models
    from benchmarks.block_counts import RANK, SHAPES, TEXT_TOKENS, config_section
    from musubi_tuner.ltxv2.transformer.config import TransformerConfig
    from musubi_tuner.memory.attention import use_attention
    from musubi_tuner.memory.checkpointing import Recompute

    use_attention(("flash", "efficient"))  # the fastest of those that load here
    readings, units = [], 0.0
    for blocks in (_FEW, _MANY):
        torch._dynamo.reset()
        config = TransformerConfig.from_checkpoint_config(config_section(False, blocks))
        device, dtype = torch.device("cuda"), torch.bfloat16
        weights, adapters = models.make_weights(config, device, dtype), models.make_adapters(config, RANK)
        quantized = None if weight_format == "bf16" else weight_format
        ours = models.ours(weight_format, config, weights, adapters, level=Recompute(level), compiled=True, weight_format=quantized)
        sample = models.make_sample(config, SHAPES[shape], TEXT_TOKENS, device, dtype)
        frames, rows, columns, steps = SHAPES[shape]
        unit = 2 * (frames * rows * columns * config.video_dim + steps * config.audio_dim)
        with _kernel_bytes() as moved:
            ours.forward(sample).backward()
        units = sum(moved) / unit
        for _ in range(2):
            ours.forward(sample).backward()
            for parameter in ours.adapters.values():  # as the optimizer leaves them: a second gradient would be added by a kernel
                parameter.grad = None
        with card.watched() as forward:
            loss = ours.forward(sample)
        with card.watched() as backward:
            loss.backward()
        readings.append((collections.Counter(map(kind_of, forward)), collections.Counter(map(kind_of, backward))))
    few, many = readings
    counters = [
        collections.Counter({kind: (count - less[kind]) // (_MANY - _FEW) for kind, count in more.items()})
        for less, more in zip(few, many, strict=True)
    ]
    return Launches(counters[0], counters[1], units)


@contextmanager
def _kernel_bytes() -> Iterator[list[int]]:
    """Bytes of each kernel that is compiled meanwhile, in a list that grows."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    found: list[int] = []
    real: Any = GraphLowering.codegen

    def codegen(graph: Any) -> Any:
        result = real(graph)
        found.extend(4 * elements for node, elements in graph.count_bytes()[1] if not node.is_extern())
        return result

    setattr(GraphLowering, "codegen", codegen)  # noqa: B010 - a method of torch's, for the time being
    try:
        with config.patch(force_disable_caches=True):  # what is taken from a cache is not counted
            yield found
    finally:
        setattr(GraphLowering, "codegen", real)  # noqa: B010


def kind_of(line: str) -> str:
    """Which of `KINDS` a line of the card's log is."""
    word, _, rest = line.partition(" ")
    if word == "kernel":
        return "attention" if "flash" in rest or "fmha" in rest else "other kernel"
    return word


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from benchmarks.block_counts import SHAPES

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8"], choices=["bf16", "fp8", "int8", "nf4"], help="default: bf16 fp8")
    parser.add_argument("--shape", default="768x512x121", choices=list(SHAPES), help="default: %(default)s")
    levels = ["nothing", "feed_forward", "all_but_attention", "everything"]
    parser.add_argument("--level", default="nothing", choices=levels, help="recompute level; default: %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
