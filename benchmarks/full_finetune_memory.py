"""Memory of a step of full fine-tuning with streamed blocks against its plan, on a machine without a card.

    python -m benchmarks.full_finetune_memory                                    4 blocks, all streamed, and all of them on the card
    python -m benchmarks.full_finetune_memory --blocks 8 --streamed 6 --optimizer Adafactor --levels all_but_attention

Real-size blocks of 2.3 train on the simulated card (benchmarks/simulated_card), whose allocator is torch's own, through what a run of the
trainer has: `BlockEngine`, `BlockStreamer`, `WeightSteps`. Columns: what the planner says of weights, states, gradients and activations;
the most that the first step and later ones have allocated, weights included. Host memory is really taken: 0.8 GB for each streamed block,
and its states: AdamW 3.1 GB, SGD with momentum 1.5 GB. It needs a CUDA build of torch, and says so where there is none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.block_counts import SHAPES, TEXT_TOKENS, config_section
from benchmarks.simulated_card import Card, run_within
from musubi_tuner.runtime.allocator import GROWING, VARIABLE

if TYPE_CHECKING:
    from torch import nn

    from musubi_tuner.ltxv2.transformer.config import TransformerConfig

_CARD_GB = 320.0
_LEVELS = ("nothing", "feed_forward", "all_but_attention", "everything")
OPTIMIZERS: dict[str, tuple[dict[str, str], float]] = {
    "AdamW": ({"fused": "True"}, 8.0),
    "Adafactor": ({}, 0.1),
    "SGD": ({"momentum": "0.9"}, 4.0),
}
"""Those that need no library of their own: their arguments, and bytes of their states for each weight."""


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    if not Card.is_here():
        return run_within("benchmarks.full_finetune_memory", argv, gigabytes=_CARD_GB, settings={VARIABLE: GROWING})
    Card()
    from musubi_tuner.memory.attention import use_attention

    use_attention(("flash", "efficient"))
    print("| optimizer | blocks | recompute | streamed | clip | planned GB | first step | later steps |\n|" + "---|" * 8)
    for level in options.levels:
        for streamed in options.streamed or (options.blocks, 0):
            planned, first, later = measure(options.blocks, streamed, level, options.optimizer, options.shape, compiled=not options.eager)
            run = "eager" if options.eager else "compiled"
            cells = (options.optimizer, run, level.replace("_", " "), f"{streamed} of {options.blocks}", options.shape)
            found = (f"{value / 1e9:.2f} ({value / planned - 1:+.1%})" for value in (first, later))
            print(f"| {' | '.join((*cells, f'{planned / 1e9:.2f}', *found))} |", flush=True)
    return 0


def measure(blocks: int, streamed: int, level: str, optimizer: str, shape: str, *, compiled: bool) -> tuple[int, int, int]:
    """Bytes of a step: planned, and allocated at most in the first one and in those after it."""
    import torch

    from benchmarks import step_models as models
    from musubi_tuner.ltxv2.transformer.block import sequence_axes
    from musubi_tuner.ltxv2.transformer.config import TransformerConfig
    from musubi_tuner.ltxv2.transformer.model import LTXModel
    from musubi_tuner.memory.checkpointing import Recompute
    from musubi_tuner.memory.engine import BlockEngine
    from musubi_tuner.memory.streaming import BlockStreamer, spread
    from musubi_tuner.runtime.device import free_memory
    from musubi_tuner.training.optimizer import make_optimizer
    from musubi_tuner.training.weight_steps import WeightSteps

    device, dtype = torch.device("cuda"), torch.bfloat16
    free_memory(device)
    torch._dynamo.reset()
    torch.isfinite = lambda tensor: torch.ones((), dtype=torch.bool)  # type: ignore[assignment]  # what comes back from the card is zeros
    config = TransformerConfig.from_checkpoint_config(config_section(False, blocks))
    with torch.device("meta"):
        model = LTXModel(config).to(dtype)
    chosen = [model.transformer_blocks[place] for place in spread(blocks, streamed)]
    for module in (model, *model.modules()):
        where = "cpu" if any(module is one for block in chosen for one in block.modules()) else device
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device=where)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty_like(buffer, device=where), persistent=False)
    streamer = BlockStreamer(chosen, device, trained=True) if chosen else None
    engine = BlockEngine(
        list(model.transformer_blocks), [Recompute(level)] * blocks, max_rank=1, keeps_trained=True, compiled=compiled,
        sequence_axes=sequence_axes, streamer=streamer,
    )  # fmt: skip
    model.run_block = engine
    model.train()
    args, _ = OPTIMIZERS[optimizer]
    named = dict(model.named_parameters())
    make = partial(make_optimizer, optimizer, learning_rate=1e-6, args=args)
    steps = WeightSteps(named, [{"params": list(named.values()), "lr": 1e-6}], make, seed=0, streamer=streamer)
    sample = models.make_sample(config, SHAPES[shape], TEXT_TOKENS, device, dtype)
    peaks = []
    for number in range(1, 4):
        torch.cuda.reset_peak_memory_stats()
        steps.begin(number)
        with steps.within_backward(lambda: None):
            velocity = model(*models.modalities(sample))
            sample.loss(velocity.video, velocity.audio).backward()
            del velocity
        peaks.append(torch.cuda.max_memory_allocated())
    return _planned(model.transformer_blocks, config, named, streamed, level, optimizer, shape, compiled=compiled), peaks[0], max(peaks[1:])


def _planned(
    blocks: nn.ModuleList,
    config: TransformerConfig,
    named: dict[str, nn.Parameter],
    streamed: int,
    level: str,
    optimizer: str,
    shape: str,
    *,
    compiled: bool,
) -> int:
    import torch

    from benchmarks.plans import rates
    from musubi_tuner.memory.plan import Limits, candidates
    from musubi_tuner.memory.step_model import ModelShape, Workload
    from musubi_tuner.placement.full_finetuning import bytes_of_an_update
    from musubi_tuner.placement.load import LOW_BIT

    frames, rows, columns, steps = SHAPES[shape]
    total, inside = sum(one.numel() for one in named.values()), sum(one.numel() for one in blocks[0].parameters())
    each = sum(one.numel() for name, one in named.items() if LOW_BIT.fullmatch(name)) // len(blocks)
    model = ModelShape(
        blocks=len(blocks), video_dim=config.video_dim, audio_dim=config.audio_dim, block_weights=each,
        other_weights=total - each * len(blocks),
    )  # fmt: skip
    work = Workload(
        video_tokens=frames * rows * columns, audio_tokens=steps, text_tokens=TEXT_TOKENS, clips=1, trainable=total,
        optimizer_bytes=OPTIMIZERS[optimizer][1], master_bytes=0.0, gradient_bytes=2.0, trains_model=True,
        trained_in_blocks=inside * len(blocks), trained_in_largest=inside, updates_within_backward=True,
        update_bytes=max(one.numel() for one in named.values()) * bytes_of_an_update(torch.bfloat16),
        update_in_block_bytes=max(one.numel() for one in blocks[0].parameters()) * bytes_of_an_update(torch.bfloat16),
    )  # fmt: skip
    limits = Limits(
        device_bytes=2**60, host_bytes=2**60, formats=("bf16",), unquantized=0, streamed=streamed, level=level, compiled=compiled,
        inputs_may_wait=False,
    )  # fmt: skip
    (plan,) = candidates(model, work, rates("H100 80G"), limits)
    return plan.device_bytes


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_finetune_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=4, help="depth of the model (default: %(default)s)")
    parser.add_argument("--streamed", type=int, nargs="+", metavar="N", help="blocks that are streamed (default: all, and none)")
    parser.add_argument("--optimizer", default="SGD", choices=list(OPTIMIZERS), help="default: %(default)s, with momentum")
    parser.add_argument("--levels", nargs="+", default=["everything"], choices=_LEVELS, help="default: everything")
    parser.add_argument("--shape", default="768x512x121", choices=list(SHAPES), help="default: %(default)s")
    parser.add_argument("--eager", action="store_true", help="blocks are not compiled")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
