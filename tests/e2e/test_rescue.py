"""Whatever ends a run, the last good step is on disk, and the message names it and the command that goes on."""

import errno
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_train_network
from musubi_tuner.memory.attention import use_default_attention
from musubi_tuner.memory.pinning import PinningFailed
from musubi_tuner.runtime import lock
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.signals import Interrupt
from musubi_tuner.training import checkpoint, state
from musubi_tuner.training.hooks import Previews, StepLog
from musubi_tuner.training.objective import BatchObjective
from tests import training_parts as parts

PIN_THREAD = """Caught AcceleratorError in pin memory thread for device 0.
Original Traceback (most recent call last):
  File "pin_memory.py", line 40, in do_one_step
torch.AcceleratorError: CUDA error: out of memory
CUDA kernel errors might be asynchronously reported at some other API call
"""
LORA, STEPS = "ltxv2_lora", 6


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("rescue"), tiny_family, "video", held_out=False)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(data, folder) == 0
    return load_file(folder / f"{LORA}.safetensors")


def train(data: parts.Data, folder: Path, *extra: str) -> int:
    flags = ["--output_dir", str(folder), "--max_train_steps", str(STEPS), "--save_precision", "float32", *extra]
    return ltxv2_train_network.main(data.arguments(*flags))


def at_step(monkeypatch, wanted: int, act) -> None:
    """Call `act` while the losses of a step are logged, once."""
    original, done = StepLog.write, []

    def write(self, step, norm, bar):
        if step == wanted and not done:
            done.append(step)
            act()
        return original(self, step, norm, bar)

    monkeypatch.setattr(StepLog, "write", write)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_cache_that_vanishes_costs_no_step(data, undisturbed, tmp_path, monkeypatch, workers):
    """The command of the message ends the run as if nothing had been; a worker's error is one line."""
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data.folder, folder)
    moved = parts.Data(folder, folder / "dataset.toml", data.model, data.mode, data.encoder)
    at_step(monkeypatch, 3, lambda: [path.rename(path.with_suffix(".away")) for path in (folder / "cache").glob("*_ltxv2.safetensors")])
    with pytest.raises(UserError, match="missing or damaged") as error:
        train(moved, out, "--max_data_loader_n_workers", workers)
    assert "\n" not in str(error.value)
    told, command = "\n".join(error.value.__notes__).split("Go on with:\n")
    words = [word.strip('"') for word in shlex.split(command, posix=os.name != "nt")]
    state = Path(words[-1])
    assert words[:1] == ["python"] and words[-2] == "--resume" and str(state) in told and state.parent == out
    assert state.with_name(state.name.replace("-state", ".safetensors")).is_file()
    for path in (folder / "cache").glob("*.away"):
        path.rename(path.with_suffix(".safetensors"))
    assert ltxv2_train_network.main(words[2:]) == 0
    assert same(undisturbed, load_file(out / f"{LORA}.safetensors"))


