"""The video VAE: diffusers' network, the official config and weights, latents normalized as the official encoder returns them."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.ltxv2.autoencoders.causal import clip_in_parts, use_layout
from musubi_tuner.ltxv2.autoencoders.components import MEAN, STD, Component, as_dtype, find_component, load_frozen, weight_bytes
from musubi_tuner.ltxv2.autoencoders.diffusion_decoder import CLASS, DiffusionDecoder
from musubi_tuner.ltxv2.autoencoders.tiling import AxisTiles, Span, overlaps, ramp, run_in_parts, run_tiled
from musubi_tuner.ltxv2.geometry import SPATIAL_SCALE, TEMPORAL_SCALE
from musubi_tuner.ltxv2.weights import Checkpoint, building_from
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.runtime.errors import UserError

PREFIX = "vae."
_MARKS = ("encoder.conv_in.", "decoder.conv_in.")
_ANY_DECODER = (("res_x", {"num_layers": 0}), ("compress_all", {}), ("res_x", {"num_layers": 0}))
"""Stands in where the decoder is not wanted: diffusers' class cannot be built without one."""
_CONVERTED_FRAMES = 8
_LOG_VARIANCES = ("uniform", "constant")
"""Of the latents, in one channel beside their means, which alone are used; the second is that of the file with the diffusion decoder."""
_DECODER_NOISE, _DECODER_TIMESTEP = 0.025, 0.05
"""Share of noise in latents, and the timestep told, of a decoder that is conditioned on one; those of the official code."""
_STRIDES = {"space": "spatial", "time": "temporal", "all": "spatiotemporal"}


