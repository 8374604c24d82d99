"""The vocoders: HiFi-GAN of 2.0 (24 kHz), and the two-stage one of 2.3 and 2.5 (48 kHz). diffusers' networks, official weights, float32."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.ltxv2.autoencoders.components import Component, find_component, load_frozen, weight_bytes
from musubi_tuner.ltxv2.weights import Checkpoint, building_from

PREFIX = "vocoder."
_MARKS = ("conv_pre.", "vocoder.conv_pre.")
_RENAMES = (
    (r"(^|\.)ups\.", r"\1upsamplers."),
    (r"resblocks\.", "resnets."),
    (r"conv_pre", "conv_in"),
    (r"conv_post", "conv_out"),
    (r"act_post", "act_out"),
    (r"downsample\.lowpass", "downsample"),
)


PART, REACH = 1024, 64
"""Mel frames that are made at a time, a hundred a second, and those beside them that are looked at: a sample depends on 43 frames before it
and 39 behind it, by the kernels of 2.3, and on fewer by those of 2.0."""


class Vocoder:
    """Log mel -> waveform."""

    def __init__(self, network: Any, sampling_rate: int) -> None:
        self._network = network
        self.sampling_rate = sampling_rate

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, device: torch.device | str) -> "Vocoder":
        """Build from the checkpoint's `vocoder` section: two stages where it has a `bwe`.

        Raises:
            UserError: no vocoder in the file.
        """
        component = _find_vocoder(checkpoint)
        # Not on the meta device: its resampling filters are computed when it is built and lie in no file.
        found = cls.on_meta(checkpoint) if torch.device(device).type == "meta" else _build(component, checkpoint)
        names = {to_diffusers_name(name): full for name, full in component.names.items()}
        for buffer in found._network.buffers():  # first weights never come to the device, which would hold them twice
            buffer.data = buffer.data.to(device)
        load_frozen(found._network, names, checkpoint, device, torch.float32)
        return found

    @classmethod
    def on_meta(cls, checkpoint: Checkpoint) -> "Vocoder":
        """Without weights, for counting; raises what `load` does of the config."""
        with torch.device("meta"):
            return _build(_find_vocoder(checkpoint), checkpoint)

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self._network)

    @torch.inference_mode()
    def __call__(self, mel: Tensor) -> Tensor:
        """(B, 2, frames, 64) -> (B, 2, samples) in -1..1 at `sampling_rate`; long sound a part at a time, which is the whole."""
        device, frames = next(self._network.parameters()).device, mel.shape[2]
        parts = []
        for start in range(0, frames, PART):
            end = min(start + PART, frames)
            first, last = max(0, start - REACH), min(end + REACH, frames)
            made = self._network(mel[:, :, first:last].to(device=device, dtype=torch.float32))
            samples = made.shape[-1] // (last - first)
            parts.append(made[..., (start - first) * samples : (end - first) * samples])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _find_vocoder(checkpoint: Checkpoint) -> Component:
    return find_component(checkpoint, "vocoder", PREFIX, _MARKS, what="vocoder", flag="--audio_vae")


def _build(component: Component, checkpoint: Checkpoint) -> Vocoder:
    """diffusers' network with its first weights."""
    from diffusers.pipelines.ltx2 import LTX2Vocoder, LTX2VocoderWithBWE

    config = component.config
    two_stages = "bwe" in config
    with building_from(checkpoint, "vocoder"):
        rate = config["bwe"]["output_sampling_rate"] if two_stages else config.get("output_sampling_rate", 24000)
        network: Any = LTX2VocoderWithBWE(**two_stage_config(config)) if two_stages else LTX2Vocoder(**generator_config(config))
    if two_stages:
        # The official first stage clamps its waveform; diffusers' leaves it as it is.
        network.vocoder.register_forward_hook(lambda module, inputs, output: output.clamp(-1, 1))
    return Vocoder(network, rate)


def to_diffusers_name(name: str) -> str:
    """An official vocoder name as diffusers has it."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def generator_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Arguments of diffusers' generator for one official stage."""
    snake = config.get("activation") == "snakebeta" or config.get("resblock") == "AMP1"
    values = {
        "hidden_channels": config["upsample_initial_channel"],
        "upsample_kernel_sizes": list(config["upsample_kernel_sizes"]),
        "upsample_factors": list(config["upsample_rates"]),
        "resnet_kernel_sizes": list(config["resblock_kernel_sizes"]),
        "resnet_dilations": [list(row) for row in config["resblock_dilation_sizes"]],
        "act_fn": "snakebeta" if snake else "leaky_relu",
        "antialias": snake,
        "final_act_fn": "tanh" if config.get("use_tanh_at_final", True) else None,
        "final_bias": config.get("use_bias_at_final", True),
    }
    if not prefix and "output_sampling_rate" in config:
        values["output_sampling_rate"] = config["output_sampling_rate"]
    return {prefix + key: value for key, value in values.items()}


def two_stage_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' two-stage vocoder for an official `vocoder` section with a `bwe`."""
    second = config["bwe"]
    values = generator_config(config["vocoder"]) | generator_config(second, "bwe_")
    values |= {"filter_length": second["n_fft"], "window_length": second["n_fft"], "hop_length": second["hop_length"]}
    values |= {"num_mel_channels": second["num_mels"], "input_sampling_rate": second["input_sampling_rate"]}
    return values | {"output_sampling_rate": second["output_sampling_rate"]}
