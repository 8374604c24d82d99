"""The commands of docs/how-to/several_machines.md: two launchers on loopback, each a machine of its own with one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner.tiny.clips import write_clips
from tests.conftest import REPOSITORY
from tests.e2e.test_processes import free_port
from tests.training_parts import losses
from tests.unit.test_docs import commands

PAGE, HELP = "several_machines.md", "192.168.1.10"
LAUNCHES = [words for page, words in commands() if page == PAGE]
SHORT = {"ltxv2_train_network.py": ["--max_train_steps", "2", "--network_dim", "4", "--mixed_precision", "no"]}
TOML = '[general]\nresolution = [64, 64]\n[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\ntarget_frames = [9]\n'

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the launchers ask for libuv, which torch's Windows wheel is built without")


@pytest.fixture(scope="module")
def project(tiny_family, tmp_path_factory) -> Path:
    """The folder that both machines share."""
    folder = tmp_path_factory.mktemp("shared ordner")
    write_clips(folder / "clips", count=3, frames=9)
    (folder / "dataset.toml").write_text(TOML, encoding="utf-8")
    shutil.copy(tiny_family.ltx23, folder / "ltx-2.3-22b-dev.safetensors")
    shutil.copytree(tiny_family.gemma, folder / "gemma-3-12b-it-qat-q4_0-unquantized")
    return folder


def start(words: list[str], port: int, folder: Path, rank: int) -> subprocess.Popen:
    """A launcher of the page, with the address of this machine, a free port, and the flags of a short run on the CPU."""
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    launcher, script, flags = words[:place], words[place], words[place + 1 :]
    launcher = ["127.0.0.1" if word == HELP else str(port) if word == "29500" else word for word in launcher]
    module = ["-m", "torch.distributed.run"] if launcher[0] == "torchrun" else ["-m", "accelerate.commands.launch"]
    flag = "--node_rank" if launcher[0] == "torchrun" else "--machine_rank"
    launcher[launcher.index(flag) + 1] = str(rank)
    rest = launcher[1:] if launcher[0] == "torchrun" else launcher[2:]
    command = [sys.executable, *module, *rest, str(REPOSITORY / script), *flags, "--device", "cpu", *SHORT.get(script, [])]
    path = os.pathsep.join(filter(None, (str(REPOSITORY / "src"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def on_both(words: list[str], folder: Path) -> list[str]:
    """What each machine says."""
    port = free_port()
    machines = [start(words, port, folder, rank) for rank in range(2)]
    try:
        said = [machine.communicate(timeout=240)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(text[-2000:] for text in said)
    return said


def test_the_commands_of_the_two_machines_differ_by_their_rank_alone():
    pairs = {}
    for words in LAUNCHES:
        if words[0] == "accelerate":
            place = words.index("--machine_rank") + 1
            pairs.setdefault(" ".join([*words[:place], *words[place + 1 :]]), []).append(words[place])
    assert len(pairs) == 3 and all(ranks == ["0", "1"] for ranks in pairs.values())


def test_two_machines_cache_and_train_together(project):
    """Each caching command leaves the files of all clips, and a LoRA comes of both; torchrun's makes the same one."""
    of_first = [words for words in LAUNCHES if "1" not in (words[words.index(flag) + 1] for flag in ("--machine_rank",) if flag in words)]
    assert len(of_first) == 4
    *caching, training, by_torchrun = of_first
    for words in caching:
        on_both(words, project)
    cached = [path.name for path in (project / "cache").rglob("*.safetensors")]
    assert sum(name.endswith("_te.safetensors") for name in cached) == 4 and len(cached) == 7, "three clips, their captions, the empty one"
    first, second = on_both(training, project)
    assert "2 process(es)" in first and "steps an epoch" not in second, "the second machine is silent"
    assert len([line for line in losses(project / "output", "my_lora") if "loss_video" in line]) == 2
    made = load_file(project / "output" / "my_lora.safetensors")
    shutil.move(project / "output", project / "before")
    on_both(by_torchrun, project)
    again = load_file(project / "output" / "my_lora.safetensors")
    assert all(torch.allclose(made[name].float(), again[name].float(), atol=1e-6) for name in made)
