"""Trained text connectors: features are cached before them, contexts are made in the step, adapters go to a file of their own."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_train_network
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.items import Draw
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.preflight import check_inputs
from musubi_tuner.training.setup import draw_rules
from tests import training_parts as parts

FEATURES = ("--text_cache_stage", "features")


@pytest.fixture(scope="module")
def contexts(tiny_family, tmp_path_factory) -> parts.Data:
    data = parts.make_data(tmp_path_factory.mktemp("contexts"), tiny_family, "av", batch_size=2, count=2, held_out=False)
    captions = sorted((data.folder / "clips").glob("*.txt"))
    captions[0].write_text("a fox that runs over the snow and calls for the other foxes, twice", encoding="utf-8")
    captions[1].write_text("a bell", encoding="utf-8")
    parts.cache(data)
    return data


@pytest.fixture(scope="module")
def features(contexts, tmp_path_factory) -> parts.Data:
    folder = tmp_path_factory.mktemp("features") / "data"
    shutil.copytree(contexts.folder, folder)
    data = parts.Data(folder, folder / "dataset.toml", contexts.model, contexts.mode, contexts.encoder)
    parts.cache(data, text=("--text_encoder", str(data.encoder), *FEATURES))
    return data


def flags(output: Path, *extra: str) -> list[str]:
    return ["--output_dir", str(output), "--save_precision", "float32", *extra]


def load(data: parts.Data, output: Path, *extra: str):
    config = ltxv2_train_network.parse_arguments(data.arguments(*flags(output, *extra)))
    parts_of_run = parts.load(config, data)
    inputs = check_inputs(config)
    batch = make_batch([Draw(item, epoch=0, repeat=0) for item in inputs.items], data.mode, draw_rules(inputs, "train", 0))
    return *parts_of_run, batch


def losses_of(wrapper, batch) -> torch.Tensor:
    losses = parts.item_losses(wrapper, batch)
    return torch.stack([losses.video, losses.audio])


def test_features_through_the_connectors_are_the_cached_contexts(contexts, features, tmp_path):
    plain, network, batch = load(contexts, tmp_path)
    assert plain.connectors is None and network.of_connectors() is None
    own, network, ragged = load(features, tmp_path, "--train_connectors")
    assert ragged.text.shape[1] < 100 and not bool(ragged.text_mask.all()), "real tokens alone, padded to the longer caption"
    with torch.no_grad():
        expected, made = losses_of(plain, batch), losses_of(own, ragged)
        error = (made - expected).abs().max()
        swapped = losses_of(own, dataclasses.replace(ragged, text=ragged.text.flip(0), text_mask=ragged.text_mask.flip(0)))
        assert float(error) < 0.05 * float((swapped - expected).abs().max()), "within the rounding of the caches"
        alone = make_batch_of_one(features, tmp_path)
        assert torch.allclose(losses_of(own, alone)[:, 0], made[:, 1], rtol=1e-4), "padding changes nothing"


def make_batch_of_one(data: parts.Data, output: Path):
    inputs = check_inputs(ltxv2_train_network.parse_arguments(data.arguments(*flags(output, "--train_connectors"))))
    return make_batch([Draw(inputs.items[1], epoch=0, repeat=0)], data.mode, draw_rules(inputs, "train", 0))


def test_gradients_reach_the_connectors_and_no_frozen_weight(features, tmp_path):
    wrapper, network, batch = load(features, tmp_path, "--train_connectors")
    adapters = network.of_connectors()
    assert {name.split(".")[0] for name in adapters.names} == {"video_embeddings_connector", "audio_embeddings_connector"}
    losses_of(wrapper, batch).sum().backward()
    assert all(bool(layer.lora_B.grad.any()) for layer in adapters.layers.values())
    assert all(parameter.grad is None for parameter in wrapper.parameters() if not parameter.requires_grad)


def test_connectors_are_trained_saved_started_from_and_resumed(features, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a whale --w 64 --h 32 --f 9 --s 1 --l 1", encoding="utf-8")
    preview = ("--sample_prompts", str(prompts), "--sample_at_first", "--text_encoder", str(features.encoder))

    def run(folder: str, *extra: str) -> list[dict[str, torch.Tensor]]:
        assert ltxv2_train_network.main(features.arguments(*flags(tmp_path / folder, "--train_connectors", *extra))) == 0
        return [load_file(tmp_path / folder / name) for name in ("ltxv2_lora.safetensors", "ltxv2_lora.connectors.safetensors")]

    whole = run("whole", "--max_train_steps", "4", *preview)
    assert list((tmp_path / "whole" / "sample").glob("*.mp4")), "a preview from a prompt encoded to features"
    assert not any("connector" in name for name in whole[0])
    assert all(name.split(".")[1].endswith("_embeddings_connector") for name in whole[1])
    assert all(bool(value.any()) for value in whole[1].values())
    run("halves", "--max_train_steps", "2", "--save_state", "--save_every_n_steps", "2")
    halves = run("halves", "--max_train_steps", "4", "--resume", str(tmp_path / "halves" / "ltxv2_lora-step00000002-state"))
    for one, other in zip(whole, halves, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    start = ("--network_weights", str(tmp_path / "whole" / "ltxv2_lora.safetensors"))
    for extra in ((), ("--dim_from_weights", "--network_dim", "2")):
        _, network, _ = load(features, tmp_path, "--train_connectors", *start, *extra)
        started = network.of_connectors().file_tensors(torch.float32)
        assert started.keys() == whole[1].keys()
        assert all(torch.allclose(value, whole[1][name], atol=1e-6) for name, value in started.items())


def test_a_folder_to_start_from_gives_its_newest_file_with_its_connectors(features, tmp_path):
    def run(folder: str, *extra: str) -> dict[str, torch.Tensor]:
        assert ltxv2_train_network.main(features.arguments(*flags(tmp_path / folder, "--train_connectors", *extra))) == 0
        return load_file(tmp_path / folder / "ltxv2_lora.connectors.safetensors")

    first = run("first", "--max_train_steps", "2")
    second = run("second", "--max_train_steps", "1", "--learning_rate", "0", "--network_weights", str(tmp_path / "first"))
    assert first.keys() == second.keys() and all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_caches_of_the_other_stage_are_refused_with_the_command(contexts, features, tmp_path):
    with pytest.raises(UserError, match=r"(?s)another stage.*--text_cache_stage features"):
        ltxv2_train_network.main(contexts.arguments(*flags(tmp_path, "--train_connectors")))
    with pytest.raises(UserError, match="another stage"):
        ltxv2_train_network.main(features.arguments(*flags(tmp_path)))
    with pytest.raises(UserError, match="type=full"):
        load(features, tmp_path, "--train_connectors", "--network_args", "type=full", "include_patterns=attn1")
