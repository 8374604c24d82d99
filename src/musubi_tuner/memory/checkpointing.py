"""What a block keeps for its backward pass, and what that pass computes again: a ladder of four rungs, chosen block by block.

A policy looks at each operation and at the shape of its weight. Cheap work between the large matrix products (norms, modulation,
rotation, activations, the second half of a LoRA) is always computed again.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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


States = tuple[Tensor | None, Tensor | None]
"""What a block takes and returns: (B, N, D) of two streams, None where a stream is absent."""


class Run(Protocol):
    """Runs a block. `inputs` is whatever it reads beside its states, the same for all blocks; it takes no gradient."""

    def __call__(self, block: nn.Module, states: States, inputs: Any) -> States:
        """The next states."""
        ...


class Recompute(StrEnum):
    """What the backward pass computes again, least first. Each rung keeps less and computes more than the one before."""

    NOTHING = "nothing"
    """Outputs of frozen linears and attention are kept."""
    FEED_FORWARD = "feed_forward"
    """The feed-forward's wide half is computed again."""
    ALL_BUT_ATTENTION = "all_but_attention"
    """Only attention outputs are kept."""
    EVERYTHING = "everything"
    """Only the block's inputs are kept: what is commonly called gradient checkpointing."""


def register_linear(operation: Any, features: Callable[[Sequence[Any]], tuple[int, int]]) -> None:
    """Let the ladder treat a custom operation as a frozen linear.

    Args:
        features: the operation's arguments -> (inputs, outputs) of its weight.
    """
    _LINEARS[operation] = features


def keeps(rung: Recompute, max_rank: int, operation: Any, arguments: Sequence[Any]) -> bool:
    """Whether the output of one operation is kept.

    Args:
        max_rank: products that contract no more than this are the second half of a LoRA.
    """
    if rung == Recompute.EVERYTHING:
        return False
    if operation in ATTENTION_OPS:
        return True
    if rung == Recompute.ALL_BUT_ATTENTION:
        return False
    if operation not in _LINEARS:
        return False
    inputs, outputs = _LINEARS[operation](arguments)
    if inputs <= max_rank:
        return False
    return not (rung == Recompute.FEED_FORWARD and outputs >= 4 * inputs)


def checkpointed(rung: Recompute, max_rank: int) -> Run:
    """Runs a block on this level; it compiles as one graph with the block. There is no dropout in a block, so no random state is kept."""

    def policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        kept = keeps(rung, max_rank, operation, arguments)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def run(block: nn.Module, states: States, inputs: Any) -> States:
        assert rung and max_rank > 0  # read here so that compiled code is guarded by them: two levels never share a graph
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, states, inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def run_whole(block: nn.Module, states: States, inputs: Any) -> States:
        return checkpoint(block, states, inputs, use_reentrant=False, preserve_rng_state=False)

    return run_whole if rung == Recompute.EVERYTHING else run
