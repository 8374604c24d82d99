"""Caches of other tools: files with our names and keys, without metadata and index, are taken over and trained on."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_adopt_caches, ltxv2_train_network
from musubi_tuner.runtime.errors import UserError
from tests import training_parts as parts


@pytest.fixture(scope="module")
def cached(tiny_family, tmp_path_factory) -> parts.Data:
    return parts.make_data(tmp_path_factory.mktemp("adopt"), tiny_family, "av", held_out=False)


@pytest.fixture
def foreign(cached: parts.Data, tmp_path: Path) -> parts.Data:
    """The caches as another tool leaves them: other metadata or none, legacy keys in one file."""
    folder = tmp_path / "data"
    shutil.copytree(cached.folder, folder)
    for path in (folder / "cache").iterdir():
        if not path.name.endswith(".safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            continue
        tensors = parts.read_tensors(path)
        if path.name.startswith("clip_000_ltxv2_te"):
            tensors = {key.replace("text_", "t5_"): value for key, value in tensors.items()}
        if "_audio" in path.name:
            tensors = {key.replace("x1x1_", "x16x8_"): value for key, value in tensors.items()}
        save_file(tensors, path, metadata={"made_by": "another tool"})
    return parts.Data(folder, folder / "dataset.toml", cached.model, "av", cached.encoder)


def adopt(data: parts.Data, *extra: str, mode: str = "av") -> int:
    return ltxv2_adopt_caches.main(["--dataset_config", str(data.toml), "--ltx_mode", mode, "--ltxv2_model", str(data.model), *extra])


def train(data: parts.Data, output: Path) -> dict[str, torch.Tensor]:
    assert ltxv2_train_network.main(data.arguments("--output_dir", str(output), "--max_train_steps", "2")) == 0
    return load_file(output / "ltxv2_lora.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("media", ["there", "gone"])
def test_adopted_caches_train_as_our_own(cached, foreign, tmp_path, media, caplog):
    caplog.set_level(logging.INFO)
    flags = []
    if media == "gone":
        shutil.rmtree(foreign.folder / "clips")
        flags = ["--source_fps", "24"]
    with pytest.raises(UserError, match="holds no index of this dataset.*tools/adopt_caches.py"):
        train(foreign, tmp_path / "out")
    before = {name: parts.read_tensors(foreign.folder / "cache" / name) for name in contents(foreign.folder / "cache")}
    assert adopt(foreign, *flags) == 0
    for name, tensors in before.items():
        after = load_file(foreign.folder / "cache" / name)
        assert tensors.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in tensors.items())
    assert "Caches: 3 clips taken over, 0 file(s) or source(s) left out" in caplog.text
    assert ("planned from the media" in caplog.text) == (media == "there")
    lora, ours = train(foreign, tmp_path / "out"), train(cached, tmp_path / "ours")
    assert lora.keys() == ours.keys()
    if media == "there":
        assert all(torch.equal(value, ours[key]) for key, value in lora.items()), "the same tensors under the same names of items"
    assert caplog.text.count("older keys") == 1
    whole = contents(foreign.folder / "cache")
    assert adopt(foreign, *flags) == 0 and contents(foreign.folder / "cache") == whole, "a second time changes nothing"


def test_what_does_not_fit_is_left_out_by_name_and_a_dry_run_writes_nothing(foreign, caplog):
    caplog.set_level(logging.INFO)
    cache = foreign.folder / "cache"
    name = "clip_001_00000-017_0096x0064_ltxv2.safetensors"
    tensors = parts.read_tensors(cache / name)
    save_file({key: value[..., :2].contiguous() for key, value in tensors.items()}, cache / name)
    text = cache / "clip_002_ltxv2_te.safetensors"
    save_file({key: value[..., :100].contiguous() if value.ndim == 2 else value for key, value in parts.read_tensors(text).items()}, text)
    whole = contents(cache)
    assert adopt(foreign, "--dry_run") == 1 and contents(cache) == whole
    assert "(128, 3, 2, 2)" in caplog.text and "(1024, 100)" in caplog.text
    assert adopt(foreign) == 1
    assert "Caches: 2 clips taken over, 2 file(s) or source(s) left out" in caplog.text
    assert (cache / name).read_bytes() == whole[name] and text.read_bytes() == whole[text.name]


def test_rates_that_nothing_tells_are_asked_for(foreign):
    shutil.rmtree(foreign.folder / "clips")
    with pytest.raises(UserError, match="no cache file of this dataset can be taken over.*give --source_fps"):
        adopt(foreign)