@dataclass(frozen=True, slots=True)
class TileSizes:
    """Above these sizes frames are coded in tiles; overlaps cover 64 pixels and 16 frames and more. In time only decoding needs tiles:
    an encoder of the past takes so many frames at a time, and its latents are those of the whole.

    Farther from a seam than the network reaches, tiles equal the whole. At seams the difference shrinks with the overlap: on random
    weights, the hardest case, it is in the mean below a fifth of the values' own spread, and of twice the overlap below a tenth.
    """

    pixels: int = 768
    pixel_overlap: int = 128
    frames: int = 80
    frame_overlap: int = 24

    @property
    def space(self) -> AxisTiles:
        return AxisTiles(self.pixels // SPATIAL_SCALE, self.pixel_overlap // SPATIAL_SCALE)

    @property
    def time(self) -> AxisTiles:
        return AxisTiles(self.frames // TEMPORAL_SCALE, self.frame_overlap // TEMPORAL_SCALE)


ENCODER_TILES = TileSizes(pixels=1280, frames=32)
"""What caching takes by default, and previews for their conditioning inputs: 1280x704 in one piece, in less than 4 GB."""
DECODER_TILES = (TileSizes(), TileSizes(pixels=512, frames=48), TileSizes(pixels=256, pixel_overlap=64, frames=32, frame_overlap=16))
"""What decoding takes, the usual one first; the others where the card has no room for it (placement/decoding.py)."""


class VideoVAE:
    """Pixels in -1..1 <-> normalized latents."""

    def __init__(self, network: Any, tiles: TileSizes, dtype: torch.dtype, diffusion: DiffusionDecoder | None = None) -> None:
        """
        Args:
            diffusion: decodes in place of the network.
        """
        self._network = network
        self._diffusion = diffusion
        self._tiles = tiles
        self._dtype = dtype
        if network.encoder is not None:
            use_layout(network.encoder, "contiguous")

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        parts: tuple[str, ...] = ("encoder", "decoder"),
        tiles: TileSizes | None = None,
    ) -> "VideoVAE":
        """Build from the checkpoint's `vae` section and load the wanted parts, frozen.

        Raises:
            UserError: no video VAE in the file, or a config that this is not written for.
        """
        component = find_vae(checkpoint)
        usual, diffusion = DECODER_TILES[0] if "decoder" in parts else ENCODER_TILES, None
        if "decoder" in parts and component.config.get("_class_name") == CLASS:
            diffusion = DiffusionDecoder.load(component, checkpoint, device=device, dtype=dtype)
            parts = tuple(part for part in parts if part != "decoder")
        network, blocks = _build(component, checkpoint, parts)
        wanted = tuple(f"{part}." for part in parts)
        sources = {
            to_diffusers_name(name, blocks): full
            for name, full in component.names.items()
            if name.startswith(wanted) or name in (MEAN, STD)
        }
        return cls(load_frozen(network, sources, checkpoint, device, dtype), tiles or usual, dtype, diffusion)

    @classmethod
    def decoder_on_meta(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> "VideoVAE":
        """The decoder without weights, for counting; raises what `load` does of the config."""
        component = find_vae(checkpoint)
        is_diffusion = component.config.get("_class_name") == CLASS
        diffusion = DiffusionDecoder.on_meta(component, checkpoint, dtype) if is_diffusion else None
        network, _ = _build(component, checkpoint, () if is_diffusion else ("decoder",))
        return cls(as_dtype(network, dtype), DECODER_TILES[0], dtype, diffusion)

    @property
    def device(self) -> torch.device:
        return self._network.latents_mean.device

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self._network) + (0 if self._diffusion is None else self._diffusion.weight_bytes)

    def diffusion_bytes(self, cells: tuple[int, int, int]) -> int | None:
        """What a diffusion decoder takes beside its weights for latents of `cells`; None where it is the other one."""
        return None if self._diffusion is None else self._diffusion.decoding_bytes(cells)

    def use_tiles(self, tiles: TileSizes) -> None:
        """Code in tiles of these sizes from now on."""
        self._tiles = tiles
        if self._diffusion is not None:
            self._diffusion.use_tiles(
                pixels=tiles.pixels, overlap=tiles.pixel_overlap // 2, frames=tiles.frames, shared=tiles.frame_overlap
            )

    def largest_tile(self, cells: tuple[int, int, int]) -> tuple[int, int, int]:
        """(f, h, w) of the largest piece in which latents of `cells` are decoded at a time."""
        axes = (self._tiles.time, self._tiles.space, self._tiles.space)
        frames, rows, columns = (max(end - start for start, end in axis.places(count)) for axis, count in zip(axes, cells, strict=True))
        return frames, rows, columns

    def use_layout(self, name: str) -> None:
        """Have the encoder in a memory layout (`causal.LAYOUTS`); latents differ by rounding alone."""
        use_layout(self._network.encoder, name)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, F, H, W) in -1..1, F = 8n+1 and sides multiples of 32 -> (B, 128, f, h, w) float32 normalized means."""
        return self._encode_in_tiles(pixels, lambda part: part)

    @torch.inference_mode()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """(B, F, H, W, 3) uint8 -> as `encode`, of the same values; only a part of them is held in the dtype that the VAE computes in."""
        return self._encode_in_tiles(frames.permute(0, 4, 1, 2, 3), lambda part: in_unit_range(part, self._dtype))

    def _encode_in_tiles(self, x: Tensor, to_pixels: Callable[[Tensor], Tensor]) -> Tensor:
        batch, _, frames, height, width = x.shape
        cells = ((frames - 1) // TEMPORAL_SCALE + 1, height // SPATIAL_SCALE, width // SPATIAL_SCALE)
        whole = Span(slice(0, frames), slice(0, cells[0]), torch.ones(cells[0]))
        rows, columns = (_space_spans(count, self._tiles.space, encode=True) for count in cells[1:])
        if len(rows) == len(columns) == 1:
            return self._encode_in_parts(x, to_pixels)
        channels = self._network.latents_mean.numel()
        return run_tiled(x, ([whole], rows, columns), (batch, channels, *cells), lambda tile: self._encode_in_parts(tile, to_pixels))

    def _encode_in_parts(self, x: Tensor, to_pixels: Callable[[Tensor], Tensor]) -> Tensor:
        """The first latent frame stands for one pixel frame, so the first part is 7 frames shorter than the others."""
        frames, longest = x.shape[2], self._tiles.time.size * TEMPORAL_SCALE
        starts = [0, *range(longest - TEMPORAL_SCALE + 1, frames, longest)]
        if len(starts) == 1:
            return self._encode(to_pixels(x))
        with clip_in_parts(self._network.encoder):
            ends = [*starts[1:], frames]
            return torch.cat([self._encode(to_pixels(x[:, :, start:end])) for start, end in zip(starts, ends, strict=True)], dim=2)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, 128, f, h, w) normalized -> (B, 3, 8(f-1)+1, 32h, 32w) float32, about -1..1.

        A decoder that is conditioned on a timestep takes away a little noise, which is the same for every clip here.
        """
        return torch.cat(list(self.decode_in_parts(latents, device=None)), dim=2)

    @torch.inference_mode()
    def decode_in_parts(self, latents: Tensor, *, device: torch.device | None) -> Iterator[Tensor]:
        """What `decode` gives, as consecutive parts along the frames, so that nobody has to hold a long clip in float32.

        Args:
            device: where parts are put together; None = the decoder's.
        """
        if self._diffusion is not None:
            pixels = self._diffusion.decode(self._raw(latents))
            yield pixels if device is None else pixels.to(device)
            return
        if self._network.config.timestep_conditioning:
            noise = torch.randn(latents.shape, generator=generator_for(0, "decoder noise")).to(latents)
            latents = (1 - _DECODER_NOISE) * latents + _DECODER_NOISE * noise
        batch, _, *cells = latents.shape
        rows, columns = (_space_spans(count, self._tiles.space, encode=False) for count in cells[1:])
        spans = (_time_spans(cells[0], self._tiles.time), rows, columns)
        if all(len(axis) == 1 for axis in spans):
            yield self._decode(latents)
            return
        shape = (batch, 3, (cells[0] - 1) * TEMPORAL_SCALE + 1, cells[1] * SPATIAL_SCALE, cells[2] * SPATIAL_SCALE)
        yield from run_in_parts(latents, spans, shape, self._decode, device=device)

    def _encode(self, pixels: Tensor) -> Tensor:
        mean = self._network.encode(pixels.to(device=self.device, dtype=self._dtype)).latent_dist.mode().float()
        return (mean - self._statistic("latents_mean")) / self._statistic("latents_std")

    def _decode(self, latents: Tensor) -> Tensor:
        timestep = None
        if self._network.config.timestep_conditioning:
            timestep = torch.full(latents.shape[:1], _DECODER_TIMESTEP, device=self.device, dtype=self._dtype)
        return self._network.decode(self._raw(latents).to(self._dtype), timestep, return_dict=False)[0].float()

    def _raw(self, latents: Tensor) -> Tensor:
        """On the VAE's own scale, float32."""
        return latents.to(self.device).float() * self._statistic("latents_std") + self._statistic("latents_mean")

    def _statistic(self, name: str) -> Tensor:
        return getattr(self._network, name).float().view(1, -1, 1, 1, 1)


