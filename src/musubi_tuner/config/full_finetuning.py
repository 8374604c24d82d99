"""What does not go together with training the model's own weights (`--full_finetune`), and why."""

from dataclasses import fields

from musubi_tuner.config.losses import PreservationOptions
from musubi_tuner.config.model import MemoryOptions
from musubi_tuner.config.network import NetworkOptions
from musubi_tuner.runtime.errors import UserError

NO_BASE = "asks the base model what it would make of an item, and --full_finetune changes that model itself; nothing is left to ask"


def check_full_finetuning(
    network: NetworkOptions, preservation: PreservationOptions, memory: MemoryOptions, *, within_backward: bool
) -> None:
    """
    Args:
        within_backward: `--fused_backward_pass`

    Raises:
        UserError: a flag that needs the unchanged model, a network, or weights in few bits.
    """
    remedy = "Leave it out, or train a network."
    defaults = {field.name: field.default for field in fields(network)}
    for key in ("network_module", "network_dim", "network_alpha"):
        if (value := getattr(network, key)) != defaults[key]:
            raise UserError(f"--{key} {value}: is of networks, and --full_finetune trains none. Leave it out.")
    if preservation.dop_prompt is not None and preservation.dop_weight:
        raise UserError(f"--dop_prompt: {NO_BASE}. {remedy}")
    if preservation.audio_dop_weight:
        raise UserError(f"--audio_dop_weight {preservation.audio_dop_weight:g}: {NO_BASE}. {remedy}")
    if network.network_weights is not None:
        raise UserError(
            f"--network_weights {network.network_weights}: is a network to go on with, and --full_finetune trains none. To start from the "
            "model with a LoRA in it, give it by --base_weights; to start from a checkpoint that was trained, by --ltxv2_model."
        )
    if memory.wanted_format not in ("auto", "bf16"):
        raise UserError(
            f"--weight_format {memory.wanted_format}: is of frozen weights, and --full_finetune trains them all. Leave it out. What takes "
            "less memory: --optimizer_type Adafactor or AdamW8bit, --fused_backward_pass."
        )
    if memory.blocks_to_swap and not within_backward:
        raise UserError(
            f"--blocks_to_swap {memory.blocks_to_swap}: trained blocks leave the card as soon as their backward pass has ended, and are "
            "updated before that. Add --max_grad_norm 0 --fused_backward_pass, or leave it out."
        )
