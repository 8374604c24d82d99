"""What lies beside the training itself: what earlier runs left, where a start comes from."""

import dataclasses
import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_checkpoint, ltxv2_train_network
from musubi_tuner.cache.store import read_metadata
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny import clips
from musubi_tuner.training import checkpoint
from musubi_tuner.training.hooks import StepLog
from musubi_tuner.training.saving import NotSaved, Saving
from tests import training_parts as parts


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("aside"), tiny_family, "video", held_out=False)


def run(data: parts.Data, output, *extra: str) -> dict[str, torch.Tensor]:
    assert ltxv2_train_network.main(data.arguments("--output_dir", str(output), *extra)) == 0
    return load_file(output / "ltxv2_lora.safetensors")


def test_retention_leaves_what_this_run_has_just_saved_beside_an_earlier_runs_files(data, tmp_path):
    often = ["--save_every_n_steps", "2", "--save_state", "--save_last_n_states"]
    run(data, tmp_path, *often, "9", "--max_train_steps", "9")
    state = str(tmp_path / "ltxv2_lora-step00000002-state")
    run(data, tmp_path, *often, "1", "--save_last_n", "1", "--max_train_steps", "5", "--resume", state)
    assert {path.name for path in tmp_path.glob("*step*")} == {
        "ltxv2_lora-step00000004.safetensors", "ltxv2_lora-step00000005-state",
        "ltxv2_lora-step00000006.safetensors", "ltxv2_lora-step00000006-state",
        "ltxv2_lora-step00000008.safetensors", "ltxv2_lora-step00000008-state", "ltxv2_lora-step00000009-state",
    }  # fmt: skip


def test_checkpoints_that_are_none_to_train_on_are_told_of(data, tmp_path, caplog):
    run(data, tmp_path / "dev", "--max_train_steps", "1")
    assert "is distilled" not in caplog.text and "in 8 bits" not in caplog.text
    distilled = shutil.copy(data.model, tmp_path / "ltx-2.3-distilled.safetensors")
    run(dataclasses.replace(data, model=Path(distilled)), tmp_path / "out", "--max_train_steps", "1")
    assert "WARNING: ltx-2.3-distilled.safetensors: is distilled" in caplog.text
    small = tmp_path / "small.safetensors"
    ltxv2_checkpoint.main(["quantize", str(data.model), "--to", "int8", "--keep_blocks", "0", "--output", str(small)])
    run(dataclasses.replace(data, model=small), tmp_path / "out", "--max_train_steps", "1", "--overwrite")
    assert "WARNING: small.safetensors: its weights are stored in 8 bits" in caplog.text


@pytest.mark.parametrize("flag", ["--network_weights", "--base_weights"])
def test_a_lora_that_was_read_is_mapped_no_more_when_it_is_written(data, tmp_path, monkeypatch, flag):
    """Windows does not replace a mapped file; on Linux the mapping is looked for."""
    lora, maps, seen = tmp_path / "ltxv2_lora.safetensors", Path("/proc/self/maps"), []
    run(data, tmp_path, "--max_train_steps", "1", "--save_state")
    original = checkpoint.write_whole

    def watched(*arguments):
        seen.append(maps.is_file() and str(lora) in maps.read_text(encoding="utf-8"))
        return original(*arguments)

    monkeypatch.setattr(checkpoint, "write_whole", watched)
    run(data, tmp_path, "--max_train_steps", "2", "--resume", str(tmp_path / "ltxv2_lora-step00000001-state"), flag, str(lora))
    assert seen == [False]


def test_an_interrupt_in_the_last_step_ends_the_run_as_done(data, tmp_path, monkeypatch, caplog):
    original = StepLog.write

    def interrupt(self, step, norm, bar):
        signal.raise_signal(signal.SIGINT)
        return original(self, step, norm, bar)

    monkeypatch.setattr(StepLog, "write", interrupt)
    with caplog.at_level("INFO"):
        run(data, tmp_path, "--max_train_steps", "1", "--validate_every_n_steps", "1")
    assert "--resume" not in caplog.text
    assert "nothing is held out" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups to send Ctrl-C to")
