"""The diffusion decoder of LTX-2.5: diffusers' network, the official config and weights, and attention that runs everywhere.

Four stages make a context of the latents, a quarter as wide and high as the frames; on it, pixels are predicted from noise in one step.
The noise is the same for every clip, so that the same latents give the same frames. diffusers' own attention needs a kernel that is fetched
from the hub, or masks larger than a card.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.ltxv2.autoencoders.components import MEAN, STD, Component, as_dtype, load_frozen, weight_bytes
from musubi_tuner.ltxv2.autoencoders.neighborhood import neighborhood_attention
from musubi_tuner.ltxv2.geometry import SPATIAL_SCALE, TEMPORAL_SCALE
from musubi_tuner.ltxv2.weights import Checkpoint, building_from
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.runtime.errors import UserError

CLASS = "CausalDiffusionVAE"
"""`_class_name` of a VAE that has this decoder."""

_GATES = (".gate_msa", ".gate_mlp", ".gate_ctx")
ASIDE = re.compile(r"decoder\.(.*\.)?(coarse_|type_emb)")
"""Heads for coarse pictures, which decoding does not use."""
_TILE_UNITS, _FEATURES, _COLORS, _FINISHED = 11.5, 4.0, 3.3, 13.0
"""Memory of decoding. The last stages hold so many tensors of their width, at a quarter of the frames' width and height, for the tile that
is made. For each pixel of the whole clip there are, in numbers of the compute dtype, features of the stages before, and the colors of tiles
that are made, overlaps included; and at the end these, put together and in float32. Counted on tensors without storage
(docs/development/benchmarks.md, "What generation holds")."""
_FRAMES_OF_THE_END = 2
"""What the repeated last latent frame adds to a tile."""
_REMEDY = "Give --vae the file 'ltx-2.5-video-vae-conv' of the same release; the latents are the same."
RENAMED = (
    (".attn.proj.", ".attn.to_out.0."),
    (".attn.q_norm.", ".attn.norm_q."),
    (".attn.k_norm.", ".attn.norm_k."),
    ("t_embedder.mlp.0.", "t_embedder.timestep_embedder.linear_1."),
    ("t_embedder.mlp.2.", "t_embedder.timestep_embedder.linear_2."),
)
"""Parts of names: (official, diffusers')."""


class DiffusionDecoder:
    """Latents on the VAE's own scale -> pixels in -1..1."""

    def __init__(self, network: Any, dtype: torch.dtype) -> None:
        self._network = network
        self._dtype = dtype
        self._least = least_cells(network.config)
        network.enable_tiling()  # 768 pixels and 80 frames, as the official code

    @classmethod
    def load(cls, component: Component, checkpoint: Checkpoint, *, device: torch.device | str, dtype: torch.dtype) -> "DiffusionDecoder":
        """
        Raises:
            UserError: a config that no such decoder can be built from, gates, or tensors that do not fit.
        """
        names = {name: full for name, full in component.names.items() if name.startswith("decoder.") and not ASIDE.match(name)}
        if gate := next((full for name, full in names.items() if name.endswith(_GATES)), None):
            raise UserError(f"{checkpoint.path}: a diffusion decoder with gates ('{gate}'), which is not read. {_REMEDY}")
        network = _build(component, checkpoint)
        sources = {to_diffusers_name(name): full for name, full in names.items()}
        statistics = {"latents_mean": MEAN, "latents_std": STD}
        sources |= {name: component.names[own] for name, own in statistics.items() if own in component.names}
        return cls(load_frozen(network, sources, checkpoint, device, dtype), dtype)

    @classmethod
    def on_meta(cls, component: Component, checkpoint: Checkpoint, dtype: torch.dtype) -> "DiffusionDecoder":
        """Without weights, for counting; raises what `load` does of the config."""
        return cls(as_dtype(_build(component, checkpoint), dtype), dtype)

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self._network)

    def use_tiles(self, *, pixels: int, overlap: int, frames: int, shared: int) -> None:
        """Take frames above these sizes in tiles from now on, whose noise is each tile's own.

        Args:
            overlap: pixels that neighbors share.
            shared: frames that they share.
        """
        self._network.enable_tiling(pixels, pixels, frames, pixels - overlap, pixels - overlap, frames - shared)

    def decoding_bytes(self, cells: tuple[int, int, int]) -> int:
        """What decoding latents of `cells` (f, h, w) takes beside the weights, by the rule of `_TILE_UNITS`."""
        network = self._network
        frames, height, width = (cells[0] - 1) * TEMPORAL_SCALE + 1, cells[1] * SPATIAL_SCALE, cells[2] * SPATIAL_SCALE
        tile = min(frames, network.tile_sample_min_num_frames) + _FRAMES_OF_THE_END
        tile *= min(height, network.tile_sample_min_height) * min(width, network.tile_sample_min_width)
        unit = network.config.decoder_stage_channels[-1] * self._dtype.itemsize / network.config.patch_size**2
        clip = frames * height * width * self._dtype.itemsize
        overlaps = network.tile_sample_min_num_frames / network.tile_sample_stride_num_frames
        return int(max(_TILE_UNITS * unit * tile + (_FEATURES + _COLORS * overlaps) * clip, _FINISHED * clip))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, 128, f, h, w) -> (B, 3, 8(f-1)+1, 32h, 32w) float32, about -1..1.

        Clips that are smaller than the attention's boxes get their last cells repeated, and are cut again.
        """
        cells = latents.shape[2:]
        missing = [max(0, least - count) for least, count in zip(self._least, cells, strict=True)]
        padded = F.pad(latents, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
        generator = generator_for(0, "diffusion decoder")
        pixels = self._network.decode(padded.to(self._dtype), generator=generator, return_dict=False)[0]
        frames, height, width = (cells[0] - 1) * TEMPORAL_SCALE + 1, cells[1] * SPATIAL_SCALE, cells[2] * SPATIAL_SCALE
        return pixels[:, :, :frames, :height, :width].float()


def _build(component: Component, checkpoint: Checkpoint) -> Any:
    """diffusers' network on the meta device.

    Raises:
        UserError: a config that no such decoder can be built from.
    """
    from diffusers import LTX2VideoDiffusionDecoderModel

    try:
        with building_from(checkpoint, "vae"), torch.device("meta"):
            network: Any = LTX2VideoDiffusionDecoderModel(**diffusers_config(component.config))
            fuse_attention(network)
    except UserError as error:
        raise UserError(f"{error} {_REMEDY}") from error
    return network


class TiledNeighborhoods:
    """Runs an attention of the network, whose projections `fuse_attention` has joined."""

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: None = None) -> Tensor:
        """(B, T, H, W, C) -> (B, T, H, W, C)"""
        shape = (*hidden_states.shape[:4], attn.heads, attn.head_dim)
        query, key, value = (one.view(shape) for one in attn.qkv(hidden_states).chunk(3, dim=-1))
        query, key = attn.rope(attn.norm_q(query) * attn.scale), attn.rope(attn.norm_k(key))
        return attn.to_out[0](neighborhood_attention(query, key, value, attn.kernel_size).flatten(-2))


def fuse_attention(network: nn.Module) -> None:
    """Queries, keys and values of each attention from one linear, as the official file has them, and by `TiledNeighborhoods`."""
    from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoVaeNeighborhoodAttention

    for module in network.modules():
        if isinstance(module, LTX2VideoVaeNeighborhoodAttention):
            attention: Any = module
            width = attention.to_q.in_features
            del attention.to_q, attention.to_k, attention.to_v
            attention.qkv = nn.Linear(width, 3 * width)
            attention.set_processor(TiledNeighborhoods())


def diffusers_config(section: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' class for a `vae` section of the class `CLASS`.

    Raises:
        UserError: keys that are missing, or a value that this is not written for.
    """
    config = section.get("decoder")
    if not isinstance(config, Mapping) or "stage_channels" not in config:
        raise UserError("checkpoint config: vae.decoder has no 'stage_channels' of a diffusion decoder.")
    if config.get("resampler_kind", "linear") != "linear":
        raise UserError(f"checkpoint config: vae.decoder.resampler_kind is {config['resampler_kind']!r}; only 'linear' is supported.")
    channels, upsamples = config["stage_channels"], config["upsamples"]
    kernels = [tuple(kernel) for kernel in config["stage_kernels"]]
    return {
        "out_channels": config.get("out_channels", 3),
        "latent_channels": config.get("in_channels", 128),
        "patch_size": config.get("patch_size", 4),
        "decoder_head_dim": config.get("head_dim", 64),
        "decoder_stage_channels": tuple(channels),
        "decoder_stage_depths": tuple(config["stage_depths"]),
        "decoder_stage_kernels": tuple(kernels[: len(upsamples)]),
        "decoder_upsample_strides": tuple(tuple(strides) for strides, _ in upsamples),
        "decoder_upsample_channel_reductions": tuple(wide // narrow for wide, narrow in zip(channels, channels[1:])),
        "decoder_stage5_kernel": tuple(config.get("stage5_kernel") or kernels[-1]),
        "decoder_t_emb_dim": config.get("t_emb_dim", 384),
        "decoder_timestep_scale_multiplier": config.get("timestep_scale_multiplier", 1000.0),
        "decoder_model_output_type": section.get("model_output_type", "x0"),
        "decoder_num_inference_steps": config.get("default_num_inference_steps", 1),
        "spatial_compression_ratio": SPATIAL_SCALE,
        "temporal_compression_ratio": TEMPORAL_SCALE,
    }


def to_diffusers_name(name: str) -> str:
    """An official name as diffusers has it, but for the fused `qkv`."""
    for official, theirs in RENAMED:
        name = name.replace(official, theirs)
    return name


def least_cells(config: Any) -> tuple[int, int, int]:
    """The smallest latents that each stage's boxes fit into: frames, rows, columns.

    Args:
        config: of diffusers' network.
    """
    kernels, strides = [*config.decoder_stage_kernels, config.decoder_stage5_kernel], config.decoder_upsample_strides
    frames = next(count for count in range(1, 1000) if _fits_in_time(count, kernels, strides))
    return frames, _least_in_space(1, kernels, strides), _least_in_space(2, kernels, strides)


def _fits_in_time(frames: int, kernels: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]) -> bool:
    """The last latent frame is repeated for the first four stages, which lose a frame where they double them."""
    count = frames + kernels[0][0] // 2 * 2
    for kernel, stride in zip(kernels, strides):
        if count < kernel[0]:
            return False
        count = count * stride[0] - (stride[0] - 1)
    return (frames - 1) * TEMPORAL_SCALE + 1 >= kernels[-1][0]


def _least_in_space(axis: int, kernels: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]) -> int:
    least, scale = 1, 1
    for place, kernel in enumerate(kernels):
        least = max(least, -(-kernel[axis] // scale))
        scale *= strides[place][axis] if place < len(strides) else 1
    return least