def _build(component: Component, checkpoint: Checkpoint, parts: tuple[str, ...]) -> tuple[Any, int]:
    """diffusers' network on the meta device with these parts alone, and how many blocks the config lists for the encoder."""
    from diffusers import AutoencoderKLLTX2Video

    with building_from(checkpoint, "vae"), torch.device("meta"):
        config = encoder_section(component.config)
        if "decoder" not in parts:
            config["decoder_blocks"] = _ANY_DECODER
        network: Any = AutoencoderKLLTX2Video(**diffusers_config(config))
    for part in ("encoder", "decoder"):
        if part not in parts:
            setattr(network, part, None)
    return network, len(config["encoder_blocks"])


def in_unit_range(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, F, H, W) uint8 -> -1..1; reckoned in float32 and rounded once, a few frames at a time: float32 is four times their size."""
    pixels = torch.empty_like(frames, dtype=dtype)
    for start in range(0, frames.shape[2], _CONVERTED_FRAMES):
        part = slice(start, start + _CONVERTED_FRAMES)
        pixels[:, :, part] = frames[:, :, part].float().div_(127.5).sub_(1)
    return pixels


def find_vae(checkpoint: Checkpoint) -> Component:
    """Config and tensor names of the video VAE.

    Raises:
        UserError: the file holds none.
    """
    return find_component(checkpoint, "vae", PREFIX, _MARKS, what="video VAE", flag="--vae")


def vae_names(checkpoint: Checkpoint) -> Mapping[str, str]:
    """{bare official name: full name} of the video VAE's tensors; raises what `find_vae` does."""
    return find_vae(checkpoint).names


