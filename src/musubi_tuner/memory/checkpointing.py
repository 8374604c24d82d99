"""Activation (gradient) checkpointing: what a block keeps for its backward pass and what that pass recomputes, in four levels.

    level               kept                                        recomputed besides                       units (2.3)
    nothing             outputs of frozen linears and attention     -                                           16.8
    feed_forward        the same without the feed-forward's wide    the feed-forward's first product            12.7
    all_but_attention   attention outputs                           the other linears                            3.6
    everything          the block's inputs alone                    attention                                    1.0

Each level keeps less and recomputes more than the one above. A unit is one bf16 tensor of the video stream (memory/step_model.py). The
inputs of the block are kept on every level; the last one is what is commonly called gradient checkpointing, the three others are selective:
a policy looks at each operation and at the shape of its weight. Cheap work between the large matrix products (norms, modulation, RoPE,
activations, the second half of a LoRA) is recomputed on every level, as it costs little time and would be most of the memory: without a
policy the compiler's partitioner keeps 31.7 units.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

States = tuple[Tensor | None, Tensor | None]
"""What a block takes and returns: (B, N, D) of two streams, None where a stream is absent."""


class RunBlock(Protocol):
    """Runs a block. `inputs` is all that it reads beside its states, the same for all blocks of a pass; see memory/engine.py."""

    def __call__(self, block: nn.Module, states: States, inputs: Any) -> States:
        """The states after the block."""
        ...


_aten = torch.ops.aten

ATTENTION_OPS = {
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}

_LINEARS: dict[Any, Callable[[Sequence[Any]], tuple[int, int]]] = {
    _aten.mm.default: lambda arguments: tuple(arguments[1].shape),
    _aten.addmm.default: lambda arguments: tuple(arguments[2].shape),
}
"""{operation: its arguments -> (inputs, outputs) of its weight}."""


_GROUPED = 3
"""First halves of LoRA that are one product at most (networks/lora.py)."""


class Recompute(StrEnum):
    """Recompute level of a block: what its backward pass recomputes, least first."""

    NOTHING = "nothing"
    FEED_FORWARD = "feed_forward"
    ALL_BUT_ATTENTION = "all_but_attention"
    EVERYTHING = "everything"


def register_linear(operation: Any, features: Callable[[Sequence[Any]], tuple[int, int]]) -> None:
    """Have the policy treat a custom operation as a frozen linear.

    Args:
        features: the operation's arguments -> (inputs, outputs) of its weight.
    """
    _LINEARS[operation] = features


def keeps(
    level: Recompute, max_rank: int, operation: Any, arguments: Sequence[Any], *, sums: bool = False, keeps_trained: bool = False
) -> bool:
    """Whether the output of one operation is kept.

    Args:
        max_rank: of a LoRA. Products by trained weights are first halves where they give no more than this, or three times as much (those
            of queries, keys and values run as one product), and second halves where they contract no more; others are what LoKr and LoHa
            add, as wide as a linear's output, and are recomputed on every level.
        sums: every attention projection has a LoRA that is added to it within its second product. The sum is kept then, in place of
            what the projection alone gives, and is not computed again. For compiled blocks: uncompiled, what is not kept runs again
            although nobody needs it.
        keeps_trained: the linears themselves are trained, so products by trained weights are kept as those by frozen ones.
    """
    if level == Recompute.EVERYTHING:
        return False
    if operation in ATTENTION_OPS:
        return True
    if level == Recompute.ALL_BUT_ATTENTION:
        return False
    if operation not in _LINEARS:
        return False
    inputs, outputs = _LINEARS[operation](arguments)
    if _weight(operation, arguments).requires_grad and not keeps_trained:
        if inputs <= max_rank:
            return sums
        if outputs > _GROUPED * max_rank:
            return False
    if sums and inputs < 4 * outputs and outputs < 4 * inputs:
        return False  # a projection: those of a feed-forward, of gates and of a LoRA's first half change the width more
    return not (level == Recompute.FEED_FORWARD and outputs >= 4 * inputs)


def _weight(operation: Any, arguments: Sequence[Any]) -> Tensor:
    return arguments[2 if operation == _aten.addmm.default else 1]


def _policy(
    level: Recompute,
    max_rank: int,
    sums: bool,
    keeps_trained: bool,
    context: Any,
    operation: Any,
    *arguments: Any,
    **named: Any,
) -> CheckpointPolicy:
    kept = keeps(level, max_rank, operation, arguments, sums=sums, keeps_trained=keeps_trained)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(level: Recompute, max_rank: int, *, sums: bool = False, keeps_trained: bool = False, compiled: bool = False) -> RunBlock:
    """A function that runs a block on this level; it compiles as one graph with the block. There is no dropout in a block, so the state of
    the random generators is not kept.

    Args:
        sums, keeps_trained: as `keeps`.
        compiled: it will be compiled. Without a policy torch 2.11 would keep what autograd functions make within the block (fp8
            linears), although the block is to be recomputed as a whole; uncompiled, a policy costs time at each operation.
    """

    # A partial of functions that have a name: torch's cache of compiled graphs pickles what it is made of. It does not look into policies
    # and takes their word, `cache_hash`, for what tells one from another; without that no graph with a policy is kept on disk.
    contexts: Any = partial(create_selective_checkpoint_contexts, partial(_policy, level, max_rank, sums, keeps_trained))
    contexts.cache_hash = f"{level} {max_rank} {sums} {keeps_trained}"

    def run(block: nn.Module, states: States, inputs: Any) -> States:
        assert level and max_rank > 0  # read here so that compiled code is guarded by them: two levels never share a graph
        return checkpoint(block, states, inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def run_whole(block: nn.Module, states: States, inputs: Any) -> States:
        return checkpoint(block, states, inputs, use_reentrant=False, preserve_rng_state=False)

    return run_whole if level == Recompute.EVERYTHING and not compiled else run
