"""The vocoder's first stage, log mel -> 16 kHz: about twenty minutes on one core. The second stage passes the resampled first one through.

python -m dev.world.train_vocoder FOLDER [--steps N]     after train_audio_decoder
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dev.world.anything import any_sound, any_waves
from dev.world.muon import Muon
from dev.world.stage import Stage, share_at
from dev.world.train_audio_decoder import prepare, thin_decoder
from musubi_tuner.ltxv2.autoencoders.audio_vae import log_mel
from musubi_tuner.ltxv2.autoencoders.vocoder import two_stage_config
from musubi_tuner.tiny.world.configs import vocoder_section
from musubi_tuner.tiny.world.sounds import SAMPLES, Sound, partials_of

_BATCH = 4
_MEL_NOISE, _LATENT_NOISE = 0.1, 0.1
_WINDOWS = (256, 1024)
_BRIGHT = 0.25
_STAGES = (("vocoder", 5e-3, 1e-3), ("vocoder-2", 3e-3, 6e-4))
"""Name, learning rates of kernels and of all else."""
_EVERY = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=2, default=(2500, 1000))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = new_vocoder()
    for (name, rate, other_rate), steps in zip(_STAGES, options.steps, strict=True):
        train(options.folder, name, steps, network.vocoder, (rate, other_rate))
    named = {f"vocoder.{name}": tensor.detach().contiguous() for name, tensor in network.vocoder.named_parameters()}
    save_file(named, options.folder / "vocoder.safetensors")


def new_vocoder() -> Any:
    """diffusers' two stages of the world's `vocoder` section, as torch draws their weights."""
    from diffusers.pipelines.ltx2 import LTX2VocoderWithBWE

    torch.manual_seed(0)
    return LTX2VocoderWithBWE(**two_stage_config(vocoder_section()))


class Spectrograms:
    """Log mel of sounds: true ones with noise, and those that the audio autoencoder gives back, as previews have them."""

    def __init__(self, folder: Path) -> None:
        self._encoder, _, std = prepare(folder)
        self._spread = std.view(8, 1, 16)
        self._decoder = thin_decoder().requires_grad_(False)
        named = load_file(folder / "audio.safetensors")
        self._decoder.load_state_dict({name.removeprefix("decoder."): one for name, one in named.items() if name.startswith("decoder.")})

    def __call__(self, waves: Tensor, rng: random.Random) -> Tensor:
        """(B, 2, SAMPLES) -> (B, 2, T, 64)"""
        mel = log_mel(waves)
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        if rng.random() < 0.4:
            return mel + _MEL_NOISE * rng.random() * torch.randn(mel.shape, generator=generator)
        latents = self._encoder.encode(mel)
        latents = latents + _LATENT_NOISE * rng.random() * self._spread * torch.randn(latents.shape, generator=generator)
        return self._decoder(latents)


def train(folder: Path, name: str, steps: int, generator: Any, rates: tuple[float, float]) -> None:
    """One stage. Waveform, and magnitudes at two resolutions, plain and in logarithms."""
    kernels = [one for key, one in generator.named_parameters() if one.ndim > 1 and "conv_out" not in key]
    others = [one for key, one in generator.named_parameters() if one.ndim < 2 or "conv_out" in key]
    optimizer = Muon(kernels, others, rate=rates[0], other_rate=rates[1])
    stage = Stage(folder, name, steps, {"generator": generator, "optimizer": optimizer})
    spectrograms = Spectrograms(folder)
    rng = stage.rng(-1)
    held_out = any_waves([any_sound(rng) for _ in range(12)], rng)
    held_out_mel = spectrograms(held_out, random.Random(2))
    for step in stage:
        rng = stage.rng(step)
        waves = any_waves([vocoder_sound(rng) for _ in range(_BATCH)], rng)
        loss = difference(generator(spectrograms(waves, rng)), waves)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.set_share(share_at(step, steps, fall=0.8))
        optimizer.step()
        if (step + 1) % _EVERY == 0:
            with torch.no_grad():
                made = generator(held_out_mel)
                mel = log_mel(made.clamp(-1, 1))
            wanted = log_mel(held_out[..., : made.shape[-1]])
            hops = min(mel.shape[2], wanted.shape[2])
            off = (mel[:, :, :hops].clamp(min=-6) - wanted[:, :, :hops].clamp(min=-6)).abs().mean()
            losses = (float(loss.detach()), float(difference(made, held_out)))
            stage.tell(f"step {step + 1} of {steps}: loss {losses[0]:.3f}, {losses[1]:.3f} held out, mel off by {float(off):.3f}")


def vocoder_sound(rng: random.Random) -> Sound:
    """Any sound, and bright ones more often than the world has them: a vocoder finds high partials last."""
    sound = any_sound(rng)
    if rng.random() < _BRIGHT:
        bright = partials_of(rng.choice(("buzz", "reed")), 100.0 * rng.randint(6, 12))
        return Sound(partials=bright, beats=sound.beats, level=sound.level, start=sound.start)
    return sound


def difference(made: Tensor, waves: Tensor) -> Tensor:
    """Of two (B, 2, n) waveforms, over the samples that both have."""
    length = min(made.shape[-1], waves.shape[-1], SAMPLES)
    made, waves = made[..., :length], waves[..., :length]
    loss = 5 * (made - waves).abs().mean()
    for window in _WINDOWS:
        mine, true = magnitudes(made, window), magnitudes(waves, window)
        loss = loss + 0.5 * (mine - true).abs().mean() + 0.1 * ((mine + 1e-3).log() - (true + 1e-3).log()).abs().mean()
    return loss


def magnitudes(waves: Tensor, window: int) -> Tensor:
    flat = waves.flatten(0, 1)
    return torch.stft(flat, window, window // 4, window, torch.hann_window(window), return_complex=True).abs()


if __name__ == "__main__":
    main()