def video_vae_fingerprint(checkpoint: Checkpoint) -> str:
    """Identity of what shapes latents: the encoder, the statistics and their config."""
    component = find_vae(checkpoint)
    names = {name: full for name, full in component.names.items() if name.startswith("encoder.") or name in (MEAN, STD)}
    with building_from(checkpoint, "vae"):
        config = encoder_section(component.config)
    shaping = {key: config[key] for key in ("encoder_blocks", "patch_size", "norm_layer", "spatial_padding_mode") if key in config}
    return component.fingerprint(checkpoint, names, shaping)


def encoder_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `vae` section without nesting: that of the diffusion VAE of 2.5 keeps its encoder's keys in an object of their own.

    Raises:
        UserError: no blocks of an encoder.
    """
    nested = config.get("encoder")
    flat = {key: value for key, value in config.items() if key not in ("encoder", "decoder")}
    flat |= nested if isinstance(nested, Mapping) else {}
    if "encoder_blocks" not in flat and "blocks" in flat:
        flat["encoder_blocks"] = flat.pop("blocks")
    if "encoder_blocks" not in flat:
        raise UserError(f"checkpoint config: vae has no 'encoder_blocks'; its keys are {', '.join(sorted(config))}.")
    return flat


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' class for an official `vae` section.

    Raises:
        UserError: a value or a block that this is not written for.
    """
    for key, *values in (("dims", 3), ("norm_layer", "pixel_norm"), ("latent_log_var", *_LOG_VARIANCES), ("causal_decoder", False)):
        if config.get(key, values[0]) not in values:
            raise UserError(f"checkpoint config: vae.{key} is {config[key]!r}; only {' and '.join(map(repr, values))} is supported.")
    latent_channels = config.get("latent_channels", 128)
    encoder = _parse_blocks(config["encoder_blocks"], "_res")
    decoder = _parse_blocks(config.get("decoder_blocks", ()), "")
    base = config.get("decoder_base_channels", 128)
    padding = config.get("spatial_padding_mode")
    return {
        "in_channels": config.get("in_channels", 3),
        "out_channels": config.get("out_channels", 3),
        "latent_channels": latent_channels,
        "patch_size": config.get("patch_size", 4),
        "block_out_channels": encoder.channels(latent_channels),
        "down_block_types": ("LTX2VideoDownBlock3D",) * len(encoder.strides),
        "layers_per_block": encoder.layers,
        "spatio_temporal_scaling": (True,) * len(encoder.strides),
        "downsample_type": encoder.strides,
        "decoder_block_out_channels": decoder.channels_from_top(8 * base),
        "decoder_layers_per_block": decoder.layers,
        "decoder_spatio_temporal_scaling": (True,) * len(decoder.strides),
        "decoder_inject_noise": (False,) * len(decoder.layers),
        "upsample_type": tuple(reversed(decoder.strides)),
        "upsample_residual": decoder.residual,
        "upsample_factor": decoder.multipliers,
        "timestep_conditioning": config.get("timestep_conditioning", True),
        "encoder_causal": True,
        "decoder_causal": False,
        "encoder_spatial_padding_mode": padding or "zeros",
        "decoder_spatial_padding_mode": padding or "reflect",
        "spatial_compression_ratio": SPATIAL_SCALE,
        "temporal_compression_ratio": TEMPORAL_SCALE,
    }


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A block list in its stored order."""

    layers: tuple[int, ...]
    strides: tuple[str, ...]
    multipliers: tuple[int, ...]
    residual: tuple[bool, ...]

    def channels_from_top(self, width: int) -> tuple[int, ...]:
        """Widths where each upsampling begins: the deepest one is given, each step divides by its multiplier."""
        widths = []
        for multiplier in reversed(self.multipliers):
            widths.append(width)
            width //= multiplier
        return tuple(reversed(widths))

    def channels(self, base: int) -> tuple[int, ...]:
        """Widths after each downsampling."""
        widths = []
        for multiplier in self.multipliers:
            base *= multiplier
            widths.append(base)
        return tuple(widths)


def _parse_blocks(blocks: Any, suffix: str) -> _Blocks:
    layers, strides, multipliers, residual = [], [], [], []
    for place, (name, options) in enumerate(blocks):
        if place % 2 == 0 and name == "res_x":
            layers.append(options["num_layers"])
            if options.get("inject_noise"):
                raise UserError(f"checkpoint config: vae block {place} has 'inject_noise', which is not supported.")
            continue
        match = re.fullmatch(r"compress_(space|time|all)" + suffix, name)
        if place % 2 == 0 or match is None:
            raise UserError(
                f"checkpoint config: vae block {place} is '{name}'; expected 'res_x' and 'compress_(space|time|all){suffix}' in turn."
            )
        strides.append(_STRIDES[match[1]])
        multipliers.append(options.get("multiplier", 2 if suffix else 1))
        residual.append(bool(options.get("residual", False)))
    return _Blocks(tuple(layers), tuple(strides), tuple(multipliers), tuple(residual))


def to_diffusers_name(name: str, encoder_blocks: int) -> str:
    """An official name as diffusers has it (docs/explanation/model.md, "latents and positions").

    Args:
        encoder_blocks: length of the encoder's block list, whose last entry is diffusers' middle block.
    """
    if name == MEAN:
        return "latents_mean"
    if name == STD:
        return "latents_std"
    if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.*)", name):
        place, rest = int(match[1]), match[2]
        if place == encoder_blocks - 1:
            name = f"encoder.mid_block.{rest}"
        else:
            name = f"encoder.down_blocks.{place // 2}.{'downsamplers.0.' if place % 2 else ''}{rest}"
    elif match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(.*)", name):
        place, rest = int(match[1]), match[2]
        if place == 0:
            name = f"decoder.mid_block.{rest}"
        else:
            name = f"decoder.up_blocks.{(place - 1) // 2}.{'upsamplers.0.' if place % 2 else ''}{rest}"
    name = name.replace("res_blocks", "resnets").replace("last_time_embedder", "time_embedder")
    return name.replace("last_scale_shift_table", "scale_shift_table")


def _space_spans(cells: int, tiles: AxisTiles, *, encode: bool) -> list[Span]:
    places = tiles.places(cells)
    spans = []
    for place, (start, end) in enumerate(places):
        before, after = overlaps(places, place)
        coarse, fine = slice(start, end), slice(start * SPATIAL_SCALE, end * SPATIAL_SCALE)
        if encode:
            spans.append(Span(fine, coarse, ramp(end - start, before, after)))
        else:
            spans.append(Span(coarse, fine, ramp((end - start) * SPATIAL_SCALE, before * SPATIAL_SCALE, after * SPATIAL_SCALE)))
    return spans


def _time_spans(cells: int, tiles: AxisTiles) -> list[Span]:
    """Tiles in time, of a decoder; a tile's first latent frame stands for one pixel frame only, so tiles begin and end on such frames."""
    places = tiles.places(cells)
    spans = []
    for place, (start, end) in enumerate(places):
        before, after = overlaps(places, place)
        coarse, fine = slice(start, end), slice(start * TEMPORAL_SCALE, (end - 1) * TEMPORAL_SCALE + 1)
        spans.append(Span(coarse, fine, ramp(fine.stop - fine.start, _frames_of(before), _frames_of(after))))
    return spans


def _frames_of(cells: int) -> int:
    """Pixel frames that two tiles share when they share `cells` latent frames."""
    return (cells - 1) * TEMPORAL_SCALE + 1 if cells else 0
