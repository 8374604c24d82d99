"""Complete checkpoints in the official format at toy width, written in seconds, the same bytes each time.

Weights are random with unit-variance outputs (std 1 / sqrt(fan in), output heads not shrunk), so that a LoRA has something to move.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.cache.store import serialize, write_bytes
from musubi_tuner.ltxv2.autoencoders import audio_vae, diffusion_decoder, video_vae, vocoder
from musubi_tuner.ltxv2.autoencoders.audio_vae import log_mel
from musubi_tuner.ltxv2.autoencoders.components import MEAN, STD
from musubi_tuner.ltxv2.geometry import LATENT_CHANNELS, patchify_audio
from musubi_tuner.ltxv2.text.connectors import Connectors
from musubi_tuner.ltxv2.text.duration import PREFIX, DurationHead
from musubi_tuner.ltxv2.text.features import FeatureExtractor
from musubi_tuner.ltxv2.text.packed import SOURCE, VERSION
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny import configs
from musubi_tuner.tiny.encoders import pack_gemma4, write_gemma, write_gemma4, write_t5

TRANSFORMER = "model.diffusion_model."


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyFamily:
    """Where everything was written."""

    folder: Path
    ltx20: Path
    """Full single file, 2.0 style."""
    ltx23: Path
    """Full single file, 2.3 style."""
    ltx25_transformer: Path
    """Transformer and connectors alone, 2.5 style, as in a split pack, whose other files follow."""
    ltx25_vae: Path
    """Video VAE with the conv decoder, its names without a prefix."""
    ltx25_diffusion_vae: Path
    """The same encoder, with the diffusion decoder."""
    ltx25_audio_vae: Path
    """Audio VAE and vocoder."""
    ltx25_gemma: Path
    """Text encoder and projection in one file."""
    ltx25_duration_head: Path
    upsampler: Path
    """Latent upsampler by 2."""
    distilled_lora: Path
    """In the place of the releases' distilled LoRA: random, on the attention of every stream."""
    gemma: Path
    gemma4: Path
    """The text encoder of 2.5 as a folder."""
    t5: Path


