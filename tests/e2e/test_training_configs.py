"""Every file of `training_configs/` runs as it is on the tiny checkpoint, with the dataset and the model named on the command line."""

import functools
import re
import tomllib
from pathlib import Path

import pytest

from musubi_tuner import ltxv2_train_network
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.network import parse_pairs
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.networks.arguments import NetworkArguments, network_arguments
from musubi_tuner.tiny.clips import write_clips, write_stills
from tests import training_parts as parts

FOLDER = Path(__file__).resolve().parents[2] / "training_configs"
FILES = sorted(path for path in FOLDER.glob("*.toml") if not path.name.startswith("rl_"))
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
        "prodigy", "dora",
    }  # fmt: skip
    for path in FILES:
        assert path.read_text(encoding="utf-8").startswith("# "), "says what it is for"


def expanded(name: str) -> tuple[TrainingConfig, NetworkArguments]:
    """What the program makes of a file, and of its `network_args`."""
    argv = ["--config_file", str(FOLDER / f"{name}.toml"), "--dataset_config", "dataset.toml", "--ltxv2_model", "model.safetensors"]
    config = ltxv2_train_network.parse_arguments(argv)
    network = config.network
    args = parse_pairs(network.network_args, "--network_args")
    return config, network_arguments(args, dim=network.network_dim, alpha=network.network_alpha)


def test_quality_first_is_every_guard_at_once(tmp_path):
    config, network = expanded("quality_first")
    assert (network.rank, network.alpha, network.dropout.rank) == (32, 32, 0.1)
    assert (config.optimization.optimizer_type, config.optimization.learning_rate) == ("AdamW", 7.5e-5)
    assert (config.audio.audio_balance, config.audio.audio_supervision_mode) == ("ema", "error")
    assert config.losses.independent_audio_timestep is True
    assert (config.losses.noise_offset, config.losses.min_snr_gamma) == (0.05, 0.0)
    frames = re.search(
        r"^# Use (target_frames = .*) in the dataset file", (FOLDER / "quality_first.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert frames is not None
    (tmp_path / "clips").mkdir()
    toml = tmp_path / "dataset.toml"
    toml.write_text(f"[[datasets]]\nvideo_directory = 'clips'\nresolution = [768, 512]\n{frames[1]}\n", encoding="utf-8")
    assert load_dataset_config(toml).datasets[0].target_frames == (81,)


def test_prodigy_and_dora_have_their_own_rates():
    config, _ = expanded("prodigy")
    assert (config.optimization.optimizer_type, config.optimization.learning_rate) == ("Prodigy", 1.0)
    config, network = expanded("dora")
    assert (config.optimization.optimizer_type, config.optimization.learning_rate, network.kind) == ("AdamW", 5e-5, "dora")


@pytest.fixture(scope="module")
def cached(tiny_family, tmp_path_factory):
    """(kind of dataset, mode) -> its TOML, with caches, which runs only read."""

    @functools.cache
    def make(kind: str, mode: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{kind} {mode}")
        write_clips(folder / "clips", count=2, frames=9)
        write_clips(folder / "references", count=2, frames=9, seed=4)
        write_stills(folder / "stills", count=2)
        toml = folder / "dataset.toml"
        toml.write_text("[general]\nresolution = [96, 64]\n" + DATASETS[kind], encoding="utf-8")
        parts.cache(parts.Data(folder, toml, tiny_family.ltx23, mode, tiny_family.gemma))
        return toml

    return make


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_it_runs(path, tiny_family, cached, tmp_path, monkeypatch):
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    toml = cached(SOURCES.get(path.stem, "video"), values["ltx_mode"])
    monkeypatch.chdir(FOLDER.parent)
    argv = ["--config_file", str(path), "--dataset_config", str(toml), "--ltxv2_model", str(tiny_family.ltx23), "--device", "cpu"]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_train_steps", "2", "--lr_warmup_steps", "1", "--lr_decay_steps", "0"]
    if values.get("lr_decay_steps"):
        argv = [*argv[:-4], "--lr_decay_steps", "0.5"]
    assert ltxv2_train_network.main([*argv, "--max_data_loader_n_workers", "0", "--mixed_precision", "no"]) == 0
    assert (tmp_path / "out" / "ltxv2_lora.safetensors").is_file()


def test_accelerate_starts_two_processes_by_the_file_for_two_gpus():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = FOLDER / "two_gpus.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.mixed_precision, config.distributed_type) == (2, "bf16", "MULTI_GPU")
    command = ["--config_file", str(path), "ltxv2_train_network.py", "--config_file", "run.toml"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert args.multi_gpu and not args.use_cpu and (args.num_processes, args.mixed_precision) == (2, "bf16")
    assert args.training_script_args == ["--config_file", "run.toml"], "the trainer's own file is left to it"
