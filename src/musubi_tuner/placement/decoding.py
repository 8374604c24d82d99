"""What decoders and the latent upsampler take of a card, counted on tensors without storage before anything is sampled.

Each of them has the card to itself, after the transformer has left it. Pictures are decoded whole up to 768 pixels and 80 frames, and
above in tiles of that size, as in the official code, so that cards make no difference to them; a card without that room takes smaller ones.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from musubi_tuner.ltxv2.autoencoders.audio_vae import PART as SOUND_PART
from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.autoencoders.upsampler import LatentUpsampler
from musubi_tuner.ltxv2.autoencoders.video_vae import DECODER_TILES, TileSizes, VideoVAE
from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder
from musubi_tuner.ltxv2.geometry import AUDIO_CHANNELS, AUDIO_MEL_BINS, LATENT_CHANNELS
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.memory.card import room_left
from musubi_tuner.memory.live_bytes import LiveBytes
from musubi_tuner.placement.planning import size_in_words
from musubi_tuner.runtime.device import compute_dtype
from musubi_tuner.runtime.errors import UserError

Cells = tuple[int, int, int]
"""Latent frames, rows, columns."""
_WORKSPACE = 2**25
"""Bytes that torch lends cuBLAS on a Hopper or later, and does not ask back (8 MiB on others)."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one part takes."""

    part: str
    device_bytes: int
    """With its weights."""
    how: str = ""
    """In which pieces."""

    def row(self) -> tuple[str, str]:
        return self.part, f"{size_in_words(self.device_bytes)} on the device{f', {self.how}' if self.how else ''}"


def tiles_that_fit(vae: Checkpoint, sizes: Collection[Cells], device: torch.device) -> tuple[TileSizes, ...]:
    """Tiles to decode clips of `sizes` in, within the memory that is free now, and smaller ones to go on with where it does not suffice
    after all; off a GPU the usual ones.

    Where none fit by count, the smallest: what convolutions take for themselves is not counted, and neither is what they do not.
    """
    if device.type != "cuda":
        return DECODER_TILES[:1]
    first = fitting_tiles(vae, sizes, room_left(device), compute_dtype(device))
    return DECODER_TILES[-1:] if first is None else DECODER_TILES[DECODER_TILES.index(first[0]) :]


def fitting_tiles(vae: Checkpoint, sizes: Collection[Cells], room: int, dtype: torch.dtype) -> tuple[TileSizes, int] | None:
    """The largest tiles that clips of `sizes` can be decoded in within `room` bytes, and what that takes; None where none fit."""
    decoder = VideoVAE.decoder_on_meta(vae, dtype)
    for tiles in DECODER_TILES:
        if (needed := _decoding_bytes(decoder, tiles, sizes)) <= room:
            return tiles, needed
    return None


def needs_after_sampling(
    vae: Checkpoint,
    audio_vae: Checkpoint,
    upsampler: Checkpoint | None,
    *,
    sizes: Collection[Cells],
    before: Collection[Cells],
    steps: int,
    room: int,
    dtype: torch.dtype,
) -> list[Need]:
    """Of each part that has its turn after the transformer, on a card.

    Args:
        upsampler: between two stages; None = there is none.
        sizes: of the clips' latents; empty = no pictures.
        before: of the latents that the upsampler takes.
        steps: of the longest sound; 0 = none.
        room: bytes of the card that may be used.

    Raises:
        UserError: a part that does not fit, before anything is sampled.
    """
    needs = []
    if upsampler is not None and before:
        needs.append(Need("upsampler", _upsampler_bytes(upsampler, before, dtype)))
    if sizes:
        found = fitting_tiles(vae, sizes, room, dtype)
        if found is None:
            decoder = VideoVAE.decoder_on_meta(vae, dtype)
            needs.append(Need("video decoder", _decoding_bytes(decoder, DECODER_TILES[-1], sizes), _in_words(DECODER_TILES[-1])))
        else:
            needs.append(Need("video decoder", found[1], _in_words(found[0])))
    if steps:
        needs.append(Need("sound decoder", _sound_bytes(audio_vae, steps)))
    for need in needs:
        if need.device_bytes > room:
            where = f"--vae {vae.path}: " if need.part == "video decoder" else ""
            raise UserError(
                f"{where}the {need.part} would take {need.row()[1]} for the largest clip, and {size_in_words(room)} may be used. Use a "
                "smaller size or fewer frames, or close other programs that hold memory"
                f"{'' if not where else '; of LTX-2.5 the file ltx-2.5-video-vae-conv takes less'}."
            )
    return needs


def _in_words(tiles: TileSizes) -> str:
    return f"in tiles of {tiles.pixels} pixels and {tiles.frames} frames"


def _decoding_bytes(decoder: VideoVAE, tiles: TileSizes, sizes: Collection[Cells]) -> int:
    """Of the largest of these clips."""
    decoder.use_tiles(tiles)
    if diffusion := [found for cells in sizes if (found := decoder.diffusion_bytes(cells)) is not None]:
        return decoder.weight_bytes + max(diffusion) + _WORKSPACE
    most = 0
    for tile in {decoder.largest_tile(cells) for cells in sizes}:
        latents = torch.empty((1, LATENT_CHANNELS, *tile), device="meta")
        with LiveBytes() as memory:
            next(decoder.decode_in_parts(latents, device=None))
        most = max(most, memory.peak)
    return decoder.weight_bytes + most + _WORKSPACE


def _upsampler_bytes(checkpoint: Checkpoint, sizes: Collection[Cells], dtype: torch.dtype) -> int:
    upsample = LatentUpsampler.on_meta(checkpoint, dtype)
    most = 0
    for cells in sizes:
        with LiveBytes() as memory:
            upsample(torch.empty((1, LATENT_CHANNELS, *cells), device="meta"))
        most = max(most, memory.peak)
    return upsample.weight_bytes + most + _WORKSPACE


def _sound_bytes(checkpoint: Checkpoint, steps: int) -> int:
    """Of the decoder or of the vocoder, which follow each other. Beyond a few parts there is nothing but what is made already."""
    decoder, vocoder = AudioVAE.decoder_on_meta(checkpoint), Vocoder.on_meta(checkpoint)
    counted = min(steps, 2 * SOUND_PART)
    with LiveBytes() as of_decoder:
        mel = decoder.decode(torch.empty((1, AUDIO_CHANNELS, counted, AUDIO_MEL_BINS), device="meta"))
    with LiveBytes() as of_vocoder:
        sound = vocoder(mel)
    made = 2 * sound.nbytes * (steps - counted) // counted  # in parts, and put together
    return max(decoder.weight_bytes + of_decoder.peak, vocoder.weight_bytes + of_vocoder.peak) + made + _WORKSPACE
