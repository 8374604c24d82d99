"""The world's checkpoint: one file in the official format, from the weights that were trained and kept.

What need not be kept is made here: the encoders' empty taps, channels of the audio decoder that are not used, connectors that pass their
input through, the vocoder's filters, and its second stage, which adds nothing to the first one's sound.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from musubi_tuner.ltxv2.autoencoders import audio_vae, video_vae, vocoder
from musubi_tuner.ltxv2.autoencoders.components import MEAN, STD
from musubi_tuner.ltxv2.text.connectors import Connectors
from musubi_tuner.ltxv2.text.features import PREFIX as PROJECTION
from musubi_tuner.tiny.checkpoint import (
    TRANSFORMER,
    fourier_basis,
    mel_basis,
    official_vae_name,
    official_vocoder_name,
    write_checkpoint,
)
from musubi_tuner.tiny.configs import REGISTERS
from musubi_tuner.tiny.world import configs
from musubi_tuner.tiny.world.audio_encoder import AudioEncoder
from musubi_tuner.tiny.world.video_encoder import VideoEncoder

KEPT = ("video", "audio", "vocoder", "transformer")
"""Files of weights that were trained, `NAME.safetensors` each."""
DATA = Path(__file__).parent / "data"
"""Where this package holds them."""


def write_world_checkpoint(path: Path, folder: Path = DATA, *, transformer: Path | None = None) -> None:
    """Write the whole checkpoint; the same bytes each time.

    Args:
        folder: holds the files `KEPT`.
        transformer: the file of its weights, where it lies elsewhere.
    """
    files = {name: folder / f"{name}.safetensors" for name in KEPT}
    if transformer is not None:
        files["transformer"] = transformer
    parts = {name: load_file(file) for name, file in files.items()}
    tensors = transformer_tensors(parts["transformer"]) | video_tensors(parts["video"])
    tensors |= audio_tensors(parts["audio"]) | vocoder_tensors(parts["vocoder"])
    write_checkpoint(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, configs.full_config(), configs.VERSION)


def transformer_tensors(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformer, connectors and text projection, in bfloat16.

    Args:
        kept: `model.*` under the official names, `projection.*`, and `video_register` and `audio_register` (width each).
    """
    tensors = {TRANSFORMER + name: tensor for name, tensor in _under("model.", kept).items()}
    tensors |= {PROJECTION + name: tensor for name, tensor in _under("projection.", kept).items()}
    connectors = Connectors(configs.transformer_section(), REGISTERS)
    for name, tensor in connectors.state_dict().items():
        if name.endswith("learnable_registers"):
            register = kept[f"{name.split('_')[0]}_register"]
            tensors[TRANSFORMER + name] = register.expand(REGISTERS, -1)
        else:
            tensors[TRANSFORMER + name] = torch.ones_like(tensor) if "norm" in name else torch.zeros_like(tensor)
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def video_tensors(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The video VAE: its encoder and statistics in float32, its decoder in bfloat16.

    Args:
        kept: `encoder.*` of `VideoEncoder`, `decoder.*` under diffusers' names, `mean` and `std`.
    """
    parts = VideoEncoder(**_under("encoder.", kept)).tensors()
    parts |= {f"decoder.{name}": tensor.bfloat16() for name, tensor in _under("decoder.", kept).items()}
    blocks = len(configs.vae_section()["encoder_blocks"])
    named = {official_vae_name(name, blocks): tensor for name, tensor in parts.items()} | {MEAN: kept["mean"], STD: kept["std"]}
    return {video_vae.PREFIX + name: tensor for name, tensor in named.items()}


def audio_tensors(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The audio VAE: its encoder and statistics in float32, its decoder in bfloat16 and in some of its channels.

    Args:
        kept: `encoder.*` of `AudioEncoder`, `decoder.*` of a decoder with fewer channels, `mean` and `std`.
    """
    from diffusers import AutoencoderKLLTX2Audio

    with torch.device("meta"):
        network: Any = AutoencoderKLLTX2Audio(**audio_vae.diffusers_config(configs.audio_vae_section()))
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    named = AudioEncoder(**_under("encoder.", kept)).tensors({name: shape for name, shape in shapes.items() if name.startswith("encoder.")})
    for name, tensor in _under("decoder.", kept).items():
        whole = torch.zeros(shapes[f"decoder.{name}"], dtype=torch.bfloat16)
        whole[tuple(slice(0, size) for size in tensor.shape)] = tensor.bfloat16()
        named[f"decoder.{name}"] = whole
    named |= {MEAN: kept["mean"], STD: kept["std"]}
    return {audio_vae.PREFIX + name: tensor for name, tensor in named.items()}


def vocoder_tensors(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both stages of the vocoder.

    Args:
        kept: parameters of the first stage, `vocoder.*` under diffusers' names.
    """
    from diffusers.pipelines.ltx2 import LTX2VocoderWithBWE

    section = configs.vocoder_section()
    network = LTX2VocoderWithBWE(**vocoder.two_stage_config(section))
    parameters = dict(network.named_parameters())
    named = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("forward_basis"):
            tensor = fourier_basis(section["bwe"]["n_fft"])
        elif name.endswith("mel_basis"):
            tensor = mel_basis(tuple(tensor.shape))
        elif name in parameters:
            tensor = (kept[name] if name.startswith("vocoder.") else torch.zeros_like(tensor)).bfloat16()
        named[official_vocoder_name(name)] = tensor
    return {vocoder.PREFIX + name: tensor for name, tensor in named.items()}


def _under(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