def test_ctrl_c_of_the_whole_terminal_still_finishes_the_step(data, tmp_path):
    """Workers get the signal too; the step's other batches must still come from them."""
    tmp_path = tmp_path / "with a space"
    flags = ["--output_dir", str(tmp_path), "--max_train_steps", "100000", "--max_data_loader_n_workers", "1"]
    command = [sys.executable, "-m", "musubi_tuner.ltxv2_train_network", *data.arguments(*flags, "--gradient_accumulation_steps", "16")]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        while not has_losses(tmp_path):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    (state,) = tmp_path.glob("*-state")
    go_on = shlex.split(told.split("Go on with:")[1])
    assert go_on[0] == "python" and go_on[2:] == [*command[3:], "--resume", str(state)]


def has_losses(folder) -> bool:
    path = folder / "ltxv2_lora-loss.jsonl"
    return path.is_file() and bool(path.read_text(encoding="utf-8"))


def test_a_resumed_run_takes_the_rates_that_it_is_given(data, tmp_path, caplog):
    flags = ["--lr_scheduler", "linear", "--lr_warmup_steps", "2", "--save_state", "--save_every_n_steps", "3"]
    run(data, tmp_path / "a", *flags, "--max_train_steps", "4")
    state = ["--resume", str(tmp_path / "a" / "ltxv2_lora-step00000003-state")]
    changed = [*flags, "--max_train_steps", "8", "--learning_rate", "3e-4"]
    run(data, tmp_path / "whole", *changed)
    run(data, tmp_path / "resumed", *changed, *state)
    whole, resumed = ({row["step"]: row["lr"] for row in parts.losses(tmp_path / name)} for name in ("whole", "resumed"))
    assert resumed == {step: whole[step] for step in range(4, 9)}
    assert list(whole.values()) == pytest.approx([3e-4 * share for share in (1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    copy = tmp_path / "other.safetensors"
    shutil.copy(data.model, copy)
    run(dataclasses.replace(data, model=copy), tmp_path / "b", *flags, "--max_train_steps", "4", *state)
    assert f"model: '{data.model.name}' then, 'other.safetensors' now" in caplog.text
    assert "weights: " not in caplog.text
    same_name = tmp_path / "elsewhere" / data.model.name
    same_name.parent.mkdir()
    tensors = {name: value * 1.01 if "transformer_blocks" in name else value for name, value in load_file(data.model).items()}
    save_file(tensors, same_name, metadata=read_metadata(data.model))
    run(dataclasses.replace(data, model=same_name), tmp_path / "c", *flags, "--max_train_steps", "4", *state)
    assert " tensors with the fingerprint " in next(line for line in caplog.text.splitlines() if "weights: " in line and " then, " in line)
    with pytest.raises(UserError, match="--optimizer_type AdamW, this run has torch.optim.SGD"):
        run(data, tmp_path / "b", *flags, "--optimizer_type", "torch.optim.SGD", *state)
    with pytest.raises(UserError, match="--optimizer_args none, this run has weight_decay=0.1"):
        run(data, tmp_path / "b", *flags, "--optimizer_args", "weight_decay=0.1", *state)
    with pytest.raises(UserError, match=r"lora_A' is \(4, 128\), here \(8, 128\)"):
        run(data, tmp_path / "b", *flags, "--network_dim", "8", *state)


def test_an_output_folder_that_cannot_be_is_named_before_the_model_is_loaded(data, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="--output_dir .*cannot be written into"):
        run(data, tmp_path / "file" / "out")


def test_modules_that_a_start_lacks_are_told_of(data, tmp_path, caplog):
    run(data, tmp_path / "a", "--max_train_steps", "1", "--network_args", "include_patterns=attn1.to_[qkv]")
    run(data, tmp_path / "b", "--max_train_steps", "1", "--network_weights", str(tmp_path / "a"))
    assert "lacks 10 module(s), which start fresh, first 'transformer_blocks.0.attn1.to_out.0'" in caplog.text


def test_what_a_mode_cannot_train_on_is_told_of_and_left_out(tiny_family, tmp_path, caplog):
    clips.write_clips(tmp_path / "clips", count=1, frames=17)
    clips.write_clip(tmp_path / "clips" / "silent.mp4", clips.numbered_frames(17))
    (tmp_path / "clips" / "silent.txt").write_text("numbers", encoding="utf-8")
    clips.write_audio_files(tmp_path / "sounds", count=1, seconds=0.7)
    toml = parts.TOML.format(batch_size=1).split("[[validation_datasets]]")[0].replace("target_frames = [17]", "")
    toml += "target_frames = [17]\n"
    path = tmp_path / "dataset.toml"
    path.write_text(toml + '[[datasets]]\naudio_directory = "sounds"\ncache_directory = "cache of sounds"\n', encoding="utf-8")
    data = parts.Data(tmp_path, path, tiny_family.ltx23, "av", tiny_family.gemma)
    parts.cache(data)
    run(data, tmp_path / "av", "--max_train_steps", "2")
    assert "datasets[1]: 1 of 1 clips are left out of --ltx_mode av" in caplog.text
    shutil.copy(tmp_path / "clips" / "silent.mp4", tmp_path / "clips" / "later.mp4")
    run(dataclasses.replace(data, mode="audio"), tmp_path / "audio", "--max_train_steps", "3")
    assert "datasets[0]: 1 of 2 clips are left out of --ltx_mode audio" in caplog.text
    assert "datasets[0]: 1 source(s) came after caching and are not trained on: later.mp4" in caplog.text
    assert all(row["audio_supervised"] == 1 for row in parts.losses(tmp_path / "audio"))


def test_seconds_of_a_step_leave_out_what_lies_between_steps(data, tmp_path, monkeypatch, caplog):
    original = Saving.save

    def slow_save(*arguments):
        time.sleep(2)
        original(*arguments)

    monkeypatch.setattr(Saving, "save", slow_save)
    with caplog.at_level("INFO"):
        run(data, tmp_path, "--max_train_steps", "1")
    whole, step = re.search(r"time +([\d.]+) s; ([\d.]+) s a step", caplog.text).groups()
    assert float(whole) >= 2 > float(step) + 1


def test_a_disk_that_fills_in_between_costs_a_save_and_never_the_run(data, tmp_path, monkeypatch, caplog):
    real, calls = os.fsync, []

    def full_at_first(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_first)
    run(data, tmp_path, "--max_train_steps", "4", "--save_every_n_steps", "2")
    assert "step 2: ltxv2_lora-step00000002.safetensors was not saved, and training goes on" in caplog.text
    assert os.strerror(errno.ENOSPC) in caplog.text and "cached" not in caplog.text
    assert not (tmp_path / "ltxv2_lora-step00000002.safetensors").exists()
    monkeypatch.setattr(torch, "save", lambda *arguments: (_ for _ in ()).throw(RuntimeError("PytorchStreamWriter failed writing file")))
    run(data, tmp_path / "b", "--max_train_steps", "2", "--save_state")
    assert "the state could not be written (PytorchStreamWriter failed" in caplog.text
    assert [path.name for path in (tmp_path / "b").iterdir() if "state" in path.name] == []


def test_a_disk_that_is_full_at_the_end_is_an_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(NotSaved, match=f"written nowhere.*{re.escape(str(tmp_path))}: {os.strerror(errno.ENOSPC)}"):
        ltxv2_train_network.main(data.arguments("--output_dir", str(tmp_path), "--max_train_steps", "1"))
    assert not (tmp_path / "ltxv2_lora.safetensors").exists()


def test_previews_without_prompts_are_told_of(data, tmp_path, caplog):
    run(data, tmp_path, "--max_train_steps", "1", "--sample_at_first")
    assert "no previews: --sample_at_first is given without --sample_prompts FILE" in caplog.text


def test_more_blocks_than_can_be_streamed_are_told_of(data, tmp_path, caplog):
    run(data, tmp_path, "--max_train_steps", "1", "--blocks_to_swap", "9")
    assert "--blocks_to_swap 9: the model has 2 blocks; 2 are streamed" in caplog.text
