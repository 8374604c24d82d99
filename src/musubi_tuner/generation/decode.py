"""Latents to pictures and sound. Each frozen part is loaded when its turn comes and freed before the next."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.media.write import Sound
from musubi_tuner.runtime.device import compute_dtype, free_memory

if TYPE_CHECKING:
    from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE


@contextmanager
def video_decoder(checkpoint: Checkpoint, device: torch.device) -> Iterator["VideoVAE"]:
    """The video VAE's decoder, for as long as the context lasts. It decodes large frames in tiles by itself."""
    from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE

    vae = VideoVAE.load(checkpoint, device=device, dtype=compute_dtype(device), parts=("decoder",))
    try:
        yield vae
    finally:
        del vae
        free_memory(device)


def to_frames(vae: "VideoVAE", latents: Tensor) -> Tensor:
    """(1, 128, f, h, w) normalized latents -> (F, H, W, 3) uint8, on the CPU."""
    pixels = vae.decode(latents)[0].permute(1, 2, 3, 0)
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def decode_sounds(latents: Sequence[Tensor], checkpoint: Checkpoint, device: torch.device) -> list[Sound]:
    """(1, 8, T, 16) normalized latents -> waveforms at the vocoder's own rate, on the CPU."""
    from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
    from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder

    audio_vae = AudioVAE.load(checkpoint, device=device, parts=("decoder",))
    mels = [audio_vae.decode(one).cpu() for one in latents]
    del audio_vae
    free_memory(device)
    vocoder = Vocoder.load(checkpoint, device=device)
    sounds = [Sound(samples=vocoder(mel)[0].float().cpu(), rate=vocoder.sampling_rate) for mel in mels]
    del vocoder
    free_memory(device)
    return sounds
