"""The world's kept weights: the checkpoint and the text encoder that are made of them, read by the product's own classes."""

import hashlib
import random
from pathlib import Path

import pytest
import torch

from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder
from musubi_tuner.ltxv2.text.connectors import load_connectors
from musubi_tuner.ltxv2.text.features import load_feature_extractor
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.media.audio import resample
from musubi_tuner.tiny.world.checkpoint import write_world_checkpoint
from musubi_tuner.tiny.world.scenes import draw_scenes, scene_of
from musubi_tuner.tiny.world.scorer import base_scores, character_scores, hear, see
from musubi_tuner.tiny.world.sounds import RATE, draw_sounds, sound_of
from musubi_tuner.tiny.world.subjects import draw_character, draw_subject
from musubi_tuner.tiny.world.text import STATES, WIDTH, make_world_gemma, write_world_gemma

CLIPS = 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("world") / "world.safetensors"
    write_world_checkpoint(path)
    assert path.stat().st_size < 40e6
    return open_checkpoint(path)


@pytest.mark.parametrize(("draw", "scores"), ((draw_subject, base_scores), (draw_character, character_scores)), ids=("base", "character"))
def test_clips_are_read_after_the_autoencoders(checkpoint: Checkpoint, draw, scores) -> None:
    """The decoders never met the character."""
    rng = random.Random(21)
    subjects = [draw(rng) for _ in range(CLIPS)]
    frames = draw_scenes([scene_of(one, rng) for one in subjects])
    waves = draw_sounds([sound_of(one, rng) for one in subjects])
    video = VideoVAE.load(checkpoint, device="cpu", dtype=torch.float32)
    audio, vocoder = AudioVAE.load(checkpoint, device="cpu"), Vocoder.load(checkpoint, device="cpu")
    pixels = video.decode(video.encode(frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1))
    sounds = vocoder(audio.decode(audio.encode(waves[:, None].expand(-1, 2, -1))))
    seen = ((pixels.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 4, 1)
    error = (seen - frames).square().mean()
    assert 10 * torch.log10(255**2 / error) > 26
    heard = resample(sounds, vocoder.sampling_rate, RATE)
    assert set(scores(subjects, [see(one) for one in seen], [hear(one) for one in heard]).values()) == {1.0}


def test_transformer_and_text_parts_load(checkpoint: Checkpoint) -> None:
    model = load_transformer(checkpoint, mode="av", device="cpu", dtype=torch.float32)
    assert sum(one.numel() for one in model.parameters()) == pytest.approx(4.5e6, rel=0.05)
    load_feature_extractor(checkpoint, WIDTH, device="cpu", dtype=torch.float32)
    load_connectors(checkpoint, device="cpu", dtype=torch.float32)


def test_the_checkpoint_is_the_same_bytes_each_time(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_world_checkpoint(tmp_path / "again.safetensors")
    again = open_checkpoint(tmp_path / "again.safetensors")
    assert digest(again.path) == digest(checkpoint.path)


def test_the_text_encoder_that_is_kept_fits_how_one_is_made(tmp_path: Path) -> None:
    """In shape; other versions of the libraries may draw other weights."""
    from transformers import AutoConfig

    write_world_gemma(tmp_path / "kept")
    make_world_gemma(tmp_path / "made")
    kept, made = (AutoConfig.from_pretrained(tmp_path / name) for name in ("kept", "made"))
    assert (kept.hidden_size, kept.num_hidden_layers + 1, kept.vocab_size) == (WIDTH, STATES, made.vocab_size)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
