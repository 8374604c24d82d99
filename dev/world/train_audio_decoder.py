"""The audio autoencoder: encoder from covariances, decoder trained in a quarter of its width: about ten minutes on one core.

python -m dev.world.train_audio_decoder FOLDER [--steps N]
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dev.world.anything import any_sound, any_waves
from dev.world.fit_audio_encoder import default_audio_encoder
from dev.world.muon import Muon
from dev.world.stage import Stage, share_at
from musubi_tuner.ltxv2.autoencoders.audio_vae import diffusers_config, log_mel
from musubi_tuner.tiny.world.audio_encoder import AudioEncoder
from musubi_tuner.tiny.world.configs import audio_vae_section

WIDTH = 32
"""Channels that are used, of 128, which statistics of the official length ask for; the others are zero."""
_WHOLE_WIDTH = 128
_BATCH = 8
_NOISE = 0.1
_RATE, _OTHER_RATE = 0.02, 2e-3
_EVERY = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder, mean, std = prepare(options.folder)
    decoder = thin_decoder()
    train(options.folder, options.steps, encoder, decoder, std)
    named = {f"encoder.{name}": tensor for name, tensor in encoder.named().items()} | {"mean": mean, "std": std}
    named |= {f"decoder.{name}": tensor.detach() for name, tensor in decoder.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, options.folder / "audio.safetensors")


def prepare(folder: Path) -> tuple[AudioEncoder, Tensor, Tensor]:
    """Encoder and statistics; made once."""
    path = folder / "audio-encoder.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        encoder, mean, std = default_audio_encoder()
        save_file({**encoder.named(), "mean": mean, "std": std}, path)
    named = load_file(path)
    mean, std = named.pop("mean"), named.pop("std")
    return AudioEncoder(**named), mean, std


class _NormOfWhole(nn.Module):
    """The pixel norm as the whole network has it, whose other channels are zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().sum(1, keepdim=True) / _WHOLE_WIDTH + 1e-6)


def thin_decoder() -> Any:
    """diffusers' decoder with `WIDTH` channels; laid into the whole one, it decodes the same."""
    from diffusers import AutoencoderKLLTX2Audio
    from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import LTX2AudioPixelNorm

    torch.manual_seed(1)
    network: Any = AutoencoderKLLTX2Audio(**diffusers_config(audio_vae_section()) | {"base_channels": WIDTH})
    decoder = network.decoder
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LTX2AudioPixelNorm):
                setattr(parent, name, _NormOfWhole())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "conv2" in name:
                parameter.mul_(0.1)
            elif name == "conv_out.conv.bias":
                parameter.fill_(-6.0)
    return decoder


def train(folder: Path, steps: int, encoder: AudioEncoder, decoder: Any, std: Tensor) -> None:
    """Mean absolute error of log mel; latents with some noise."""
    kernels = [one for key, one in decoder.named_parameters() if one.ndim > 1 and "conv_out" not in key]
    others = [one for key, one in decoder.named_parameters() if one.ndim < 2 or "conv_out" in key]
    optimizer = Muon(kernels, others, rate=_RATE, other_rate=_OTHER_RATE)
    stage = Stage(folder, "audio-decoder", steps, {"decoder": decoder, "optimizer": optimizer})
    rng = stage.rng(-1)
    held_out = log_mel(any_waves([any_sound(rng) for _ in range(24)], rng))
    held_out_latents = encoder.encode(held_out)
    spread = std.view(8, 1, 16)
    for step in stage:
        rng = stage.rng(step)
        mel = log_mel(any_waves([any_sound(rng) for _ in range(_BATCH)], rng))
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        latents = encoder.encode(mel)
        strength = _NOISE * torch.rand(_BATCH, 1, 1, 1, generator=generator) * spread
        decoded = decoder(latents + strength * torch.randn(latents.shape, generator=generator))
        loss = (decoded - mel[:, :, : decoded.shape[2]]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.set_share(share_at(step, steps, fall=0.6))
        optimizer.step()
        if (step + 1) % _EVERY == 0:
            with torch.no_grad():
                decoded = decoder(held_out_latents)
            error = (decoded - held_out[:, :, : decoded.shape[2]]).abs().mean()
            stage.tell(f"step {step + 1} of {steps}: log mel off by {float(loss.detach()):.3f} with noise, {float(error):.3f} held out")


if __name__ == "__main__":
    main()
