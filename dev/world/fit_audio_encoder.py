"""The projection of the audio encoder, from the covariance of sounds."""

import random

import torch
from torch import Tensor

from dev.world.anything import any_sound, any_waves
from dev.world.fit_video_encoder import partial_std, principal
from musubi_tuner.ltxv2.autoencoders.audio_vae import log_mel
from musubi_tuner.ltxv2.geometry import patchify_audio
from musubi_tuner.tiny.world.audio_encoder import SIGNAL, AudioEncoder, cells_of

SOUNDS, SEED = 200, 4


def fit_audio_encoder(mel: Tensor) -> AudioEncoder:
    """Args: mel: (B, 2, T, 64) log mel spectrograms."""
    unset = torch.zeros(SIGNAL, SIGNAL, 2, 2)
    rows = cells_of(AudioEncoder(cells=unset, bias=torch.zeros(SIGNAL)).gathered(mel)).transpose(0, 1).flatten(1).T
    directions = principal(rows, SIGNAL)
    return AudioEncoder(cells=directions.view(SIGNAL, SIGNAL, 2, 2), bias=-(directions @ rows.mean(0)))


def default_audio_encoder() -> tuple[AudioEncoder, Tensor, Tensor]:
    """Encoder, and mean and standard deviation (128,) of its tokens."""
    rng = random.Random(SEED)
    mel = log_mel(any_waves([any_sound(rng) for _ in range(SOUNDS)], rng))
    encoder = fit_audio_encoder(mel)
    tokens = patchify_audio(encoder.encode(mel)).flatten(0, 1)
    return encoder, tokens.mean(0), partial_std(tokens.std(0))
