"""Each component has a loader of its own, which reads this component's tensors of a full checkpoint: all of them, and no other."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from musubi_tuner.ltxv2 import reading
from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder
from musubi_tuner.ltxv2.text.connectors import load_connectors
from musubi_tuner.ltxv2.text.encoders import encoder_options, load_encoder
from musubi_tuner.ltxv2.text.features import load_feature_extractor
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.tiny.checkpoint import TRANSFORMER
from musubi_tuner.tiny.configs import GEMMA_WIDTH

PLAIN = {"device": "cpu", "dtype": torch.float32}
VIDEO_STATISTICS, AUDIO_STATISTICS = "vae.per_channel_statistics.", "audio_vae.per_channel_statistics."
CONNECTORS = (f"{TRANSFORMER}video_embeddings_connector.", f"{TRANSFORMER}audio_embeddings_connector.")

LOADERS = {
    "transformer": (lambda file: load_transformer(file, mode="av", **PLAIN), (TRANSFORMER,)),
    "video VAE encoder": (lambda file: VideoVAE.load(file, parts=("encoder",), **PLAIN), ("vae.encoder.", VIDEO_STATISTICS)),
    "video VAE decoder": (lambda file: VideoVAE.load(file, parts=("decoder",), **PLAIN), ("vae.decoder.", VIDEO_STATISTICS)),
    "audio VAE encoder": (
        lambda file: AudioVAE.load(file, parts=("encoder",), device="cpu"),
        ("audio_vae.encoder.", AUDIO_STATISTICS),
    ),
    "audio VAE decoder": (
        lambda file: AudioVAE.load(file, parts=("decoder",), device="cpu"),
        ("audio_vae.decoder.", AUDIO_STATISTICS),
    ),
    "vocoder": (lambda file: Vocoder.load(file, device="cpu"), ("vocoder.",)),
    "text projection": (lambda file: load_feature_extractor(file, GEMMA_WIDTH, **PLAIN), ("text_embedding_projection.",)),
    "connectors": (lambda file: load_connectors(file, **PLAIN), CONNECTORS),
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """(file, name) of every tensor whose bytes are read from here on, by any loader."""
    seen, whole = [], reading._read_into
    monkeypatch.setattr(reading, "_read_into", lambda data, name, entry: seen.append((entry.file, name)) or whole(data, name, entry))
    return seen


def own_names(checkpoint: Checkpoint, component: str) -> set[str]:
    _, prefixes = LOADERS[component]
    names = {name for name in checkpoint.names() if name.startswith(prefixes)}
    return {name for name in names if not name.startswith(CONNECTORS)} if component == "transformer" else names


@pytest.mark.parametrize("style", ["ltx20", "ltx23"])
@pytest.mark.parametrize("component", LOADERS)
def test_a_loader_reads_its_own_tensors_and_no_other(component, style, tiny_family, read):
    checkpoint = open_checkpoint(getattr(tiny_family, style))
    LOADERS[component][0](checkpoint)
    names = [name for _, name in read]
    assert set(names) == own_names(checkpoint, component) and len(names) == len(set(names)), "each of them once"


def test_the_components_are_the_whole_checkpoint(tiny_family):
    checkpoint = open_checkpoint(tiny_family.ltx23)
    assert set().union(*(own_names(checkpoint, component) for component in LOADERS)) == set(checkpoint.names())


def test_the_text_encoder_reads_the_language_model_alone(tiny_family, tmp_path, read):
    """From a folder as the hub has it: with a vision tower and a head."""
    folder = shutil.copytree(tiny_family.gemma, tmp_path / "gemma")
    language = {f"language_model.model.{name}": tensor for name, tensor in load((folder / "model.safetensors").read_bytes()).items()}
    others = {
        "vision_tower.vision_model.post_layernorm.weight": torch.ones(4),
        "multi_modal_projector.mm_soft_emb_norm.weight": torch.ones(4),
    }
    (folder / "model.safetensors").unlink()
    save_file(language | others, folder / "model.safetensors", metadata={"format": "pt"})
    load_encoder(encoder_options(str(folder), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=16))
    assert set(read) == {(folder / "model.safetensors", name) for name in language}
