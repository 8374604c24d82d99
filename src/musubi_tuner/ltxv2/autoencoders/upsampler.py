"""The latent upsampler of the official two-stage pipelines, through diffusers: latents of twice the width and height."""

from typing import Any

import torch
from torch import Tensor

from musubi_tuner.ltxv2.autoencoders.components import MEAN, STD, as_dtype, load_frozen, weight_bytes
from musubi_tuner.ltxv2.autoencoders.video_vae import vae_names
from musubi_tuner.ltxv2.geometry import LATENT_CHANNELS
from musubi_tuner.ltxv2.weights import Checkpoint, building_from
from musubi_tuner.runtime.errors import UserError

_REMEDY = "Give the file 'ltx-2-spatial-upscaler-x2' (2.3: 'ltx-2.3-spatial-upscaler-x2') of the model's release."


class LatentUpsampler:
    """Normalized latents -> normalized latents of the doubled size; the network works on those of the VAE's own scale."""

    def __init__(self, network: Any, mean: Tensor, std: Tensor) -> None:
        self._network = network
        self._mean, self._std = mean, std

    @classmethod
    def load(cls, checkpoint: Checkpoint, vae: Checkpoint, *, device: torch.device | str, dtype: torch.dtype) -> "LatentUpsampler":
        """
        Args:
            vae: holds the statistics of latents.

        Raises:
            UserError: a file that is no upsampler in space by two, or a VAE without statistics.
        """
        network = _build(checkpoint)
        names = vae_names(vae)
        mean, std = (vae.tensor(names[name]).to(device).float().view(1, -1, 1, 1, 1) for name in (MEAN, STD))
        return cls(load_frozen(network, {name: name for name in checkpoint.names()}, checkpoint, device, dtype), mean, std)

    @classmethod
    def on_meta(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> "LatentUpsampler":
        """Without weights, for counting; raises what `load` does of the upsampler's file."""
        statistics = torch.empty((1, LATENT_CHANNELS, 1, 1, 1), device="meta")
        return cls(as_dtype(_build(checkpoint), dtype), statistics, statistics)

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self._network)

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        """(1, 128, F, h, w) float32 -> (1, 128, F, 2h, 2w) float32, on the upsampler's device."""
        raw = latents.to(self._mean) * self._std + self._mean
        dtype = next(self._network.parameters()).dtype
        return (self._network(raw.to(dtype)).float() - self._mean) / self._std


def _build(checkpoint: Checkpoint) -> Any:
    """diffusers' network on the meta device."""
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    config = upsampler_config(checkpoint)
    with building_from(checkpoint, "upsampler"), torch.device("meta"):
        return LTX2LatentUpsamplerModel(**config)


def upsampler_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of diffusers' class, from the shapes of the file's tensors.

    Raises:
        UserError: another kind of file, or an upsampler in time or by another factor.
    """
    names = checkpoint.names()
    first, last, between = "initial_conv.weight", "final_conv.weight", ("upsampler.conv.weight", "upsampler.0.weight")
    upsampler = next((name for name in between if name in names), None)
    where = f"--spatial_upsampler_path {checkpoint.path}"
    if first not in names or last not in names or upsampler is None:
        raise UserError(f"{where}: is no latent upsampler. {_REMEDY}")
    shape = checkpoint.shape(first)
    outputs, inputs, *kernel = checkpoint.shape(upsampler)
    if len(kernel) != 2 or outputs != 4 * inputs:
        raise UserError(f"{where}: does not double width and height, which is what a second stage starts from. {_REMEDY}")
    return {
        "in_channels": shape[1],
        "mid_channels": shape[0],
        "dims": len(shape) - 2,
        "num_blocks_per_stage": len({name.split(".")[1] for name in names if name.startswith("res_blocks.")}),
        "use_rational_resampler": upsampler == between[0],
        "rational_spatial_scale": 2.0,
    }
