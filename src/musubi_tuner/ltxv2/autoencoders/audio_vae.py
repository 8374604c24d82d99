"""The audio VAE: diffusers' network, the official config and weights, run in float32."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.ltxv2.autoencoders.components import MEAN, STD, Component, find_component, load_frozen
from musubi_tuner.ltxv2.autoencoders.mel import log_mel
from musubi_tuner.ltxv2.geometry import patchify_audio, unpatchify_audio
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.runtime.errors import UserError

PREFIX = "audio_vae."
_MARKS = ("encoder.conv_in.", "decoder.conv_in.")


class AudioVAE:
    """Stereo sound at 16 kHz <-> normalized latents."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, device: torch.device | str, parts: tuple[str, ...] = ("encoder", "decoder")) -> "AudioVAE":
        """Build from the checkpoint's `audio_vae` section and load the wanted parts, frozen, in float32.

        Raises:
            UserError: no audio VAE in the file, or a config that this is not written for.
        """
        from diffusers import AutoencoderKLLTX2Audio

        component = find_audio_vae(checkpoint)
        with torch.device("meta"):
            network = AutoencoderKLLTX2Audio(**diffusers_config(component.config))
        for part in ("encoder", "decoder"):
            if part not in parts:
                setattr(network, part, None)
        wanted = tuple(f"{part}." for part in parts)
        renamed = {MEAN: "latents_mean", STD: "latents_std"}
        sources = {renamed.get(name, name): full for name, full in component.names.items() if name.startswith(wanted) or name in renamed}
        return cls(load_frozen(network, sources, checkpoint, device, torch.float32))

    @property
    def device(self) -> torch.device:
        return self._network.latents_mean.device

    @torch.inference_mode()
    def encode(self, waveform: Tensor) -> Tensor:
        """(B, 2, samples) at 16 kHz -> (B, 8, T, 16) float32 normalized means; T = (samples // 160) // 4 + 1."""
        mel = log_mel(waveform.to(device=self.device, dtype=torch.float32))
        raw = patchify_audio(self._network.encode(mel).latent_dist.mode())
        return unpatchify_audio((raw - self._network.latents_mean) / self._network.latents_std)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, 8, T, 16) normalized -> log mel (B, 2, 4T-3, 64)."""
        tokens = patchify_audio(latents.to(device=self.device, dtype=torch.float32))
        raw = tokens * self._network.latents_std + self._network.latents_mean
        return self._network.decode(unpatchify_audio(raw), return_dict=False)[0]


def find_audio_vae(checkpoint: Checkpoint) -> Component:
    """Config and tensor names of the audio VAE.

    Raises:
        UserError: the file holds none.
    """
    return find_component(checkpoint, "audio_vae", PREFIX, _MARKS, what="audio VAE", flag="--audio_vae")


def audio_vae_names(checkpoint: Checkpoint) -> Mapping[str, str]:
    """{bare official name: full name} of the audio VAE's tensors; raises what `find_audio_vae` does."""
    return find_audio_vae(checkpoint).names


def audio_vae_fingerprint(checkpoint: Checkpoint) -> str:
    """Identity of what shapes latents: the encoder, the statistics and their config."""
    component = find_audio_vae(checkpoint)
    names = {name: full for name, full in component.names.items() if name.startswith("encoder.") or name in (MEAN, STD)}
    return component.fingerprint(checkpoint, names, component.config)


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' class for an official `audio_vae` section.

    Raises:
        UserError: another mel recipe than the one that `mel` computes.
    """
    parameters = config["model"]["params"]
    stft = config.get("preprocessing", {}).get("stft", {})
    network = parameters["ddconfig"]
    rules = (("sampling_rate", parameters.get("sampling_rate", 16000), 16000), ("hop_length", stft.get("hop_length", 160), 160))
    rules += (("filter_length", stft.get("filter_length", 1024), 1024), ("mel_bins", network.get("mel_bins", 64), 64))
    for key, found, expected in rules:
        if found != expected:
            raise UserError(f"checkpoint config: audio_vae {key} is {found!r}; only {expected} is supported.")
    return {
        "base_channels": network["ch"],
        "output_channels": network["out_ch"],
        "ch_mult": tuple(network["ch_mult"]),
        "num_res_blocks": network["num_res_blocks"],
        "attn_resolutions": tuple(network.get("attn_resolutions") or ()) or None,
        "in_channels": network["in_channels"],
        "resolution": network["resolution"],
        "latent_channels": network["z_channels"],
        "norm_type": network["norm_type"],
        "causality_axis": network["causality_axis"],
        "dropout": network.get("dropout", 0.0),
        "mid_block_add_attention": network.get("mid_block_add_attention", True),
        "mel_bins": 64,
        "double_z": network.get("double_z", True),
    }