def write_tiny_family(folder: Path) -> TinyFamily:
    """Write every tiny model into `folder`.

    Raises:
        UserError: it cannot be made, or written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be made ({error.strerror}). Choose another.") from error
    family = TinyFamily(
        folder=folder,
        ltx20=folder / "ltx2_tiny_2.0.safetensors",
        ltx23=folder / "ltx2_tiny_2.3.safetensors",
        ltx25_transformer=folder / "ltx2_tiny_2.5_transformer.safetensors",
        ltx25_vae=folder / "ltx2_tiny_2.5_video_vae_conv.safetensors",
        ltx25_diffusion_vae=folder / "ltx2_tiny_2.5_video_vae.safetensors",
        ltx25_audio_vae=folder / "ltx2_tiny_2.5_audio_vae.safetensors",
        ltx25_gemma=folder / "gemma4_tiny_with_proj_2.5.safetensors",
        ltx25_duration_head=folder / "ltx2_tiny_2.5_duration_head.safetensors",
        upsampler=folder / "ltx2_tiny_spatial_upscaler_x2.safetensors",
        distilled_lora=folder / "ltx2_tiny_distilled_lora.safetensors",
        gemma=folder / "gemma3",
        gemma4=folder / "gemma4",
        t5=folder / "t5",
    )
    for version, path in (("2.0", family.ltx20), ("2.3", family.ltx23)):
        frozen = frozen_tensors(version)
        tensors = transformer_tensors(version) | projection_tensors(version) | frozen
        write_checkpoint(path, tensors, full_config(version), version)
    write_gemma(family.gemma)
    write_gemma4(family.gemma4)
    _write_pack(family, frozen)
    write_bytes(
        family.upsampler, serialize(upsampler_tensors(), {"config": json.dumps({"spatial_scale": 2.0, "rational_resampler": True})})
    )
    write_bytes(family.distilled_lora, serialize(distilled_lora_tensors(), {}))
    write_t5(family.t5, width=configs.VIDEO_WIDTH)
    return family


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: str, further: Mapping[str, str] = MappingProxyType({})
) -> None:
    """One safetensors file with `config`, `model_version` and `further` metadata."""
    metadata = {"config": json.dumps(config, sort_keys=True), "model_version": configs.MODEL_VERSIONS[version], **further}
    write_bytes(path, serialize(tensors, metadata))


def _write_pack(family: TinyFamily, frozen: Mapping[str, Tensor]) -> None:
    """The files of 2.5.

    Args:
        frozen: VAEs and vocoder of 2.3, which 2.5 shares: the latents of both are the same.
    """
    config = full_config("2.5")
    source = {SOURCE: json.dumps({VERSION: configs.GEMMA4_VERSION})}
    write_checkpoint(family.ltx25_transformer, transformer_tensors("2.5"), {"transformer": config["transformer"]}, "2.5", source)
    video = {name.removeprefix(video_vae.PREFIX): tensor for name, tensor in frozen.items() if name.startswith(video_vae.PREFIX)}
    write_checkpoint(family.ltx25_vae, video, {"vae": config["vae"]}, "2.5")
    encoder = {name: tensor for name, tensor in video.items() if not name.startswith("decoder.")}
    write_checkpoint(family.ltx25_diffusion_vae, encoder | diffusion_decoder_tensors(), {"vae": configs.diffusion_vae_section()}, "2.5")
    sound = {name: tensor for name, tensor in frozen.items() if name.startswith((audio_vae.PREFIX, vocoder.PREFIX))}
    write_checkpoint(family.ltx25_audio_vae, sound, {key: config[key] for key in ("audio_vae", "vocoder")}, "2.5")
    tensors, metadata = pack_gemma4(family.gemma4, projection_tensors("2.5"))
    write_bytes(family.ltx25_gemma, serialize(tensors, metadata))
    write_bytes(family.ltx25_duration_head, serialize(duration_head_tensors(), {}))


def full_config(version: str) -> dict[str, Any]:
    return {
        "transformer": configs.transformer_section(version),
        "vae": configs.vae_section(version),
        "audio_vae": configs.audio_vae_section(),
        "vocoder": configs.vocoder_section(version),
    }


def transformer_tensors(version: str) -> dict[str, Tensor]:
    """Transformer and connectors under the official prefix."""
    section = configs.transformer_section(version)
    model = LTXModel(TransformerConfig.from_checkpoint_config(section))
    connectors = Connectors(section, configs.REGISTERS)
    parts = _randomized(model, f"transformer {version}") | _randomized(connectors, f"connectors {version}")
    return {TRANSFORMER + name: tensor for name, tensor in parts.items()}


def projection_tensors(version: str, *, states: int = configs.GEMMA_LAYERS + 1) -> dict[str, Tensor]:
    """The text projection for the tiny Gemmas, which give so many hidden states."""
    video, audio = (configs.CAPTION_CHANNELS,) * 2 if version == "2.0" else (configs.VIDEO_WIDTH, configs.AUDIO_WIDTH)
    extractor = FeatureExtractor(configs.GEMMA_WIDTH, states, video, audio, version="V1" if version == "2.0" else "V2")
    return {f"text_embedding_projection.{name}": tensor for name, tensor in _randomized(extractor, f"projection {version}").items()}


def frozen_tensors(version: str) -> dict[str, Tensor]:
    """Both VAEs and the vocoder, statistics included."""
    return vae_tensors(version) | audio_tensors(version)


def upsampler_tensors() -> dict[str, Tensor]:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    return _randomized(LTX2LatentUpsamplerModel(in_channels=LATENT_CHANNELS, mid_channels=32, num_blocks_per_stage=1), "upsampler")


def duration_head_tensors() -> dict[str, Tensor]:
    """Of 1 to 3 seconds, by the text."""
    head = DurationHead((configs.VIDEO_WIDTH, configs.AUDIO_WIDTH), width=16, queries=1, hidden=16)
    tensors = _randomized(head, "duration head")
    tensors["mlp_out.bias"] = torch.full((1,), math.log(1.7))
    return {f"{PREFIX}{name}": tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def distilled_lora_tensors() -> dict[str, Tensor]:
    """Of rank 4, in the official naming."""
    model = LTXModel(TransformerConfig.from_checkpoint_config(configs.transformer_section("2.3")))
    tensors = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and re.search(r"attn\w*\.to_(q|k|v|out\.0)$", name):
            for leaf, shape in (("lora_A", (4, linear.in_features)), ("lora_B", (linear.out_features, 4))):
                key = f"diffusion_model.{name}.{leaf}.weight"
                tensors[key] = 0.1 * torch.randn(shape, generator=generator_for(0, "distilled lora", key)) / shape[1] ** 0.5
    return tensors


def vae_tensors(version: str, **changes: Any) -> dict[str, Tensor]:
    """
    Args:
        changes: of keys of the `vae` section.
    """
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video

    section = configs.vae_section(version) | changes
    network = AutoencoderKLLTX2Video(**video_vae.diffusers_config(section)).eval()
    parts = _randomized(network, f"vae {version}")
    network.load_state_dict(parts)
    with torch.no_grad():
        means = network.encode(_pictures(), return_dict=False)[0].mode().transpose(0, 1).flatten(1)
    blocks = len(section["encoder_blocks"])
    tensors = {official_vae_name(name, blocks): tensor for name, tensor in parts.items() if not name.startswith("latents_")}
    tensors |= {MEAN: means.mean(1), STD: means.std(1) + 1e-3}
    return {video_vae.PREFIX + name: tensor for name, tensor in tensors.items()}


def diffusion_decoder_tensors() -> dict[str, Tensor]:
    """The diffusion decoder of 2.5, its names without a prefix."""
    from diffusers import LTX2VideoDiffusionDecoderModel

    network: Any = LTX2VideoDiffusionDecoderModel(**diffusion_decoder.diffusers_config(configs.diffusion_vae_section()))
    diffusion_decoder.fuse_attention(network)
    parts = _randomized(network, "diffusion decoder")
    return {_official_decoder_name(name): tensor for name, tensor in parts.items() if not name.startswith("latents_")}


def audio_tensors(version: str) -> dict[str, Tensor]:
    from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio

    network = AutoencoderKLLTX2Audio(**audio_vae.diffusers_config(configs.audio_vae_section())).eval()
    parts = _randomized(network, "audio vae")
    network.load_state_dict(parts)
    with torch.no_grad():
        means = patchify_audio(network.encode(log_mel(_sounds()), return_dict=False)[0].mode()).flatten(0, 1)
    tensors = {name: tensor for name, tensor in parts.items() if not name.startswith("latents_")}
    tensors |= {MEAN: means.mean(0), STD: means.std(0) + 1e-3}
    tensors = {audio_vae.PREFIX + name: tensor for name, tensor in tensors.items()}
    return tensors | {vocoder.PREFIX + name: tensor for name, tensor in _vocoder_tensors(version).items()}


def _vocoder_tensors(version: str) -> dict[str, Tensor]:
    from diffusers.pipelines.ltx2 import LTX2Vocoder, LTX2VocoderWithBWE

    section = configs.vocoder_section(version)
    two_stages = "bwe" in section
    network = LTX2VocoderWithBWE(**vocoder.two_stage_config(section)) if two_stages else LTX2Vocoder(**vocoder.generator_config(section))
    parts = _randomized(network, f"vocoder {version}")
    parameters = dict(network.named_parameters())
    for name in parts:
        if name in parameters:
            parts[name] = parts[name] * 0.5  # quiet: residual branches add up to a waveform that would clip throughout
        if name.endswith("forward_basis"):
            parts[name] = fourier_basis(section["bwe"]["n_fft"])
        elif name.endswith("mel_basis"):
            parts[name] = mel_basis(tuple(parts[name].shape))
    return {official_vocoder_name(name): tensor for name, tensor in parts.items()}


def _randomized(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Random values for parameters, by name; buffers (filters) stay as built."""
    parameters = dict(module.named_parameters())
    values = {}
    for key, tensor in module.state_dict().items():
        values[key] = _random(key, tensor, name) if key in parameters else tensor.clone()
    return values


