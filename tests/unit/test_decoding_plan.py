"""What decoders take, counted before anything is sampled, and pieces that are the whole."""

import json

import pytest
import torch

from benchmarks.empty_files import full_config, model_shapes, write_empty
from musubi_tuner.cache.store import serialize, write_bytes
from musubi_tuner.generation.decode import to_frames
from musubi_tuner.ltxv2.autoencoders import audio_vae, vocoder
from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.autoencoders.video_vae import DECODER_TILES, TileSizes, VideoVAE
from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.memory.live_bytes import LiveBytes
from musubi_tuner.placement import decoding
from musubi_tuner.placement.decoding import fitting_tiles, needs_after_sampling
from musubi_tuner.runtime.errors import UserError

GIB = 2**30
SMALL, LARGE = (16, 16, 24), (16, 32, 48)
"""768x512x121 and 1536x1024x121."""


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Checkpoint:
    """Decoders of 2.3 at the released widths, without numbers."""
    sections = full_config(1)
    with torch.device("meta"):
        shapes = model_shapes(LTXModel(TransformerConfig.from_checkpoint_config(sections["transformer"])), sections)
    path = tmp_path_factory.mktemp("released") / "empty.safetensors"
    write_empty(path, shapes, {"config": json.dumps(sections), "model_version": "2.3.0"})
    return open_checkpoint(path)


def needs(checkpoint: Checkpoint, room: float, sizes=(SMALL,), steps: int = 126):
    found = needs_after_sampling(
        checkpoint, checkpoint, None, sizes=sizes, before=(), steps=steps, room=int(room * GIB), dtype=torch.bfloat16
    )
    return {need.part: need for need in found}


def test_decoders_take_what_the_allocator_gave_on_a_simulated_card(released):
    """`python -m benchmarks.generate_memory`, 2026-11-26."""
    found = needs(released, 14)
    assert found["video decoder"].device_bytes / GIB == pytest.approx(2.71, rel=0.02)
    assert "768 pixels and 80 frames" in found["video decoder"].how


def test_a_card_without_room_decodes_in_smaller_tiles_and_one_without_any_is_told_before_sampling(released):
    chosen = [fitting_tiles(released, [LARGE], int(room * GIB), torch.bfloat16) for room in (3, 2, 1, 0.8)]
    assert [None if one is None else one[0] for one in chosen] == [*DECODER_TILES, None]
    assert all(one[1] <= room * GIB for one, room in zip(chosen, (3, 2, 1), strict=False))
    with pytest.raises(UserError, match=r"--vae .*empty\.safetensors: the video decoder would take 0.9 GiB .* and 0.8 GiB may be used"):
        needs(released, 0.8)


def test_long_sound_takes_no_more_than_its_parts(released):
    short, long, longer = (needs(released, 14, sizes=(), steps=25 * seconds)["sound decoder"].device_bytes for seconds in (10, 20, 120))
    assert long < 1.2 * short and longer < 1.5 * short, "beside a part there is what is made already"


def test_counting_is_what_is_alive_at_a_time():
    x = torch.empty(1000, dtype=torch.float32, device="meta")
    with LiveBytes() as memory:
        y = x + 1
        y = y * 2
        z = y + y
        del y
        z = z.view(10, 100)
    assert (memory.peak, memory.live) == (2 * 4000, 4000), "what is computed from, what comes of it, views not twice"


