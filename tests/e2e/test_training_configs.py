"""Every file of `training_configs/` runs as it is on the tiny checkpoint, with the dataset and the model named on the command line."""

import tomllib
from pathlib import Path

import pytest

from musubi_tuner import ltxv2_train_network
from musubi_tuner.tiny.clips import write_clips, write_stills
from tests import training_parts as parts

FOLDER = Path(__file__).resolve().parents[2] / "training_configs"
FILES = sorted(FOLDER.glob("*.toml"))
DATASETS = {
    "video": '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\ntarget_frames = [9]\n',
    "image": '[[datasets]]\nimage_directory = "stills"\ncache_directory = "cache"\n',
    "reference": (
        '[[datasets]]\nvideo_directory = "clips"\nreference_directory = "references"\ncache_directory = "cache"\ntarget_frames = [9]\n'
    ),
}
SOURCES = {"style_from_stills": "image", "reference_transformation": "reference"}


def test_there_is_one_for_each_intent():
    assert {path.stem for path in FILES} == {
        "character_with_voice", "style_from_stills", "motion", "voice_alone", "reference_transformation", "quality_first",
    }  # fmt: skip
    for path in FILES:
        assert path.read_text(encoding="utf-8").startswith("# "), "says what it is for"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_it_runs(path, tiny_family, tmp_path, monkeypatch):
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    kind = SOURCES.get(path.stem, "video")
    write_clips(tmp_path / "clips", count=2, frames=9)
    write_clips(tmp_path / "references", count=2, frames=9, seed=4)
    write_stills(tmp_path / "stills", count=2)
    toml = tmp_path / "dataset.toml"
    toml.write_text("[general]\nresolution = [96, 64]\n" + DATASETS[kind], encoding="utf-8")
    parts.cache(parts.Data(tmp_path, toml, tiny_family.ltx23, values["ltx_mode"], tiny_family.gemma))
    monkeypatch.chdir(FOLDER.parent)
    argv = ["--config_file", str(path), "--dataset_config", str(toml), "--ltxv2_model", str(tiny_family.ltx23), "--device", "cpu"]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_train_steps", "2", "--lr_warmup_steps", "1", "--lr_decay_steps", "0"]
    if values.get("lr_decay_steps"):
        argv = [*argv[:-4], "--lr_decay_steps", "0.5"]
    assert ltxv2_train_network.main([*argv, "--max_data_loader_n_workers", "0", "--mixed_precision", "no"]) == 0
    assert (tmp_path / "out" / "ltxv2_lora.safetensors").is_file()
