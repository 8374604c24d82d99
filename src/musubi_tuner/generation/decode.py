"""Latents to pictures and sound, and these to files: mp4 for clips, png for stills, wav for sound alone.

Each decoder is loaded when its turn comes and freed before the next.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from musubi_tuner.cache.store import write_bytes
from musubi_tuner.generation.denoise import SampledLatents
from musubi_tuner.generation.recipe import KEY, recipe_path
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.media.audio import Waveform
from musubi_tuner.media.write import fit_audio, write_image, write_video, write_wav
from musubi_tuner.placement.decoding import tiles_that_fit
from musubi_tuner.prompts.prompt import PreviewPrompt
from musubi_tuner.runtime.device import compute_dtype, free_memory

if TYPE_CHECKING:
    from musubi_tuner.ltxv2.autoencoders.video_vae import TileSizes, VideoVAE

log = logging.getLogger(__name__)


def decode_samples(
    latents: Sequence[SampledLatents], vae: Checkpoint, audio_vae: Checkpoint, device: torch.device
) -> Iterator[tuple[Tensor | None, Waveform | None]]:
    """Frames (F, H, W, 3) uint8 and sound of each sample in turn, None where it has none.

    All sound is decoded first, as it is small and has to be there when its clip is written.
    """
    with_audio = [one.audio for one in latents if one.audio is not None]
    waveforms = iter(decode_audio(with_audio, audio_vae, device) if with_audio else ())
    sounds = [None if one.audio is None else next(waveforms) for one in latents]
    if all(one.video is None for one in latents):
        yield from ((None, sound) for sound in sounds)
        return
    tiles = tiles_that_fit(vae, {cells_of(one.video) for one in latents if one.video is not None}, device)
    with video_decoder(vae, device) as decoder:
        for one, sound in zip(latents, sounds, strict=True):
            yield (None if one.video is None else to_frames(decoder, one.video, tiles)), sound


def cells_of(latents: Tensor) -> tuple[int, int, int]:
    """(f, h, w) of (1, 128, f, h, w)."""
    frames, rows, columns = latents.shape[2:]
    return frames, rows, columns


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


def to_frames(vae: "VideoVAE", latents: Tensor, tiles: "Sequence[TileSizes]") -> Tensor:
    """(1, 128, f, h, w) normalized latents -> (F, H, W, 3) uint8, on the CPU.

    Args:
        tiles: that are decoded in, and smaller ones for a card that runs out of memory all the same.
    """
    for sizes, smaller in zip(tiles, (*tiles[1:], None), strict=True):
        vae.use_tiles(sizes)
        try:
            return torch.cat([_to_bytes(part) for part in vae.decode_in_parts(latents, device=torch.device("cpu"))])
        except torch.OutOfMemoryError:
            if smaller is None:
                raise
            log.warning(
                "WARNING: the card ran out of memory while pictures were decoded; going on in tiles of %d pixels and %d frames",
                smaller.pixels, smaller.frames,
            )  # fmt: skip
        free_memory(vae.device)
    raise AssertionError("the last tiles return or raise")


def _to_bytes(pixels: Tensor) -> Tensor:
    """(1, 3, F, H, W) in -1..1 -> (F, H, W, 3) uint8, on the CPU."""
    return ((pixels[0].permute(1, 2, 3, 0).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def decode_audio(latents: Sequence[Tensor], checkpoint: Checkpoint, device: torch.device) -> list[Waveform]:
    """(1, 8, T, 16) normalized latents -> waveforms at the vocoder's own rate, on the CPU."""
    from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
    from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder

    audio_vae = AudioVAE.load(checkpoint, device=device, parts=("decoder",))
    mels = [audio_vae.decode(one).cpu() for one in latents]
    del audio_vae
    free_memory(device)
    vocoder = Vocoder.load(checkpoint, device=device)
    sounds = [Waveform(samples=vocoder(mel)[0].float().cpu(), rate=vocoder.sampling_rate) for mel in mels]
    del vocoder
    free_memory(device)
    return sounds


@contextmanager
def sound_decoder(checkpoint: Checkpoint, device: torch.device) -> Iterator[Callable[[Tensor], Waveform]]:
    """What makes (1, 8, T, 16) normalized latents a waveform, as `decode_audio` does, for as long as the context lasts: for many of them in
    turn, with both of its parts on the device."""
    from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
    from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder

    parts: list[Any] = [AudioVAE.load(checkpoint, device=device, parts=("decoder",)), Vocoder.load(checkpoint, device=device)]

    def to_sound(latents: Tensor) -> Waveform:
        audio_vae, vocoder = parts
        return Waveform(samples=vocoder(audio_vae.decode(latents))[0].float().cpu(), rate=vocoder.sampling_rate)

    try:
        yield to_sound
    finally:
        parts.clear()  # whoever keeps the function keeps no weights
        free_memory(device)


def try_decoders(vae: Checkpoint, audio_vae: Checkpoint, streams: set[str]) -> None:
    """Load what will decode `streams` once, on the CPU.

    Raises:
        UserError: a file without it.
    """
    from musubi_tuner.ltxv2.autoencoders.audio_vae import audio_vae_names
    from musubi_tuner.ltxv2.autoencoders.video_vae import vae_names

    cpu = torch.device("cpu")
    if "video" in streams:
        vae_names(vae)
        with video_decoder(vae, cpu):
            pass
    if "audio" in streams:
        audio_vae_names(audio_vae)
        decode_audio([], audio_vae, cpu)


def write_sample(stem: Path, prompt: PreviewPrompt, frames: Tensor | None, sound: Waveform | None, recipe: str = "") -> Path:
    """Write one sample and return its path, which is `stem` and an ending.

    Args:
        frames: (F, H, W, 3) uint8, or None for sound alone.
        sound: cut or padded to the length of the clip here; None for a silent one.
        recipe: kept in the file, or beside a wav (generation/recipe.py); empty = none.
    """
    if frames is None:
        assert sound is not None
        path = stem.with_name(f"{stem.name}.wav")
        write_wav(path, fit_audio(sound, prompt.seconds))
        if recipe:
            write_bytes(recipe_path(path), recipe.encode())
    elif frames.shape[0] == 1:
        path = stem.with_name(f"{stem.name}.png")
        write_image(path, frames[0], {KEY: recipe} if recipe else None)
    else:
        path = stem.with_name(f"{stem.name}.mp4")
        write_video(path, frames, prompt.fps, sound, comment=recipe)
    return path
