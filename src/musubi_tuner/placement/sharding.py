"""A model whose own weights are trained, dealt out over processes: each holds its part of every weight, gradient and optimizer state.

torch's `fully_shard` (FSDP2) does it, block by block: a block's weights are gathered before it runs, forward and backward, and freed after;
its gradients are averaged over the processes and cut into parts as soon as they are complete. What lies outside of the blocks is one more
unit, which stays gathered through a pass. accelerate's FSDP config file asks for it (training_configs/two_gpus_full.yaml).
"""

import os
import warnings
from collections.abc import Mapping

import torch
import torch.distributed
from torch import Tensor

from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes


def sharding_is_asked_for(*, trains_model: bool, group: Processes) -> bool:
    """Whether the launcher was told to shard (accelerate's `use_fsdp`).

    Raises:
        UserError: it was told to in a way, or for a run, for which that is not done.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("1", "true", "yes"):
        return False
    if not trains_model:
        raise UserError(
            "accelerate was told to shard the model (FSDP), which is done with --full_finetune alone: a network is small, and the frozen "
            "weights are quantized or streamed instead. Launch with training_configs/two_gpus.yaml, or accelerate launch --multi_gpu."
        )
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate's config file has no 'fsdp_version: 2', and the first version is not supported. Set it.")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() in ("1", "true", "yes"):
        raise UserError("accelerate's config file has 'fsdp_offload_params: true', which is not supported. Set it to false.")
    return group.count > 1


def shard(transformer: LTXModel, device: torch.device) -> None:
    """Deal the weights out, in place: parameters are this process's parts from here on."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Our last operation before the output is a view, and nothing works on that in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(transformer, mesh=mesh, mp_policy=policy)


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of it: all, unless it is sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(weights: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The whole weights in host memory; all processes must call it, and those that do not `keep` them get none."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, weight in weights.items():
        full = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if keep:
            found[name] = full.cpu()
    return found
