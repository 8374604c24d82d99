"""Encoders of pictures and sound without a checkpoint, and what encoding a clip takes, counted on tensors without storage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.autoencoders.audio_vae import diffusers_config as audio_config
from musubi_tuner.ltxv2.autoencoders.video_vae import TileSizes, VideoVAE, diffusers_config
from musubi_tuner.memory.live_bytes import LiveBytes
from musubi_tuner.tiny import configs

ENCODER_BLOCKS = [
    ["res_x", {"num_layers": 4}],
    ["compress_space_res", {"multiplier": 2}],
    ["res_x", {"num_layers": 6}],
    ["compress_time_res", {"multiplier": 2}],
    ["res_x", {"num_layers": 4}],
    ["compress_all_res", {"multiplier": 2}],
    ["res_x", {"num_layers": 2}],
    ["compress_all_res", {"multiplier": 1}],
    ["res_x", {"num_layers": 2}],
]
"""Of 2.3 and 2.5 (docs/explanation/model.md, "autoencoders")."""
_ATEN = torch.ops.aten
_NOT_MOVING = (_ATEN.convolution.default, _ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN._unsafe_view.default)
_SMALLEST_DECODER = [["res_x", {"num_layers": 0}], ["compress_all", {}], ["res_x", {"num_layers": 0}]]


@dataclass(frozen=True, slots=True)
class EncoderCounts:
    """One clip."""

    calls: int
    """Of the encoder: parts of tiles."""
    flops: float
    """Of the convolutions of all calls."""
    peak_bytes: int
    """Held at the worst moment: activations and the clip's frames, not weights, not what a convolution allocates for itself."""
    moved_bytes: float
    """Read and written by all operations but convolutions, before fusion."""


def make_encoder(device: torch.device | str, dtype: torch.dtype, *, toy: bool) -> nn.Module:
    """diffusers' VAE with random weights, always the same, and no decoder."""
    from diffusers import AutoencoderKLLTX2Video

    section = configs.vae_section("2.3") | {"decoder_blocks": _SMALLEST_DECODER}
    if not toy:
        section |= {"encoder_blocks": ENCODER_BLOCKS}
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoencoderKLLTX2Video(**diffusers_config(section))
    network.decoder = None
    network.encoder.to(dtype)
    return network.requires_grad_(False).eval()


def count_encoder(shape: Sequence[int], tiles: TileSizes, *, toy: bool = False, layout: str = "contiguous") -> EncoderCounts:
    """Encode a clip of (frames, height, width) in bfloat16 on the meta device."""
    network = make_encoder("meta", torch.bfloat16, toy=toy)
    calls: list[object] = []
    network.encoder.register_forward_hook(lambda *given: calls.append(None))
    vae = VideoVAE(network, tiles, torch.bfloat16)
    vae.use_layout(layout)
    frames = torch.empty((1, *shape, 3), dtype=torch.uint8, device="meta")
    memory = _Bytes()
    memory.hold(frames)
    with memory, FlopCounterMode(display=False) as operations:
        vae.encode_frames(frames)
    return EncoderCounts(len(calls), float(operations.get_total_flops()), memory.peak, float(memory.moved))


_SOUND = {"ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2}
"""Of all released audio VAEs."""


def make_sound_encoder(device: torch.device | str) -> AudioVAE:
    """diffusers' audio VAE at released widths with random weights and no decoder."""
    from diffusers import AutoencoderKLLTX2Audio

    section = configs.audio_vae_section()
    section["model"]["params"]["ddconfig"] |= _SOUND
    with torch.device(device):
        network = AutoencoderKLLTX2Audio(**audio_config(section))
    setattr(network, "decoder", None)  # noqa: B010 - a module, in the type
    return AudioVAE(network.requires_grad_(False).eval())


def sound_bytes(samples: int) -> int:
    """The most that encoding a clip of stereo sound holds beside the weights, counted on the meta device."""
    vae, memory = make_sound_encoder("meta"), _Bytes()
    waveform = torch.empty((1, 2, samples), device="meta")
    memory.hold(waveform)
    with memory:
        vae.encode(waveform)
    return memory.peak


class _Bytes(LiveBytes):
    """And bytes that are moved."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.is_view and func not in _NOT_MOVING:
            read = args[1:] if func is _ATEN.copy_.default else (args, kwargs)
            touched = [value for value in tree_leaves((read, result)) if isinstance(value, Tensor)]
            self.moved += sum(value.numel() * value.element_size() for value in touched)
        return result
