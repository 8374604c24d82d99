"""Model files of the released sizes that hold nothing: their headers are complete, their numbers are holes of the file system, which read
as zeros and take no room on the disk. For counting memory, where what is computed does not matter."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.block_counts import config_section
from benchmarks.encoder_counts import ENCODER_BLOCKS
from musubi_tuner.ltxv2.autoencoders import audio_vae, video_vae, vocoder
from musubi_tuner.ltxv2.autoencoders.components import MEAN, STD
from musubi_tuner.ltxv2.geometry import LATENT_CHANNELS
from musubi_tuner.ltxv2.text.connectors import Connectors
from musubi_tuner.ltxv2.text.features import FeatureExtractor
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.tiny import configs
from musubi_tuner.tiny.checkpoint import TRANSFORMER, official_vae_name, official_vocoder_name
from musubi_tuner.tiny.encoders import write_gemma

DISTILLED_RANK = 384
GEMMA = {
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "sliding_window": 1024,
}
"""Of both text encoders."""
GEMMA_LAYERS = 48
_GEMMA3 = GEMMA | {"vocab_size": 262208, "query_pre_attn_scalar": 256, "num_hidden_layers": GEMMA_LAYERS}
DECODER_BLOCKS = [
    ["res_x", {"num_layers": 4}],
    ["compress_space", {"multiplier": 2}],
    ["res_x", {"num_layers": 6}],
    ["compress_time", {"multiplier": 2}],
    ["res_x", {"num_layers": 4}],
    ["compress_all", {"multiplier": 1}],
    ["res_x", {"num_layers": 2}],
    ["compress_all", {"multiplier": 2}],
    ["res_x", {"num_layers": 2}],
]
"""Of 2.3 and 2.5, in the stored order: the last entry is what latents enter first."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmptyFiles:
    """What `ltxv2_generate_video.py` takes."""

    model: Path
    """LTX-2.3 with both VAEs and the vocoder."""
    gemma: Path
    upsampler: Path
    distilled_lora: Path


def write_empty_files(folder: Path, *, blocks: int) -> EmptyFiles:
    """All of them, in a second; `blocks` is the transformer's depth."""
    files = EmptyFiles(
        model=folder / "ltx-2.3-empty.safetensors",
        gemma=folder / "gemma-empty",
        upsampler=folder / "upscaler-empty.safetensors",
        distilled_lora=folder / "distilled-lora-empty.safetensors",
    )
    sections = full_config(blocks)
    with torch.device("meta"):
        transformer = LTXModel(TransformerConfig.from_checkpoint_config(sections["transformer"]))
        shapes = model_shapes(transformer, sections)
        lora = _lora_shapes(transformer)
        upsampler = _upsampler_shapes()
        gemma = _gemma_shapes()
    write_empty(files.model, shapes, {"config": json.dumps(sections), "model_version": configs.MODEL_VERSIONS["2.3"]})
    write_empty(files.upsampler, upsampler, {"config": json.dumps({"spatial_scale": 2.0, "rational_resampler": True})})
    write_empty(files.distilled_lora, lora, {})
    write_gemma(files.gemma)  # for its tokenizer
    settings = json.loads((files.gemma / "config.json").read_text(encoding="utf-8"))
    settings |= _GEMMA3 | {"layer_types": ["full_attention" if place % 6 == 5 else "sliding_attention" for place in range(GEMMA_LAYERS)]}
    (files.gemma / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    write_empty(files.gemma / "model.safetensors", gemma, {"format": "pt"})
    return files


def full_config(blocks: int) -> dict[str, Any]:
    """`config` metadata of a 2.3 checkpoint at the released widths."""
    transformer = config_section(False, blocks)
    transformer |= {"connector_num_attention_heads": 32, "connector_attention_head_dim": 128, "connector_num_layers": 8}
    transformer |= {"audio_connector_num_attention_heads": 32, "audio_connector_attention_head_dim": 64, "audio_connector_num_layers": 8}
    vae = configs.vae_section("2.3") | {"encoder_blocks": ENCODER_BLOCKS, "decoder_blocks": DECODER_BLOCKS, "decoder_base_channels": 128}
    sound = configs.audio_vae_section()
    sound["model"]["params"]["ddconfig"] |= {"ch_mult": [1, 2, 4], "num_res_blocks": 2}
    voice = configs.vocoder_section("2.3")
    kernels = {"resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3}
    voice["vocoder"] |= kernels | {"upsample_initial_channel": 1536}
    voice["bwe"] |= kernels | {"upsample_initial_channel": 512}
    return {"transformer": transformer, "vae": vae, "audio_vae": sound, "vocoder": voice}


def model_shapes(transformer: nn.Module, sections: dict[str, Any]) -> Shapes:
    """{official name: shape} of a whole checkpoint; call it under the meta device."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2VocoderWithBWE

    section = sections["transformer"]
    widths = section["cross_attention_dim"], section["audio_cross_attention_dim"]
    extractor = FeatureExtractor(GEMMA["hidden_size"], GEMMA_LAYERS + 1, *widths, version="V2")
    video = AutoencoderKLLTX2Video(**video_vae.diffusers_config(sections["vae"]))
    sound = AutoencoderKLLTX2Audio(**audio_vae.diffusers_config(sections["audio_vae"]))
    voice = LTX2VocoderWithBWE(**vocoder.two_stage_config(sections["vocoder"]))
    blocks = len(sections["vae"]["encoder_blocks"])
    shapes = _shapes(transformer, lambda name: TRANSFORMER + name)
    shapes |= _shapes(Connectors(section, configs.REGISTERS), lambda name: TRANSFORMER + name)
    shapes |= _shapes(extractor, lambda name: f"text_embedding_projection.{name}")
    shapes |= _shapes(video, lambda name: video_vae.PREFIX + official_vae_name(name, blocks))
    shapes |= _shapes(sound, lambda name: audio_vae.PREFIX + name)
    shapes |= _shapes(voice, lambda name: vocoder.PREFIX + official_vocoder_name(name))
    for prefix in (video_vae.PREFIX, audio_vae.PREFIX):
        shapes |= {prefix + name: (LATENT_CHANNELS,) for name in (MEAN, STD)}
    return {name: shape for name, shape in shapes.items() if not name.endswith(("latents_mean", "latents_std"))}


def write_empty(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> None:
    """A safetensors file of bf16 zeros that is a hole but for its header."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in sorted(shapes):
        end = offset + 2 * int(torch.Size(shapes[name]).numel())
        header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        os.truncate(file.fileno(), 8 + len(encoded) + offset)


def _shapes(module: nn.Module, rename: Any = lambda name: name) -> Shapes:
    return {rename(name): tuple(value.shape) for name, value in module.state_dict().items()}


def _lora_shapes(transformer: nn.Module) -> Shapes:
    """On every linear of the blocks, as the releases' distilled LoRA."""
    shapes: Shapes = {}
    for name, linear in transformer.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith("transformer_blocks."):
            shapes[f"diffusion_model.{name}.lora_A.weight"] = (DISTILLED_RANK, linear.in_features)
            shapes[f"diffusion_model.{name}.lora_B.weight"] = (linear.out_features, DISTILLED_RANK)
    return shapes


def _upsampler_shapes() -> Shapes:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    return _shapes(LTX2LatentUpsamplerModel(in_channels=LATENT_CHANNELS, mid_channels=1024, num_blocks_per_stage=4))


def _gemma_shapes() -> Shapes:
    from transformers import Gemma3TextConfig, Gemma3TextModel

    return _shapes(Gemma3TextModel(Gemma3TextConfig(**_GEMMA3)))
