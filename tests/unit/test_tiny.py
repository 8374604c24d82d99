"""The tiny models are complete, deterministic and lively."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder
from musubi_tuner.ltxv2.versions import detect_version
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.checkpoint import write_tiny_family
from musubi_tuner.tiny.encoders import corpus


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_call_writes_the_same_bytes(tiny_family, tmp_path):
    write_tiny_family(tmp_path)
    assert digests(tmp_path) == digests(tiny_family.folder)


@pytest.mark.parametrize(("name", "version"), [("ltx20", "2.0"), ("ltx23", "2.3"), ("ltx25_transformer", "2.5")])
def test_versions_are_recognized_with_and_without_metadata(tiny_family, tmp_path, name, version):
    from safetensors.torch import load_file, save_file

    path = getattr(tiny_family, name)
    checkpoint = open_checkpoint(path)
    assert detect_version(checkpoint) == version and checkpoint.model_version.startswith(version)
    save_file(load_file(path), tmp_path / "bare.safetensors", metadata={"config": json.dumps(dict(checkpoint.config))})
    assert detect_version(open_checkpoint(tmp_path / "bare.safetensors")) == version


@pytest.mark.parametrize("name", ["ltx20", "ltx23"])
def test_latents_of_ordinary_clips_are_about_normal_and_decode_to_something(tiny_family, name):
    checkpoint = open_checkpoint(getattr(tiny_family, name))
    vae = VideoVAE.load(checkpoint, device="cpu", dtype=torch.float32)
    coarse = torch.rand(1, 3, 3, 6, 6, generator=torch.Generator().manual_seed(11)) * 2 - 1
    frames = torch.nn.functional.interpolate(coarse, size=(17, 96, 96), mode="trilinear")
    latents = vae.encode(frames)
    assert abs(float(latents.mean())) < 0.5 and 0.4 < float(latents.std()) < 2.5
    assert 0.05 < float(vae.decode(latents).std()) < 5
    audio_vae, vocoder = AudioVAE.load(checkpoint, device="cpu"), Vocoder.load(checkpoint, device="cpu")
    time = torch.arange(16000) / 16000
    sound = (0.3 * torch.sin(2 * torch.pi * 330 * time)).expand(1, 2, -1)
    latents = audio_vae.encode(sound)
    assert abs(float(latents.mean())) < 1.5 and 0.2 < float(latents.std()) < 3
    waveform = vocoder(audio_vae.decode(latents))
    assert vocoder.sampling_rate == (24000 if name == "ltx20" else 48000)
    assert waveform.shape[1] == 2 and 1e-3 < float(waveform.std()) and float(waveform.abs().max()) <= 1


def test_tokenizers_know_the_corpus_and_spell_out_the_rest(tiny_family):
    from transformers import AutoTokenizer

    sentence, strange = corpus()[0], "Zyzzyva hums softly"
    for folder in (tiny_family.gemma, tiny_family.t5):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(sentence)["input_ids"]
        assert len(ids) < len(sentence) / 2, "words and parts of words, not letters"
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == sentence
        assert tokenizer(strange)["input_ids"] != tokenizer("softly hums")["input_ids"]


def test_corpus_is_plain_and_large_enough():
    lines = corpus()
    assert len(lines) >= 300 and len(set(lines)) == len(lines)
    assert all(line.isascii() and line == line.strip() for line in lines)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "beneath"):
        with pytest.raises(UserError, match=f"{path}: the folder cannot be made"):
            write_tiny_family(path)