def _random(key: str, tensor: Tensor, name: str) -> Tensor:
    if not tensor.ndim:  # the multiplier of timesteps
        return tensor.detach().clone()
    noise = torch.randn(tensor.shape, generator=generator_for(0, name, key))
    if re.search(r"norm\d?\.weight$", key):
        return 1 + 0.1 * noise
    if key.endswith((".alpha", ".beta")):
        return 0.1 * noise
    if "table" in key or key.endswith("keyframes_abs_pos_embedding"):
        return 0.3 * noise
    if key.endswith("learnable_registers"):
        return noise
    if tensor.ndim == 1:
        return 0.1 * noise
    fan_in = tensor[0].numel()
    if re.search(r"upsamplers\.\d+\.weight$", key) and tensor.ndim == 3:  # transposed convolution: (in, out, kernel)
        fan_in = tensor.shape[0] * 2
    return noise / math.sqrt(fan_in)


def _pictures() -> Tensor:
    """(2, 3, 17, 128, 128) moving gradients and blocks in -1..1, for the statistics."""
    generator = generator_for(0, "pictures")
    coarse = torch.rand(2, 3, 3, 8, 8, generator=generator) * 2 - 1
    smooth = nn.functional.interpolate(coarse, size=(17, 128, 128), mode="trilinear")
    blocks = nn.functional.interpolate(torch.rand(2, 3, 17, 16, 16, generator=generator) * 2 - 1, size=(17, 128, 128), mode="nearest")
    return (0.7 * smooth + 0.3 * blocks).clamp(-1, 1)


