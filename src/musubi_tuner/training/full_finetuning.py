"""What a run with `--full_finetune` has that others have not: its checks, its optimizer, the size of its files."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from musubi_tuner.config.network import parse_pairs
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.networks.whole import TrainedNetwork, WholeTransformer, check_arguments
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.optimizer import make_optimizer
from musubi_tuner.training.preflight import RunInputs
from musubi_tuner.training.run import Machine
from musubi_tuner.training.weight_steps import WeightSteps, check_by_tensor

_PAGED = "pagedadamw8bit"


def make_weight_steps(
    config: TrainingConfig, args: Mapping[str, str], machine: Machine, network: TrainedNetwork, *, shards: int
) -> WeightSteps:
    """The optimizer, and what has it take its steps.

    Args:
        args: of the optimizer.
        shards: as of `TrainingRun`.
    """
    optimization = config.optimization
    assert isinstance(network, WholeTransformer), "the model itself"
    return WeightSteps(
        network.named_parameters(),
        network.parameter_groups(optimization.learning_rate, optimization.audio_learning_rate),
        partial(_optimizer, config, args, machine),
        seed=optimization.seed,
        part=machine.processes.index if shards > 1 else 0,
        streamer=network.streamer,
    )


def _optimizer(config: TrainingConfig, args: Mapping[str, str], machine: Machine, groups: list[dict[str, Any]]) -> Optimizer:
    optimization = config.optimization
    if _steps_by_tensor(config, machine.dtype) and optimization.optimizer_type.lower() == "adamw" and machine.device.type == "cuda":
        args = {"fused": "True", **args}  # torch's own, which looks its tensors up at each step
    return make_optimizer(optimization.optimizer_type, groups, optimization.learning_rate, args)


def _steps_by_tensor(config: TrainingConfig, dtype: torch.dtype) -> bool:
    return config.network.full_finetune and (dtype != torch.float32 or config.optimization.fused_backward_pass)


def check_whole(config: TrainingConfig, machine: Machine) -> None:
    """What needs no weights to be known.

    Raises:
        UserError: patterns, an optimizer, an average or several processes that do not go with it.
    """
    optimization, dtype = config.optimization, machine.dtype
    if config.memory.blocks_to_swap and (reason := why_not_streamed(config, machine.processes.count)):
        raise UserError(f"--blocks_to_swap {config.memory.blocks_to_swap}: {reason}")
    check_arguments(parse_pairs(config.network.network_args, "--network_args"))
    if dtype != torch.float32:
        check_by_tensor(optimization.optimizer_type, "weights in bf16 are updated one by one (--mixed_precision no keeps them in float32)")
        if optimization.ema_decay:
            raise UserError(
                f"--ema_decay {optimization.ema_decay:g}: weights in bf16 have no room for an average of them, which moves by less than "
                "they can. Leave it out, or keep them in float32 with --mixed_precision no."
            )
    if optimization.fused_backward_pass:
        check_by_tensor(optimization.optimizer_type, "--fused_backward_pass updates weights one by one")
        if optimization.ema_decay:
            raise UserError("--fused_backward_pass with --ema_decay: is not supported. Leave one of them out.")
        if machine.processes.count > 1:
            raise UserError(
                f"--fused_backward_pass: {machine.processes.count} processes average their gradients first, when all of them are there. "
                "Leave it out; weights that are sharded over the cards leave room (docs/how-to/full_finetuning.md)."
            )


def why_not_streamed(config: TrainingConfig, processes: int) -> str | None:
    """What keeps trained blocks from being streamed, and what to do about it; None where they may be."""
    if processes > 1:
        return (
            f"{processes} processes would each have weights of their own in host memory, and average gradients that are used up by then. "
            "Leave it out and shard the weights over the cards (docs/how-to/full_finetuning.md), or train on one."
        )
    if not config.optimization.fused_backward_pass:
        return "needs updates within the backward pass: add --max_grad_norm 0 --fused_backward_pass."
    if config.optimization.optimizer_type.lower() == _PAGED:
        return "a paged optimizer moves its states itself, and those of streamed blocks move with these. Give --optimizer_type AdamW8bit."
    return None


def check_sharded(inputs: RunInputs) -> None:
    """Processes that hold a part each of the model run the same operations at the same time.

    Raises:
        UserError: what would have them do otherwise.
    """
    config, why = inputs.config, "with weights that are sharded over processes"
    optimizer = config.optimization.optimizer_type
    check_by_tensor(optimizer, f"{why} updates are made part by part")
    if optimizer.lower() == "adafactor":
        raise UserError(f"--optimizer_type Adafactor {why}: it needs whole rows and columns of a weight. Give AdamW8bit or AdamW.")
    if config.optimization.ema_decay:
        raise UserError(f"--ema_decay {config.optimization.ema_decay:g} {why}: is not supported. Leave it out.")
    if config.network.train_connectors:
        raise UserError(f"--train_connectors {why}: is not supported. Leave it out.")
    if config.preview.sample_prompts is not None:
        raise UserError(
            f"--sample_prompts {why}: previews are made by one process, which has not all of them. Leave it out, and give the checkpoints "
            "that --save_every_n_steps writes to ltxv2_generate_video.py."
        )
    with_sound = sum(item.has_sound for item in inputs.items)
    if config.ltx_mode == "av" and with_sound not in (0, len(inputs.items)):
        raise UserError(
            f"--ltx_mode av {why}: {with_sound} of {len(inputs.items)} items have sound, and the processes must all train the same part of "
            "the model in a step. Give the items without sound a silent track and their dataset supervise_silence, leave them out, or "
            "train with --ltx_mode video."
        )
    if inputs.recipe.keyframes is not None:
        raise UserError(f"the recipe's rule 'keyframes' {why}: is not supported, as it is drawn for each clip. Take it out.")


def taken_over_bytes(checkpoint: Checkpoint, network: TrainedNetwork) -> int:
    """Of the base file, what a whole checkpoint takes over from it, near enough."""
    return max(0, sum(entry.size for entry in checkpoint.entries.values()) - sum(one.nbytes for one in network.parameters()))
