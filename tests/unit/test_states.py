"""State folders: written whole, read with care; a lock that outlives nobody; exit codes."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from musubi_tuner.runtime import lock
from musubi_tuner.runtime.device import pick_device
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training import restoring, state, state_folders
from musubi_tuner.training.metrics import LossFile, read_losses
from musubi_tuner.training.optimizer import make_optimizer
from musubi_tuner.training.run import Schedule


class Network:
    """The one thing that a state asks of a network."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(2, 2))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}


def parts(network: Network) -> dict:
    optimizer = torch.optim.AdamW([network.weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    return {"network": network, "optimizer": optimizer, "scheduler": scheduler, "settings": {}, "watched": {}}


def save(folder: Path, step: int) -> Path:
    path = state.state_path(folder, "t", step)
    made = parts(Network())
    made["network"].weight.grad = torch.ones(2, 2)
    made["optimizer"].step()
    state.save_state(path, step=step, **made)
    return path


def write_progress(text: str):
    return lambda path: (path / "progress.json").write_text(text)


def replace_optimizer(change):
    def damage(path: Path) -> None:
        unseal(path)
        stored = torch.load(path / "optimizer.pt", weights_only=True)
        torch.save(change(stored), path / "optimizer.pt")

    return damage


def replace_network(weight: torch.Tensor):
    def damage(path: Path) -> None:
        unseal(path)
        save_file({"weight": weight}, path / "network.safetensors")

    return damage


def with_average(stored: dict, average: torch.Tensor) -> dict:
    stored["optimizer"]["state"][0]["exp_avg"] = average
    return stored


def flip_a_bit(path: Path) -> None:
    file = path / "network.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def unseal(path: Path) -> None:
    """As states were before they remembered their files."""
    progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    progress.pop("fingerprints", None)
    (path / "progress.json").write_text(json.dumps(progress), encoding="utf-8")


def with_step(stored: dict, step: torch.Tensor) -> dict:
    stored["optimizer"]["state"][0]["step"] = step
    return stored


def truncate(name: str, size: int):
    return lambda path: os.truncate(path / name, size)


DAMAGE = {
    **{f"{name} is missing": (name, lambda path, name=name: (path / name).unlink()) for name in ("progress.json", "network.safetensors")},
    "no optimizer": ("optimizer.pt", lambda path: (path / "optimizer.pt").unlink()),
    **{f"{name} of {size} bytes": (name, truncate(name, size)) for name in ("network.safetensors", "optimizer.pt") for size in (0, 7, 60)},
    "empty progress": ("progress.json", write_progress("")),
    "progress is no JSON": ("progress.json", write_progress("{")),
    "progress is nested deeply": ("progress.json", write_progress("[" * 100000)),
    "progress is a list": ("progress.json", write_progress("[]")),
    "progress without step": ("progress.json", write_progress('{"settings": {}}')),
    "step -1": ("progress.json", write_progress('{"step": -1, "settings": {}}')),
    "step as text": ("progress.json", write_progress('{"step": "4", "settings": {}}')),
    "step true": ("progress.json", write_progress('{"step": true, "settings": {}}')),
    "step 1.5": ("progress.json", write_progress('{"step": 1.5, "settings": {}}')),
    "settings as a list": ("progress.json", write_progress('{"step": 1, "settings": []}')),
    "a bit has flipped": ("network.safetensors.*checksum", flip_a_bit),
    "NaN in the optimizer": ("optimizer.pt.*NaN", replace_optimizer(lambda stored: with_average(stored, torch.tensor(torch.nan)))),
    "no finite weight": ("network.safetensors.*NaN", replace_network(torch.tensor(torch.nan))),
    "a pickle of code": ("optimizer.pt", lambda path: (path / "optimizer.pt").write_bytes(pickle.dumps(os.system))),
    "optimizer is a list": ("optimizer.pt", replace_optimizer(lambda stored: [])),
    "a sparse step": ("optimizer.pt", replace_optimizer(lambda stored: with_step(stored, torch.eye(1).to_sparse()))),
    "a step without value": ("optimizer.pt", replace_optimizer(lambda stored: with_step(stored, torch.empty((), device="meta")))),
    "a step below 0": ("optimizer.pt", replace_optimizer(lambda stored: with_step(stored, torch.tensor(-1.0)))),
    "weights that are complex": ("network.safetensors.*complex", replace_network(torch.zeros(2, 2) + 1j)),
    "no schedule": ("optimizer.pt", replace_optimizer(lambda stored: {**stored, "scheduler": 3})),
    "odd random state": ("optimizer.pt", replace_optimizer(lambda stored: {**stored, "torch_rng": torch.zeros(3)})),
    "random state as text": ("optimizer.pt", replace_optimizer(lambda stored: {**stored, "torch_rng": "x"})),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_state_is_named_and_an_older_one_taken(tmp_path, caplog, case):
    file, damage = DAMAGE[case]
    older, newest = save(tmp_path, 2), save(tmp_path, 4)
    assert state_folders.newest_state(tmp_path, "t") == newest
    damage(newest)
    with pytest.raises(UserError, match=rf"--resume .*{file}.*A whole one is beside it: --resume .*step00000002-state"):
        state_folders.check_resumable(newest)
    assert state_folders.newest_state(tmp_path, "t") == older
    assert str(newest) in caplog.text
    damage(older)
    with pytest.raises(UserError, match="no state of 't' in .* is whole"):
        state_folders.newest_state(tmp_path, "t")


def test_arguments_that_an_optimizer_looks_at_late_are_refused_in_words():
    with pytest.raises(UserError, match=r"--optimizer_type adamwschedulefree with --optimizer_args \{'betas': '5'\}: cannot unpack"):
        make_optimizer("adamwschedulefree", [torch.nn.Parameter(torch.ones(2))], 1e-3, {"betas": "5"})


def test_other_arguments_of_the_optimizer_are_told_apart_whatever_the_state_holds(tmp_path):
    path = save(tmp_path, 2)
    write_progress('{"step": 2, "settings": {"optimizer_args": [["a"], 5]}}')(path)
    with pytest.raises(UserError, match=r"saved with --optimizer_args \['a'\] 5, this run has none"):
        restoring.load_state(path, **parts(Network()) | {"settings": {"optimizer_args": []}})


@pytest.mark.parametrize("change", [lambda stored: {"state": {}}, lambda stored: {"state": [], "param_groups": stored["param_groups"]}])
def test_an_optimizer_of_another_kind_is_an_error_in_words(tmp_path, change):
    path = save(tmp_path, 2)
    replace_optimizer(lambda stored: {**stored, "optimizer": change(stored["optimizer"])})(path)
    with pytest.raises(UserError, match="optimizer.pt is damaged, or of another optimizer"):
        restoring.load_state(path, **parts(Network()))


def test_a_kill_while_a_state_is_removed_or_written_leaves_none_by_halves(tmp_path, monkeypatch):
    path = save(tmp_path, 2)
    with monkeypatch.context() as patched:  # what is renamed first is not a state any more, whatever is left of it
        patched.setattr("shutil.rmtree", lambda *arguments, **named: None)
        state_folders.remove_old_states(tmp_path, "t", 1, 9)
        save(tmp_path, 3)
        state_folders.remove_old_states(tmp_path, "t", 1, 9)
    assert not path.exists() and state_folders.states(tmp_path, "t") == [tmp_path / "t-step00000003-state"]
    other = tmp_path / ".u-step00000001-state.7.tmp"
    other.mkdir()
    (tmp_path / ".t-step00000001-state.7.tmp").mkdir()
    state_folders.remove_leftovers(tmp_path, "t")
    assert {path.name for path in tmp_path.iterdir()} == {"t-step00000003-state", other.name}


def test_lines_that_are_no_losses_are_left_out_with_one_warning(tmp_path, caplog):
    path = tmp_path / "t-loss.jsonl"
    rows = ['{"step": 1, "loss_video": 2.0}', '{"a": 1}', "[]", '{"step": "1"}', '{"step": 2, "lo', '{"step": 9}']
    path.write_text("\n".join(rows), encoding="utf-8")
    LossFile(path, 3)
    assert read_losses(path) == [{"step": 1, "loss_video": 2.0}]
    assert caplog.text.count("WARNING: ") == 1 and "4 line(s)" in caplog.text
    LossFile(path, 0)
    assert path.read_text(encoding="utf-8") == "" and len(read_losses(tmp_path / "t-loss-1.jsonl")) == 1, "put aside, not lost"


@pytest.mark.parametrize(("step", "aside"), [(1, False), (4, False), (5, True)])
def test_losses_of_an_attempt_that_came_to_no_save_are_written_again(tmp_path, step, aside):
    path = tmp_path / "t-loss.jsonl"
    path.write_text(f'{{"step": {step}, "loss_video": 2.0}}\n', encoding="utf-8")
    LossFile(path, 0, again=4)
    assert path.read_text(encoding="utf-8") == "" and (tmp_path / "t-loss-1.jsonl").is_file() == aside


@pytest.mark.parametrize(("every", "epochs", "unsaved"), [(5, None, 4), (None, 1, 7), (5, 1, 4), (None, None, 19)])
def test_the_steps_before_the_first_save(every, epochs, unsaved):
    named = {"total": 20, "steps_per_epoch": 8.0, "save_every": every, "save_every_epochs": epochs}
    rest = {field.name: None for field in dataclasses.fields(Schedule) if field.name not in named}
    assert Schedule(**named, **rest).unsaved == unsaved


def test_a_lock_is_held_by_one_and_taken_over_from_the_dead(tmp_path, caplog):
    path = tmp_path / "t.lock"
    program = (
        "import sys, time, pathlib\nfrom musubi_tuner.runtime import lock\n"
        "with lock.held(pathlib.Path(sys.argv[1]), what='t', remedy='Wait.'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"process {process.pid} on .* is at work on t. Wait."),
            lock.held(path, what="t", remedy="Wait."),
        ):
            pass
        process.kill()
    with lock.held(path, what="t", remedy="Wait."):
        assert f"process {process.pid} on" in caplog.text and "takes it over" in caplog.text
        assert json.loads(path.read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("name", ["abc", "CPU", "", "cuda:-1", "cpu:", "meta", "cpu:1", "cuda:99", "cuda:1e3"])
def test_a_device_that_is_none_is_an_error_that_names_the_flag(name):
    with pytest.raises(UserError, match="--device "):
        pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")


def heed_hangups() -> None:
    """Under nohup the tests' own process ignores them, and would hand that down."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("raise TemporaryFailure('full')", 75, "error: full\nsaved\n"),
        ("raise UserError('odd')", 2, "error: odd\nsaved\n"),
        ("raise BrokenPipeError(32, 'of another process')", 1, None),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 130, "interrupted\n"),
        ("os.kill(os.getpid(), signal.SIGHUP); time.sleep(9)", 130, "interrupted\n"),
        ("swallowed_by_a_library(lambda: os.kill(os.getpid(), signal.SIGINT))", 130, "interrupted\n"),
    ],
)
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="sends signals of POSIX")
def test_exit_codes_say_what_a_retry_is_worth(body, code, told):
    program = (
        "import os, signal, time\nfrom musubi_tuner.runtime.errors import *\nfrom musubi_tuner.runtime.program import run_program\n"
        "def swallowed_by_a_library(run):\n    try:\n        run()\n        time.sleep(9)\n"
        "    except KeyboardInterrupt:\n        raise RuntimeError('initialization failed')\n"
        f"def main(argv):\n    try:\n        {body}\n    except Exception as error:\n        error.add_note('saved')\n        raise\n"
        "run_program(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=heed_hangups)
    assert done.returncode == code and (told is None or done.stderr == told), done.stderr


@pytest.mark.parametrize("words", [["--version"], ["train", "--help_all"]], ids=" ".join)
def test_a_reader_that_has_enough_is_no_error(words):
    """Both of a text that is written at the end, and of one that is longer than a buffer."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "musubi_tuner.command", *words]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_an_error_of_the_system_is_not_taken_for_a_closed_pipe():
    program = "from musubi_tuner.runtime.program import run_program\ndef main(argv):\n    open('?' * 5000)\nrun_program(main)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "OSError" in done.stderr


def test_a_lock_that_cannot_be_opened_is_an_error_in_words(tmp_path):
    path = tmp_path / "t.lock"
    path.mkdir()
    with (
        pytest.raises(UserError, match=r"t.lock: this lock file cannot be opened \(.*Remove it if no run has it. Wait."),
        lock.held(path, what="it", remedy="Wait."),
    ):
        pass


@pytest.mark.parametrize(("there", "here"), [({}, {"fused": True}), ({"fused": True}, {"foreach": True})])
def test_a_state_goes_on_where_steps_are_computed_otherwise(there, here):
    """As one of the CPU does on a GPU, where AdamW is fused and refuses a step that is not finite."""
    before, after = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    earlier, optimizer = torch.optim.AdamW([before], lr=0.1, **there), torch.optim.AdamW([after], lr=0.1, **here)
    before.grad = torch.ones(3)
    earlier.step()
    optimizer.load_state_dict(restoring._computed_as_here(earlier.state_dict(), optimizer))
    after.grad = torch.ones(3)
    if optimizer.param_groups[0]["fused"]:
        optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
        optimizer.step()
        assert torch.equal(after, torch.ones(3)) and float(optimizer.state[after]["step"]) == 1
        optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert float(optimizer.state[after]["step"]) == 2 and not torch.equal(after, torch.ones(3))