def _sounds() -> Tensor:
    """(4, 2, 16000) tones and noise, for the statistics."""
    generator = generator_for(0, "sounds")
    time = torch.arange(16000) / 16000
    pitches = torch.rand(4, 2, 3, 1, generator=generator) * 2000 + 80
    tones = (torch.sin(2 * math.pi * pitches * time) * torch.rand(4, 2, 3, 1, generator=generator)).sum(2) * 0.15
    return tones + 0.02 * torch.randn(4, 2, 16000, generator=generator)


def fourier_basis(size: int) -> Tensor:
    """(size + 2, 1, size) windowed cosines, then sines: a short-time Fourier transform as a convolution."""
    bins = torch.arange(size // 2 + 1, dtype=torch.float64)[:, None]
    angles = 2 * math.pi * bins * torch.arange(size, dtype=torch.float64) / size
    window = torch.hann_window(size, dtype=torch.float64)
    return (torch.cat([angles.cos(), -angles.sin()]) * window).float()[:, None]


def mel_basis(shape: tuple[int, ...]) -> Tensor:
    """(mels, bins) overlapping triangles, denser at low frequencies."""
    mels, bins = shape
    edges = (torch.linspace(0, 1, mels + 2, dtype=torch.float64) ** 2) * (bins - 1)
    grid = torch.arange(bins, dtype=torch.float64)[None]
    left, center, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    width = 1.0
    triangles = torch.minimum((grid - left + width) / (center - left + width), (right - grid + width) / (right - center + width))
    return (triangles.clamp(min=0) / 8).float()


def official_vae_name(name: str, encoder_blocks: int) -> str:
    """The inverse of `video_vae.to_diffusers_name`."""
    rules: Sequence[tuple[str, Any]] = (
        (r"encoder\.mid_block\.", f"encoder.down_blocks.{encoder_blocks - 1}."),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", lambda m: f"encoder.down_blocks.{2 * int(m[1]) + 1}."),
        (r"encoder\.down_blocks\.(\d+)\.(?=resnets)", lambda m: f"encoder.down_blocks.{2 * int(m[1])}."),
        (r"decoder\.(?=time_embedder|scale_shift_table)", "decoder.last_"),
        (r"decoder\.mid_block\.", "decoder.up_blocks.0."),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"decoder.up_blocks.{2 * int(m[1]) + 1}."),
        (r"decoder\.up_blocks\.(\d+)\.(?=resnets|time_embedder)", lambda m: f"decoder.up_blocks.{2 * int(m[1]) + 2}."),
    )
    for pattern, replacement in rules:
        if re.match(pattern, name):
            name = re.sub(pattern, replacement, name, count=1)
            break
    return name.replace("resnets", "res_blocks")


def _official_decoder_name(name: str) -> str:
    """The inverse of `diffusion_decoder.to_diffusers_name`."""
    for official, theirs in diffusion_decoder.RENAMED:
        name = name.replace(theirs, official)
    return name


def official_vocoder_name(name: str) -> str:
    """The inverse of `vocoder.to_diffusers_name`."""
    name = name.replace("upsamplers.", "ups.").replace("resnets.", "resblocks.")
    name = name.replace("conv_in", "conv_pre").replace("conv_out", "conv_post").replace("act_out", "act_post")
    return re.sub(r"downsample\.(?!lowpass)", "downsample.lowpass.", name)
