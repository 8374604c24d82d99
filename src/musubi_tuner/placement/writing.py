"""A language model that writes prompts out, on this machine: as many of its layers as fit lie on the device, the others are streamed.

As a text encoder's (placement/text.py), but every word that is written passes through all layers, so the streamed ones are copied once a
word: slow, and possible on a card of any size that holds the rest.
"""

import logging
from typing import Any

import torch

from musubi_tuner.ltxv2.text.loading import LoadedBytes
from musubi_tuner.memory.card import GIB, cap_device_memory
from musubi_tuner.memory.card import free_memory as memory_to_use
from musubi_tuner.memory.plan import SLOTS
from musubi_tuner.memory.streaming import spread
from musubi_tuner.placement.text import stream_layers, streamed_count
from musubi_tuner.runtime.errors import UserError

log = logging.getLogger(__name__)

_OF_PICTURES = GIB // 4
"""What a part that sees takes while it looks at a picture; of Gemma 3's, 4,096 patches of one layer."""
_REMEDY = (
    "Leave --enhance_prompt out, or write the prompts out where there is more memory and take the texts from that run's "
    "enhanced_prompts.json; programs that hold memory may be closed"
)


def place_writer(model: Any, tokens: int, *, device: torch.device, vram_gb: float | None, ram_gb: float | None) -> None:
    """Put a model of transformers that lies on the CPU onto the device, with as many of its layers streamed as do not fit.

    Args:
        tokens: of the longest text, with what is written.
        vram_gb, ram_gb: as of `EncoderOptions`.

    Raises:
        UserError: device or host have too little memory.
    """
    layers = list(model.get_decoder().layers)
    on_host = spread(len(layers), _streamed(model, tokens, device, vram_gb, ram_gb))
    cap_device_memory(device, vram_gb)
    if on_host:
        stream_layers(layers, on_host, device)  # which are on the device from here on, as views of what is streamed
    model.to(device)


def writing_bytes(config: Any, tokens: int, itemsize: int, *, sees: bool) -> int:
    """Device memory that writing takes beside the weights: keys and values of all tokens, one layer, the scores of all words.

    Args:
        config: of transformers, of the language model.
    """
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    layer = (3 * config.intermediate_size + 2 * config.hidden_size) * itemsize
    return tokens * (cached + layer) + 8 * 4 * config.vocab_size + _OF_PICTURES * sees


def _streamed(model: Any, tokens: int, device: torch.device, vram_gb: float | None, ram_gb: float | None) -> int:
    """How many layers are streamed.

    Raises:
        UserError: device or host have too little memory.
    """
    if device.type != "cuda":
        return 0
    layers = tuple(sum(one.nbytes for one in layer.parameters()) for layer in model.get_decoder().layers)
    weights = LoadedBytes(layers, sum(one.nbytes for one in model.parameters()) - sum(layers))
    config = getattr(model.config, "text_config", model.config)
    sees = getattr(model.config, "vision_config", None) is not None
    working = writing_bytes(config, tokens, model.dtype.itemsize, sees=sees)
    device_bytes, host_bytes = memory_to_use(device, vram_gb, ram_gb)
    count = streamed_count(weights, working, device_bytes)
    may = f"may be used{'' if vram_gb is None else f' by --vram_gb {vram_gb:g}'}"
    if count is None:
        least = weights.beside + working + SLOTS * max(layers)
        raise UserError(
            f"--enhance_prompt: with all its layers in host memory the language model still needs {least / GIB:.1f} GiB of the device, of "
            f"which {device_bytes / GIB:.1f} {may}. {_REMEDY}."
        )
    waiting = count * max(layers)
    if waiting > host_bytes:
        raise UserError(
            f"--enhance_prompt: {count} of the language model's {len(layers)} layers do not fit on the device, and would take "
            f"{waiting / GIB:.1f} GiB of host memory, of which {host_bytes / GIB:.1f} may be used. {_REMEDY}."
        )
    if count:
        log.info(
            "--enhance_prompt: %d of %d layers are streamed from host memory, as %.1f GiB of the device may be used and writing takes "
            "%.1f: each word copies %.1f GiB, so this is slow.",
            count, len(layers), device_bytes / GIB, (weights.total + working) / GIB, waiting / GIB,
        )  # fmt: skip
    return count