def released_kernels(tiny: Checkpoint, tmp_path) -> Checkpoint:
    """A tiny vocoder whose kernels are as long as those of 2.3, and so its reach."""
    from musubi_tuner.tiny import checkpoint as tiny_checkpoint
    from musubi_tuner.tiny import configs

    section = configs.vocoder_section("2.3")
    for part in section.values():
        part |= {"resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "vocoder_section", lambda version: section)
        tensors = {vocoder.PREFIX + name: value for name, value in tiny_checkpoint._vocoder_tensors("2.3").items()}
    path = tmp_path / "vocoder.safetensors"
    write_bytes(path, serialize(tensors, {"config": json.dumps({"vocoder": section})}))
    return open_checkpoint(path)


def test_a_waveform_in_parts_is_the_whole(tiny_family, tmp_path, monkeypatch):
    mel = torch.randn(1, 2, 250, 64, generator=torch.Generator().manual_seed(0)) - 3
    made = Vocoder.load(released_kernels(tiny_family, tmp_path), device="cpu")
    whole = made(mel)
    monkeypatch.setattr(vocoder, "PART", 130)
    parts = made(mel)
    assert parts.shape == whole.shape and whole.std() > 0.01
    assert (parts - whole).abs().max() < 1e-5
    monkeypatch.setattr(vocoder, "REACH", 2)
    assert (made(mel) - whole).abs().max() > 1e-4, "with fewer frames beside them they are not"


def test_mel_frames_in_parts_are_the_whole(tiny_family, monkeypatch):
    latents = torch.randn(1, 8, 130, 16, generator=torch.Generator().manual_seed(0))
    decoder = AudioVAE.load(open_checkpoint(tiny_family.ltx23), device="cpu", parts=("decoder",))
    whole = decoder.decode(latents)
    monkeypatch.setattr(audio_vae, "PART", 50)
    parts = decoder.decode(latents)
    assert parts.shape == whole.shape == (1, 2, 4 * 130 - 3, 64)
    assert (parts - whole).abs().max() < 1e-5 * whole.abs().max()
    monkeypatch.setattr(audio_vae, "REACH", 2)
    assert (decoder.decode(latents) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("file", ["ltx23", "ltx25_diffusion_vae"])
def test_tiles_are_chosen_of_any_decoder_and_it_decodes_in_them(tiny_family, file, monkeypatch):
    checkpoint = open_checkpoint(getattr(tiny_family, file))
    usual, smaller = TileSizes(), TileSizes(pixels=256, pixel_overlap=64, frames=32, frame_overlap=16)
    monkeypatch.setattr(decoding, "DECODER_TILES", (usual, smaller))
    cells = (7, 10, 10)
    found = fitting_tiles(checkpoint, [cells], 2**40, torch.float32)
    assert found is not None and found[0] == usual
    less = fitting_tiles(checkpoint, [cells], found[1] - 1, torch.float32)
    assert less is not None and less[0] == smaller and less[1] < found[1]
    vae = VideoVAE.load(checkpoint, device="cpu", dtype=torch.float32, parts=("decoder",))
    latents = torch.randn(1, 128, 5, 9, 4, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents)
    vae.use_tiles(smaller)
    tiled = vae.decode(latents)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    vae.use_tiles(usual)
    assert torch.equal(vae.decode(latents), whole)


class Cramped:
    """A decoder on a card that holds small tiles alone."""

    device = torch.device("cpu")

    def __init__(self, fits: TileSizes | None) -> None:
        self.fits, self.tried = fits, []

    def use_tiles(self, tiles: TileSizes) -> None:
        self.tried.append(tiles)

    def decode_in_parts(self, latents: torch.Tensor, *, device: torch.device):
        yield torch.zeros(1, 3, 1, 4, 4)
        if self.tried[-1] != self.fits:
            raise torch.OutOfMemoryError("no room")
        yield torch.ones(1, 3, 8, 4, 4)


def test_a_card_that_runs_out_of_memory_decodes_again_in_smaller_tiles(caplog):
    cramped = Cramped(DECODER_TILES[1])
    frames = to_frames(cramped, torch.zeros(1, 128, 2, 1, 1), DECODER_TILES)
    assert frames.shape == (9, 4, 4, 3) and int(frames[-1].min()) == 255, "whole, each frame once"
    assert cramped.tried == list(DECODER_TILES[:2])
    assert "going on in tiles of 512 pixels and 48 frames" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        to_frames(Cramped(None), torch.zeros(1, 128, 2, 1, 1), DECODER_TILES)
