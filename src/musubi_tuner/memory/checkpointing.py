"""Gradient checkpointing of transformer blocks: keep a block's inputs, run it again in the backward pass."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def run_checkpointed(block: Callable[..., Any], *arguments: Any) -> Any:
    """Run one block so that only its inputs are kept for the backward pass. There is no dropout, so no random state is kept."""
    return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)


def checkpoint_blocks(model: nn.Module) -> None:
    """Make `model`, which runs its blocks through `model.run_block`, checkpoint each of them."""
    model.run_block = run_checkpointed