def test_a_killed_worker_is_named_and_costs_no_step(data, tmp_path, monkeypatch):
    at_step(monkeypatch, 2, lambda: [child.kill() for child in multiprocessing.active_children()])
    with pytest.raises(TemporaryFailure, match="a loading worker .* was killed.*--max_data_loader_n_workers 0") as error:
        train(data, tmp_path, "--max_data_loader_n_workers", "1", "--max_train_steps", "50")
    assert "--resume" in error.value.__notes__[-1] and list(tmp_path.glob("*-state"))


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="asks for a group of processes")
def test_a_worker_that_was_just_started_ends_with_training_that_is_killed():
    """torch's own watch begins too late for it."""
    program = """\
import os, signal
from torch.utils.data import DataLoader
from musubi_tuner.dataset.loader import prepare_worker
batches = iter(DataLoader(range(9), num_workers=1, multiprocessing_context="spawn", worker_init_fn=prepare_worker))
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    assert process.wait() == -signal.SIGKILL
    end = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (
            torch.OutOfMemoryError("no room"),
            "cpu ran out of memory. Cheaper, in this order: --optimizer_type AdamW8bit; .*smaller resolution",
        ),
        (MemoryError(), "the machine ran out of memory"),
        (
            torch.AcceleratorError(PIN_THREAD),
            r"step 3: More host memory could not be pinned.*\(torch.Acc.*out of memory\).*--max_data_loader_n",
        ),
        (PinningFailed(2**20, 3 * 2**30, "not permitted"), r"step 3: 1 MiB of host .* beside 3.00 GiB .*\(not permitted\).*--ram_gb"),
        (OSError(errno.EIO, "Input/output error"), "step 3: Input/output error"),
        (RuntimeError("a bug"), "a bug"),
    ],
)
def test_an_error_in_a_step_leaves_the_state_of_the_step_before(data, undisturbed, tmp_path, monkeypatch, raised, told):
    original, calls = BatchObjective.backward, []

    def backward(self, batch, accumulation=1):
        calls.append(batch)
        result = original(self, batch, accumulation)
        if len(calls) == 3:
            torch.rand(1)  # the random numbers of the step that is lost are drawn again
            raise raised
        return result

    monkeypatch.setattr(BatchObjective, "backward", backward)
    with pytest.raises(RuntimeError if told == "a bug" else TemporaryFailure, match=told) as error:
        train(data, tmp_path)
    assert "Go on with:" in error.value.__notes__[-1]
    monkeypatch.undo()
    assert train(data, tmp_path, "--autoresume") == 0
    assert same(undisturbed, load_file(tmp_path / f"{LORA}.safetensors"))


def test_attention_that_keeps_its_scores_is_named_where_memory_runs_out(data, tmp_path, monkeypatch):
    def fail(*given):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(BatchObjective, "backward", fail)
    try:
        with pytest.raises(TemporaryFailure, match="Cheaper, in this order: leave --attn_mode math out"):
            train(data, tmp_path, "--attn_mode", "math")
    finally:
        use_default_attention()


def test_weights_that_are_not_finite_are_not_saved_and_the_newest_good_file_is_named(data, tmp_path, monkeypatch):
    def spoil(self, batch, accumulation=1):
        if batch.names and len(list(tmp_path.glob("*-state"))) == 1:
            with torch.no_grad():
                self.network.parameters()[0].fill_(float("nan"))
            raise OSError(errno.EIO, "Input/output error")
        return original(self, batch, accumulation)

    original = BatchObjective.backward
    monkeypatch.setattr(BatchObjective, "backward", spoil)
    with pytest.raises(TemporaryFailure) as error:
        train(data, tmp_path, "--save_state", "--save_every_n_steps", "2")
    state = tmp_path / f"{LORA}-step00000002-state"
    notes = "\n".join(error.value.__notes__)
    assert str(state) in notes
    assert [path.name for path in tmp_path.glob("*-state")] == [state.name]


def test_the_error_is_seen_though_nothing_can_be_saved(data, tmp_path, monkeypatch):
    def act():
        monkeypatch.setattr(os, "fsync", refuse)
        raise ValueError("the first error")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_step(monkeypatch, 2, act)
    with pytest.raises(ValueError, match="the first error") as error:
        train(data, tmp_path)
    assert "Step 2 could not be saved: NotSaved: " in error.value.__notes__[0]


def test_the_last_lora_goes_to_another_folder_where_its_own_takes_nothing(data, tmp_path, monkeypatch, caplog):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def refusing(real):
        def write(path: Path, *how) -> None:
            if path.parent == tmp_path / "out":
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            real(path, *how)

        return write

    monkeypatch.setattr(checkpoint, "write_whole", refusing(checkpoint.write_whole))
    monkeypatch.setattr(state, "write_folder", refusing(state.write_folder))
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    assert train(data, tmp_path / "out", "--save_every_n_steps", "4", "--save_state") == 1
    assert "step 4: ltxv2_lora-step00000004.safetensors was not saved, and training goes on" in caplog.text
    (lora,) = elsewhere.rglob(f"{LORA}*.safetensors")
    assert lora.name == f"{LORA}.safetensors" and f"is in {lora.parent}" in caplog.text
    assert state.read_state(lora.parent / f"{LORA}-step00000006-state").step == 6


def test_too_little_room_is_told_of_before_the_first_step(data, tmp_path, monkeypatch, caplog):
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100_000, 100_000))
    assert train(data, tmp_path / "a", "--max_train_steps", "1") == 0
    assert caplog.text.count("has 0.1 MB free; the next save takes about") == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 99, 99))
    with pytest.raises(TemporaryFailure, match="0.0 MB are free, and the LoRA alone takes"):
        train(data, tmp_path / "b")


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no folder in which a file is open")
def test_a_preview_or_a_loss_line_that_fails_costs_a_warning(data, tmp_path, monkeypatch, caplog):
    def fail(wrapper, step, epoch):
        if step == 0:
            raise UserError("sample/a.mp4: cannot be written.")
        raise FileExistsError(errno.EEXIST, "File exists", "sample")

    def lose_folder():
        shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(ltxv2_train_network, "make_preview", lambda inputs: fail)
    monkeypatch.setattr(Previews, "before_training", lambda self, outcome: self._make(0))
    at_step(monkeypatch, 2, lose_folder)
    assert train(data, tmp_path / "out", "--sample_every_n_steps", "2") == 0
    assert caplog.text.count("no previews, and training goes on without them: FileExistsError") == 1
    assert "step 0: no previews, and training goes on without them: sample/a.mp4: cannot be written." in caplog.text
    assert caplog.text.count("no line was added (No such file or directory)") == 1
    assert (tmp_path / "out" / f"{LORA}.safetensors").is_file()


def test_a_finished_lora_is_not_overwritten_unless_asked_for(data, tmp_path, caplog):
    assert train(data, tmp_path, "--save_state", "--save_every_n_steps", "3") == 0
    before = (tmp_path / f"{LORA}.safetensors").read_bytes(), parts.losses(tmp_path)
    with pytest.raises(UserError, match="holds an earlier run of this --output_name.*--autoresume goes on.*--overwrite"):
        train(data, tmp_path, "--seed", "7")
    assert before == ((tmp_path / f"{LORA}.safetensors").read_bytes(), parts.losses(tmp_path))
    page = tmp_path / "report.html"
    written = page.read_bytes()
    page.unlink()
    with caplog.at_level("INFO"):
        assert train(data, tmp_path, "--autoresume") == 0
    assert page.read_bytes() == written, "a run that is killed after its last save has not written it"
    assert f"nothing is left to do: {tmp_path / LORA}.safetensors has been trained for 6 of 6 steps" in caplog.text
    shutil.rmtree(tmp_path / f"{LORA}-step00000003-state")
    shutil.rmtree(tmp_path / f"{LORA}-step00000006-state")
    with pytest.raises(UserError, match="trained for 6 of 9 steps, and there is no state"):
        train(data, tmp_path, "--autoresume", "--max_train_steps", "9")
    (tmp_path / "sample").mkdir()
    for name in (preview := f"{LORA}_s00000003_00_1.mp4", others := f"{LORA}_b_s00000003_00_1.mp4", notes := f"{LORA}_s00000003_00_1.txt"):
        (tmp_path / "sample" / name).touch()
    assert train(data, tmp_path, "--overwrite", "--max_train_steps", "2") == 0
    assert {path.name for path in (tmp_path / "sample").iterdir()} == {others, notes}, f"{preview} was the earlier run's"
    shutil.rmtree(tmp_path / "sample")
    assert {path.name for path in tmp_path.iterdir()} == {f"{LORA}.safetensors", f"{LORA}-loss.jsonl", f"{LORA}-report.json", "report.html"}
    with pytest.raises(UserError, match="--overwrite with --autoresume"):
        train(data, tmp_path, "--overwrite", "--autoresume")


def test_two_runs_of_one_name_are_one_too_many(data, tmp_path):
    with lock.held(tmp_path / f"{LORA}.lock", what="x", remedy=""):
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* at work on '{LORA}' in .*another --output_name"):
            train(data, tmp_path)
        assert train(data, tmp_path, "--output_name", "other", "--max_train_steps", "1") == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="sends signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGHUP", 0)])
def test_a_signal_finishes_the_step_and_saves(data, undisturbed, tmp_path, monkeypatch, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup")
    at_step(monkeypatch, 2, lambda: [signal.raise_signal(number) for _ in range(2)])  # whoever sends it twice is not a person
    assert train(data, tmp_path) == 130
    assert (tmp_path / f"{LORA}-step00000002-state").is_dir()
    assert train(data, tmp_path, "--autoresume") == 0
    assert same(undisturbed, load_file(tmp_path / f"{LORA}.safetensors"))


def test_a_signal_that_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN) if hasattr(signal, "SIGHUP") else None
    if previous is None:
        pytest.skip("sends signals of POSIX")
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)  # nohup
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for the launcher's child in /proc")
def test_training_saves_itself_when_its_launcher_is_killed(data, tmp_path):
    flags = data.arguments("--output_dir", str(tmp_path), "--max_train_steps", "100000")
    script = Path(ltxv2_train_network.__file__)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command = [*launcher, "--dynamo_backend", "no", "--mixed_precision", "no", str(script), *flags]
    with (tmp_path / "told.txt").open("w") as told, subprocess.Popen(command, stderr=told, stdout=told) as process:
        path = tmp_path / f"{LORA}-loss.jsonl"
        wait(lambda: path.is_file() and path.stat().st_size > 0)
        process.kill()
        process.wait()
    wait(lambda: list(tmp_path.glob("*-state")) and not (tmp_path / f"{LORA}.lock").exists())
    told = (tmp_path / "told.txt").read_text(encoding="utf-8")
    assert "the launcher has gone" in told and "accelerate launch --num_processes 1" not in told.split("Go on with:")[0]


def wait(condition) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def test_what_a_run_has_gone_back_behind_is_told_of_and_not_gone_on_from(data, tmp_path, monkeypatch, caplog):
    often = ["--save_state", "--save_every_n_steps", "2", "--save_last_n_states", "9"]
    assert train(data, tmp_path, *often) == 0
    back = [*often, "--seed", "7"]
    with monkeypatch.context() as patched:
        at_step(patched, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert train(data, tmp_path, *back, "--resume", str(tmp_path / f"{LORA}-step00000002-state")) == 130
    kept = f"{LORA}-step00000004-state, {LORA}-step00000006-state, {LORA}.safetensors"
    assert f"this run goes back behind what is saved in {tmp_path}: {kept}. " in caplog.text
    with caplog.at_level("INFO"):
        assert train(data, tmp_path, *back, "--autoresume") == 0
        assert f"resuming {tmp_path / LORA}-step00000003-state at step 3 of 6" in caplog.text
        assert [row["step"] for row in parts.losses(tmp_path)] == [1, 2, 3, 4, 5, 6]
        assert train(data, tmp_path, *back, "--autoresume") == 0
    assert "nothing is left to do" in caplog.text


def test_a_state_of_another_run_does_not_overwrite_a_finished_one(data, tmp_path):
    assert train(data, tmp_path, "--save_state", "--max_train_steps", "1") == 0
    other = ["--output_name", "other", "--max_train_steps", "2"]
    state = str(tmp_path / f"{LORA}-step00000001-state")
    assert train(data, tmp_path, *other, "--resume", state) == 0
    before = (tmp_path / "other.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds an earlier run.*other.safetensors. --resume .*of another run, which would overwrite it"):
        train(data, tmp_path, *other, "--seed", "7", "--resume", state)
    assert before == (tmp_path / "other.safetensors").read_bytes()


def test_a_dataset_that_changed_since_the_stop_is_told_of(data, tmp_path, caplog):
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data.folder, folder)
    moved = parts.Data(folder, folder / "dataset.toml", data.model, data.mode, data.encoder)
    assert train(data, out, "--save_state", "--max_train_steps", "1") == 0
    state = ["--resume", str(out / f"{LORA}-step00000001-state"), "--max_train_steps", "2"]
    assert train(moved, tmp_path / "a", "--max_train_steps", "1", *state) == 0
    told = [line for line in caplog.text.splitlines() if " then, " in line]
    assert told and not any("clips" in line or "datasets" in line for line in told)  # the folder alone is another one
    caplog.clear()
    moved.toml.write_text(moved.toml.read_text(encoding="utf-8").replace("batch_size = 1", "batch_size = 2"), encoding="utf-8")
    (folder / "clips" / "clip_001.txt").write_text("something else", encoding="utf-8")
    parts.cache(moved)
    assert train(moved, tmp_path / "b", *state) == 0
    assert "datasets: [{'batch_size': 1" in caplog.text and "clips: '3 with the fingerprint" in caplog.text


def test_an_update_that_ends_in_its_middle_is_not_called_a_whole_step(data, tmp_path, monkeypatch, caplog):
    original, calls = torch.optim.AdamW.step, []

    def step(self, closure=None):
        calls.append(original(self, closure))
        if len(calls) == 5:  # the first one tries the optimizer out
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(TemporaryFailure, match="ran out of memory") as error:
        train(data, tmp_path, "--save_state", "--save_every_n_steps", "2")
    told = "\n".join(error.value.__notes__)
    assert "Step 4 has ended in the middle of its update. What is saved lies between it and step 3" in told and "good one" not in told
    assert f"The newest state of a whole step: {tmp_path / LORA}-step00000002-state" in told
    monkeypatch.undo()
    assert train(data, tmp_path, "--autoresume") == 0
    assert "weights: in the middle of the update after step 3 then" in caplog.text
