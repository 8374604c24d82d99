"""The video autoencoder: encoder from covariances, decoder started by least squares and trained: about half an hour on one core.

python -m dev.world.train_video_decoder FOLDER [--threads N] [--steps FIRST SECOND]
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dev.world.anything import Mixture, any_scene
from dev.world.fit_video_encoder import default_video_encoder, statistics, to_pixels
from dev.world.linear_start import start_linearly
from dev.world.muon import Muon
from dev.world.stage import Stage, share_at
from musubi_tuner.ltxv2.autoencoders.video_vae import diffusers_config
from musubi_tuner.tiny.world.configs import vae_section
from musubi_tuner.tiny.world.scenes import draw_scenes
from musubi_tuner.tiny.world.video_encoder import VideoEncoder

BATCH = 8
NOISE = 0.06
"""At most so much noise is added to latents, in units of their spread."""
_OBJECT_WEIGHT = 3.0
_START_CLIPS, _START_SEED = 1000, 5
_HELD_OUT_CLIPS, _HELD_OUT_SEED = 24, 99
_EVERY = 100
_STAGES = (("video-decoder", Mixture(), 3e-3, 1e-3), ("video-decoder-2", Mixture(others=0.65, eyes=0.75), 2e-3, 7e-4))
"""Name, what it sees, learning rates of kernels and of all else."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=2, default=(3600, 1800))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder, mean, std = prepare(options.folder)
    decoder = new_decoder()
    decoder.load_state_dict(load_file(options.folder / "video-start.safetensors"))
    for (name, mixture, rate, other_rate), steps in zip(_STAGES, options.steps, strict=True):
        train(options.folder, name, steps, encoder, decoder, std, mixture, (rate, other_rate))
    named = {f"encoder.{name}": tensor for name, tensor in encoder.named().items()} | {"mean": mean, "std": std}
    named |= {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, options.folder / "video.safetensors")


def prepare(folder: Path) -> tuple[VideoEncoder, Tensor, Tensor]:
    """Encoder and statistics, and `video-start.safetensors`; made once."""
    path, start = folder / "video-encoder.safetensors", folder / "video-start.safetensors"
    if not start.exists():
        folder.mkdir(parents=True, exist_ok=True)
        encoder = default_video_encoder()
        rng = Stage(folder, "video-start", 0, {}).rng(_START_SEED)
        pixels = to_pixels(draw_scenes([any_scene(rng, Mixture()) for _ in range(_START_CLIPS)]))
        latents = torch.cat([encoder.encode(some) for some in pixels.split(20)])
        mean, std = statistics(latents)
        save_file({**encoder.named(), "mean": mean, "std": std}, path)
        torch.manual_seed(0)
        decoder = new_decoder()
        start_linearly(decoder, latents, pixels)
        save_file({name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}, start)
    named = load_file(path)
    mean, std = named.pop("mean"), named.pop("std")
    return VideoEncoder(**named), mean, std


def new_decoder() -> Any:
    """diffusers' decoder of the world's `vae` section, its weights as torch draws them."""
    from diffusers import AutoencoderKLLTX2Video

    network: Any = AutoencoderKLLTX2Video(**diffusers_config(vae_section()))
    return network.decoder


def train(
    folder: Path,
    name: str,
    steps: int,
    encoder: VideoEncoder,
    decoder: Any,
    std: Tensor,
    mixture: Mixture,
    rates: tuple[float, float],
) -> None:
    """One stage; objects weigh four times what the ground does, as they are small and all that is judged."""
    kernels = [one for key, one in decoder.named_parameters() if one.ndim > 1 and "conv_out" not in key]
    others = [one for key, one in decoder.named_parameters() if one.ndim < 2 or "conv_out" in key]
    optimizer = Muon(kernels, others, rate=rates[0], other_rate=rates[1])
    stage = Stage(folder, name, steps, {"decoder": decoder, "optimizer": optimizer})
    held_out = to_pixels(draw_scenes([any_scene(stage.rng(-number - _HELD_OUT_SEED), Mixture()) for number in range(_HELD_OUT_CLIPS)]))
    held_out_latents = encoder.encode(held_out)
    errors: list[float] = []
    for step in stage:
        rng = stage.rng(step)
        pixels = to_pixels(draw_scenes([any_scene(rng, mixture) for _ in range(BATCH)]))
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        latents = encoder.encode(pixels)
        strength = NOISE * torch.rand(BATCH, 1, 1, 1, 1, generator=generator) * std[:, None, None, None]
        latents = latents + strength * torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = decoder(latents)
        error = decoded.float() - pixels
        is_object = (pixels - pixels[:, :, :1, :1, :1]).abs().amax(1, keepdim=True) > 0.05
        loss = ((1 + _OBJECT_WEIGHT * is_object) * (0.5 * error.abs() + 4 * error.square())).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.set_share(share_at(step, steps))
        optimizer.step()
        errors.append(float(error.detach().square().mean()))
        if (step + 1) % _EVERY == 0:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                decoded = torch.cat([decoder(some) for some in held_out_latents.split(BATCH)]).float()
            seen = decibels(sum(errors[-_EVERY:]) / len(errors[-_EVERY:]))
            other = 10 * torch.log10(4 / (decoded - held_out).square().mean((1, 2, 3, 4))).mean()
            stage.tell(f"step {step + 1} of {steps}: {seen:.2f} dB with noise, {float(other):.2f} dB held out")


def decibels(error: float) -> float:
    """Peak signal-to-noise ratio of a mean squared error, values being in -1..1."""
    return 10 * math.log10(4 / error)


if __name__ == "__main__":
    main()
