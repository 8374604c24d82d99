"""The audio VAE: diffusers' network, the official config and weights, run in float32; and the log mel spectrogram that it encodes, by torch
alone (docs/explanation/model.md, "vocoder")."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.ltxv2.autoencoders.components import MEAN, STD, Component, find_component, load_frozen, weight_bytes
from musubi_tuner.ltxv2.geometry import AUDIO_HOP, AUDIO_SAMPLE_RATE, patchify_audio, unpatchify_audio
from musubi_tuner.ltxv2.weights import Checkpoint, building_from
from musubi_tuner.runtime.errors import UserError

PREFIX = "audio_vae."
_MARKS = ("encoder.conv_in.", "decoder.conv_in.")


PART, REACH = 256, 40
"""Latent steps that are decoded at a time, 25 a second, and those before them that are looked at: the decoder is causal, and a mel frame
depends on 33 steps of the past."""
_MEL_FRAMES = 4
"""Of a latent step; the first one of a sound has one."""


class AudioVAE:
    """Stereo audio at 16 kHz <-> normalized latents."""

    def __init__(self, network: Any) -> None:
        self._network = network

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, device: torch.device | str, parts: tuple[str, ...] = ("encoder", "decoder")) -> "AudioVAE":
        """Build from the checkpoint's `audio_vae` section and load the wanted parts, frozen, in float32.

        Raises:
            UserError: no audio VAE in the file, or a config that this is not written for.
        """
        component = find_audio_vae(checkpoint)
        network = _build(component, checkpoint, parts)
        wanted = tuple(f"{part}." for part in parts)
        renamed = {MEAN: "latents_mean", STD: "latents_std"}
        sources = {renamed.get(name, name): full for name, full in component.names.items() if name.startswith(wanted) or name in renamed}
        return cls(load_frozen(network, sources, checkpoint, device, torch.float32))

    @classmethod
    def decoder_on_meta(cls, checkpoint: Checkpoint) -> "AudioVAE":
        """The decoder without weights, for counting; raises what `load` does of the config."""
        return cls(_build(find_audio_vae(checkpoint), checkpoint, ("decoder",)))

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self._network)

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
        """(B, 8, T, 16) normalized -> log mel (B, 2, 4T-3, 64); long sound a part at a time, which is the whole."""
        tokens = patchify_audio(latents.to(device=self.device, dtype=torch.float32))
        raw = unpatchify_audio(tokens * self._network.latents_std + self._network.latents_mean)
        parts = []
        for start in range(0, raw.shape[2], PART):
            first = max(0, start - REACH)
            made = self._network.decode(raw[:, :, first : start + PART], return_dict=False)[0]
            parts.append(made[:, :, (start - first) * _MEL_FRAMES - (_MEL_FRAMES - 1) if start else 0 :])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _build(component: Component, checkpoint: Checkpoint, parts: tuple[str, ...]) -> Any:
    """diffusers' network on the meta device with these parts alone."""
    from diffusers import AutoencoderKLLTX2Audio

    with building_from(checkpoint, "audio_vae"), torch.device("meta"):
        network: Any = AutoencoderKLLTX2Audio(**diffusers_config(component.config))
    for part in ("encoder", "decoder"):
        if part not in parts:
            setattr(network, part, None)
    return network


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
        UserError: another mel recipe than the one that `log_mel` computes.
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


FFT_SIZE = 1024
MEL_BINS = 64
_FLOOR = 1e-5


def log_mel(waveform: Tensor) -> Tensor:
    """(B, C, samples) at 16 kHz -> (B, C, samples // 160 + 1, 64) natural log of Slaney mel magnitudes."""
    batch, channels, samples = waveform.shape
    flat = waveform.reshape(batch * channels, samples)
    window = torch.hann_window(FFT_SIZE, device=waveform.device)
    spectrum = torch.stft(flat, FFT_SIZE, AUDIO_HOP, FFT_SIZE, window, center=True, pad_mode="reflect", return_complex=True).abs()
    mel = mel_filters(waveform.device).T @ spectrum
    return mel.clamp(min=_FLOOR).log().view(batch, channels, MEL_BINS, -1).transpose(2, 3)


@functools.cache
@torch.inference_mode(False)
def mel_filters(device: torch.device | str = "cpu") -> Tensor:
    """(513, 64) triangular filters from 0 to 8000 Hz, spaced on the Slaney scale, each of unit area (Slaney norm); made once
    for each device, as to bring them there has the host wait."""
    bins = torch.linspace(0, AUDIO_SAMPLE_RATE / 2, FFT_SIZE // 2 + 1, dtype=torch.float64)
    top = _to_mel(AUDIO_SAMPLE_RATE / 2)
    edges = torch.tensor([_to_hertz(top * i / (MEL_BINS + 1)) for i in range(MEL_BINS + 2)], dtype=torch.float64)
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - left) / (center - left)
    falling = (right - bins[:, None]) / (right - center)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * (2 / (right - left))).to(torch.float32).to(device)


_LINEAR_STEP = 200 / 3
_KNEE_HERTZ = 1000.0
_KNEE_MEL = _KNEE_HERTZ / _LINEAR_STEP
_LOG_STEP = math.log(6.4) / 27


def _to_mel(hertz: float) -> float:
    """Slaney: linear below 1000 Hz, logarithmic above."""
    return hertz / _LINEAR_STEP if hertz < _KNEE_HERTZ else _KNEE_MEL + math.log(hertz / _KNEE_HERTZ) / _LOG_STEP


def _to_hertz(mel: float) -> float:
    return mel * _LINEAR_STEP if mel < _KNEE_MEL else _KNEE_HERTZ * math.exp(_LOG_STEP * (mel - _KNEE_MEL))
