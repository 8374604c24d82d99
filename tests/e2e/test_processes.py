"""Two processes over gloo on the CPU: the same caches and the same LoRA as one."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_train_network
from tests import training_parts as parts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_as_group_of_one(program: str) -> subprocess.CompletedProcess:
    """Run a program's text as the launcher would start the only process of a group."""
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **world, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, encoding="utf-8")


def launch(processes: int, module: str, *argv: str) -> subprocess.CompletedProcess:
    """Run a program's module under torchrun, with accelerate told to use the CPU."""
    if sys.platform == "win32":
        pytest.skip("torchrun asks for libuv, which torch's Windows wheel is built without")
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port), "-m", module]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *argv], env=environment, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("one"), tiny_family, "av", count=4, held_out=False)


def test_two_processes_train_the_same_lora_as_one_with_the_same_global_batch(data, tmp_path):
    """float32, SGD by dotted name, 4 steps, LoRA B not zero; the two stream a block from memory that they share (on Linux)."""
    start = tmp_path / "start.safetensors"
    ltxv2_train_network.main(
        data.arguments("--output_dir", str(tmp_path / "first"), "--max_train_steps", "1", "--save_precision", "float32")
    )
    generator = torch.Generator().manual_seed(0)
    first = load_file(tmp_path / "first" / "ltxv2_lora.safetensors")
    random = {name: torch.randn(value.shape, generator=generator) * 0.05 if "lora_B" in name else value for name, value in first.items()}
    save_file(random, start)
    flags = ["--optimizer_type", "torch.optim.SGD", "--learning_rate", "0.1", "--max_train_steps", "4", "--save_precision", "float32"]
    flags = [*data.arguments("--network_weights", str(start)), *flags]
    ltxv2_train_network.main([*flags, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")])
    done = launch(2, "musubi_tuner.ltxv2_train_network", *flags, "--output_dir", str(tmp_path / "two"), "--blocks_to_swap", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stderr, "both processes are seen"
    assert ("that 2 processes share" in done.stderr) == hasattr(os, "memfd_create")
    assert done.stderr.count("steps an epoch") == 1, "only the first one speaks"
    one, two = (load_file(tmp_path / name / "ltxv2_lora.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert max(float((one[name] - random[name]).abs().max()) for name in one) > 1e-3, "something was learned"
    ones, twos = (parts.losses(tmp_path / name) for name in ("one", "two"))
    assert all(abs(a["loss_video"] - b["loss_video"]) < 1e-4 for a, b in zip(ones, twos, strict=True))


def test_two_processes_cache_the_same_text_files_as_one(data, tmp_path):
    argv = ["--ltx_mode", "av", "--device", "cpu", "--ltxv2_model", str(data.model), "--text_encoder", str(data.encoder)]
    toml = tmp_path / "dataset.toml"
    text = data.toml.read_text(encoding="utf-8").replace('"clips"', f"'{data.folder / 'clips'}'")
    toml.write_text(text, encoding="utf-8")
    done = launch(2, "musubi_tuner.ltxv2_cache_text_encoder_outputs", *argv, "--dataset_config", str(toml), "--batch_size", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    ours = {path.relative_to(tmp_path / "cache"): path for path in (tmp_path / "cache").rglob("*_te.safetensors")}
    theirs = {path.relative_to(data.folder / "cache"): path for path in (data.folder / "cache").rglob("*_te.safetensors")}
    assert ours.keys() == theirs.keys() and ours
    for name, path in ours.items():
        left, right = load_file(path), load_file(theirs[name])
        assert left.keys() == right.keys()
        assert all(torch.allclose(left[key].float(), right[key].float(), atol=0.02) for key in left)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory is shared on Linux only")
def test_streamed_blocks_lie_in_memory_once(tmp_path):
    """Both processes run two blocks from one memory; the second one's own weights are not even the same, and nobody reads them."""
    done = launch(2, "tests.shared_blocks", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    found = {name: int(value) for name, value in (line.split() for line in (tmp_path / "bytes.txt").read_text().splitlines())}
    assert found["used"] > 60_000_000
    assert 0.95 < found["taken"] / found["used"] < 1.05, "of both processes together"


def test_a_world_that_accelerate_did_not_see_is_an_error(data, tmp_path):
    environment = {**os.environ, "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "musubi_tuner.ltxv2_train_network", *data.arguments("--output_dir", str(tmp_path))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2
    assert "WORLD_SIZE is 2" in done.stderr and "torchrun" in done.stderr


def test_processes_wait_longer_for_each_other_than_previews_take():
    program = (
        "import torch, torch.distributed\n"
        "from musubi_tuner.runtime.processes import processes\n"
        "with processes():\n"
        "    group = torch.distributed.distributed_c10d._get_default_group()\n"
        "    print(group._get_backend(torch.device('cpu')).options._timeout.total_seconds())\n"
    )
    done = run_as_group_of_one(program)
    assert done.returncode == 0 and float(done.stdout) >= 3600, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at the threads of a Linux process")
def test_nothing_of_the_group_outlives_it():
    """Threads of gloo that are left when Python ends abort the process now and then. A step of an optimizer once kept them."""
    program = (
        "import pathlib, torch\n"
        "from musubi_tuner.runtime.processes import processes\n"
        "def threads():\n"
        "    return [path.read_text().strip() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "with processes():\n"
        "    weight = torch.nn.Parameter(torch.ones(3))\n"
        "    weight.sum().backward()\n"
        "    torch.optim.AdamW([weight]).step()\n"
        "    print('within', threads())\n"
        "print('after', threads())\n"
    )
    done = run_as_group_of_one(program)
    assert done.returncode == 0, done.stderr
    within, after = done.stdout.splitlines()
    assert "gloo" in within and "gloo" not in after


def test_a_program_of_a_group_ends_before_threads_that_are_left_can_abort_it():
    """Those of sharded weights' groups, for one; Python's own end, at which they abort the process now and then, is not come to."""
    program = (
        "import atexit, torch\n"
        "from musubi_tuner.runtime.processes import processes\n"
        "from musubi_tuner.runtime.program import run_program\n"
        "kept = []\n"
        "def main(argv):\n"
        "    atexit.register(print, 'the end of Python')\n"
        "    with processes():\n"
        "        kept.append(torch.distributed.new_group())\n"
        "    print('done')\n"
        "    return 3\n"
        "run_program(main)\n"
    )
    done = run_as_group_of_one(program)
    assert (done.returncode, done.stdout) == (3, "done\n"), done.stderr
