"""What training the model's own weights takes, in numbers: for its plan, for the table before the first step, and for what is refused.

    weights              bf16 2 bytes, float32 4
    gradients            as the weights; with --fused_backward_pass those of one block
    optimizer states     AdamW 8 bytes, AdamW8bit 2, Adafactor 0.1
    what blocks keep for the backward pass, and the block in flight: memory/plan.py

Streamed blocks have weights and states in host memory, and two of them on the card (training/streamed_states.py). Where a model is sharded
over several cards, each has its part of the first three, and two gathered blocks.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from musubi_tuner.networks.whole import TrainedNetwork, WholeTransformer
from musubi_tuner.placement.planning import size_in_words
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes in each process, beside what depends on the batch."""

    weights: int
    """Of all of the model."""
    gradients: int
    states: int
    update: int
    """While the largest tensor is updated."""
    shards: int = 1
    """Processes that hold a part each."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.update


def needs_of(
    network: WholeTransformer, *, weights: int, blocks: int, dtype: torch.dtype, state_bytes: float, within_backward: bool, shards: int = 1
) -> Needs:
    """
    Args:
        weights: how many the model has, frozen ones among them.
        state_bytes: of the optimizer, for each trained weight.
        within_backward: `--fused_backward_pass`
        shards: processes that hold a part each.
    """
    sizes = [parameter.numel() for parameter in network.parameters()]
    trained = sum(sizes)
    gradients = trained * dtype.itemsize / (blocks if within_backward else 1)
    return Needs(
        weights=weights * dtype.itemsize // shards,
        gradients=int(gradients / shards),
        states=int(trained * state_bytes / shards),
        update=int(max(sizes) * bytes_of_an_update(dtype)),
        shards=shards,
    )


def trained_in_blocks(network: TrainedNetwork) -> list[list[int]]:
    """Sizes of the trained tensors of each block that has any."""
    found: dict[str, list[int]] = defaultdict(list)
    for name, parameter in network.named_parameters().items():
        if name.startswith("transformer_blocks."):
            found[name.split(".")[1]].append(parameter.numel())
    return list(found.values())


def bytes_of_an_update(dtype: torch.dtype) -> float:
    """For each entry of the tensor that is updated: in bf16 weight and gradient in float32, random numbers, the result; and what the
    optimizer makes."""
    return 12.0 if dtype == torch.float32 else 24.0


def in_words(needs: Needs) -> str:
    """For the table before the first step."""
    parts = (("weights", needs.weights), ("gradients", needs.gradients), ("optimizer states", needs.states), ("an update", needs.update))
    shared = f", of weights that {needs.shards} processes share out" if needs.shards > 1 else ""
    return ", ".join(f"{name} {size_in_words(count)}" for name, count in parts) + shared


def check_host(needs: Needs) -> None:
    """On a CPU, whose memory nothing else plans with.

    Raises:
        UserError: the machine has less free.
    """
    import psutil

    free = psutil.virtual_memory().available
    if needs.total > free:
        raise UserError(
            f"--full_finetune takes {size_in_words(needs.total)} here ({in_words(needs)}), beside what a batch takes, and "
            f"{size_in_words(free)} of memory are free. {REMEDY}"
        )


REMEDY = (
    "Least first, what takes less: --max_grad_norm 0 --fused_backward_pass (no room for gradients, and blocks may wait in host memory), "
    "--optimizer_type AdamW8bit or Adafactor, exclude_patterns in --network_args; several cards that share the weights "
    "(docs/how-to/full_finetuning.md); or train a network."
)
