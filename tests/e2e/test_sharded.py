"""Full weights sharded over two processes (torch's FSDP2 over gloo on the CPU): the losses, weights and states of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_train_network
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training import full_finetuning
from musubi_tuner.training.preflight import check_inputs
from tests import training_parts as parts
from tests.conftest import REPOSITORY
from tests.e2e.test_full_finetuning import argv
from tests.e2e.test_processes import free_port, launch
from tests.unit.test_docs import commands

PROGRAM = "musubi_tuner.ltxv2_train_network"


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("zwei karten"), tiny_family, "av", count=4)


def page_command() -> list[str]:
    (words,) = [words for page, words in commands() if page == "full_finetuning.md" and "launch" in words and "--config_file" in words]
    return words


@pytest.fixture
def sharding(monkeypatch):
    """What accelerate's launcher says to its processes for the config file of two cards, as the page's command starts it."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = page_command()
    monkeypatch.chdir(REPOSITORY)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[words.index("launch") + 1 :]))
    assert args.use_fsdp and not args.use_cpu and (args.num_processes, args.mixed_precision) == (2, "bf16")
    said = prepare_multi_gpu_env(args)
    for name in ("ACCELERATE_USE_FSDP", *(name for name in said if name.startswith("FSDP_"))):
        monkeypatch.setenv(name, said[name])


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "ltxv2_lora.safetensors")


def test_two_processes_with_half_of_the_weights_each_train_what_one_trains(data, tmp_path, sharding):
    """float32, SGD, clipped, with held-out items and recomputed blocks."""
    flags = ("--optimizer_type", "SGD", "--learning_rate", "0.01", "--gradient_checkpointing")
    one = argv(data, tmp_path / "one", *flags, "--gradient_accumulation_steps", "2")
    assert ltxv2_train_network.main(one) == 0
    done = launch(2, PROGRAM, *argv(data, tmp_path / "two", *flags))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of weights that 2 processes share out" in done.stderr
    left, right, base = saved(tmp_path / "one"), saved(tmp_path / "two"), load_file(data.model)
    assert left.keys() == right.keys() == base.keys()
    assert max(float((left[name].float() - right[name].float()).abs().max()) for name in left) < 1e-5
    assert max(float((left[name].float() - base[name].float()).abs().max()) for name in left) > 1e-3, "something was learned"
    for name in ("loss_video", "loss_audio", "validation/loss_video"):
        ones, twos = ([line[name] for line in parts.losses(tmp_path / folder) if name in line] for folder in ("one", "two"))
        assert ones == pytest.approx(twos, abs=1e-4) and ones


@pytest.mark.skipif(sys.platform == "win32", reason="accelerate launch asks for libuv, which torch's Windows wheel is built without")
def test_the_command_of_the_page_shares_the_weights_out(data, tmp_path):
    """accelerate's launcher with the config file of two cards, which are two processes of this machine's CPU."""
    words = page_command()
    place = words.index("ltxv2_train_network.py")
    launcher = [word.replace("training_configs", str(REPOSITORY / "training_configs")) for word in words[2:place]]
    names = {
        "--dataset_config": str(data.toml),
        "--ltxv2_model": str(data.model),
        "--output_dir": str(tmp_path),
        "--save_every_n_steps": "1",
    }
    flags = [names.get(before, word) for before, word in zip(words[place:], words[place + 1 :], strict=False)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port", str(free_port())]
    command += [str(REPOSITORY / "ltxv2_train_network.py"), *flags, "--max_train_steps", "2", "--device", "cpu"]
    path = os.pathsep.join(filter(None, (str(REPOSITORY / "src"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of weights that 2 processes share out" in " ".join(done.stderr.split())
    made, base = load_file(tmp_path / "my_model.safetensors"), load_file(data.model)
    assert made.keys() == base.keys()
    assert {path.name for path in (tmp_path / "my_model-step00000002-state").iterdir()} > {"network-1.safetensors", "optimizer-1.pt"}


@pytest.mark.parametrize("dtype", ["no", "bf16"])
def test_a_resumed_sharded_run_is_the_uninterrupted_one(data, tmp_path, sharding, dtype):
    flags = ("--mixed_precision", dtype, "--save_every_n_steps", "2", "--save_state")
    done = launch(2, PROGRAM, *argv(data, tmp_path / "whole", *flags))
    assert done.returncode == 0, done.stderr[-3000:]
    state = tmp_path / "whole" / "ltxv2_lora-step00000002-state"
    assert {path.name for path in state.iterdir()} == {
        "network.safetensors", "network-1.safetensors", "optimizer.pt", "optimizer-1.pt", "progress.json",
    }  # fmt: skip
    done = launch(2, PROGRAM, *argv(data, tmp_path / "again", *flags, "--resume", str(state)))
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = saved(tmp_path / "whole"), saved(tmp_path / "again")
    assert all(torch.equal(left[name], right[name]) for name in left)
    with pytest.raises(UserError, match="was sharded over 2 processes, and is whole in each process here"):
        ltxv2_train_network.main(argv(data, tmp_path / "alone", *flags[2:], "--resume", str(state)))


def test_without_sharding_the_processes_average_their_gradients(data, tmp_path):
    flags = ("--optimizer_type", "SGD", "--learning_rate", "0.01", "--max_train_steps", "2")
    assert ltxv2_train_network.main(argv(data, tmp_path / "one", *flags, "--gradient_accumulation_steps", "2")) == 0
    done = launch(2, PROGRAM, *argv(data, tmp_path / "two", *flags))
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert max(float((left[name].float() - right[name].float()).abs().max()) for name in left) < 1e-5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--optimizer_type", "Adafactor"), "needs whole rows and columns"),
        (("--ema_decay", "0.9"), "--ema_decay 0.9 with weights that are sharded"),
        (("--optimizer_type", "Prodigy"), "--optimizer_type Prodigy: with weights that are sharded"),
    ],
)
def test_what_is_not_done_with_parts_is_refused(data, tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        full_finetuning.check_sharded(check_inputs(ltxv2_train_network.parse_arguments(argv(data, tmp_path, *flags))))


def test_a_network_is_not_sharded(data, tmp_path, sharding):
    with pytest.raises(UserError, match=r"done with --full_finetune alone.*two_gpus\.yaml"):
        ltxv2_train_network.main(data.arguments("--output_dir", str(tmp_path)))
