"""What Windows alone has: files that others hold open, consoles with Ctrl-C events, pipes in a code page, drive letters and backslashes.

docs/development/windows.md tells how to run it on a Linux machine.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from musubi_tuner import ltxv2_cache_latents, ltxv2_train_network
from musubi_tuner.prompts.sample_prompts import load_prompts
from musubi_tuner.tiny import clips
from musubi_tuner.training.hooks import StepLog
from tests import training_parts as parts

pytestmark = pytest.mark.skipif(sys.platform != "win32", reason="of Windows")

IN_A_CONSOLE = """\
import json, os, pathlib, signal, subprocess, sys, time

report, losses, *command = sys.argv[1:]
signal.signal(signal.SIGINT, signal.SIG_IGN)
process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8")
path = pathlib.Path(losses)
while process.poll() is None and not (path.is_file() and path.read_bytes()):
    time.sleep(0.05)
os.kill(0, signal.CTRL_C_EVENT)
told = process.communicate(timeout=300)[1]
pathlib.Path(report).write_text(json.dumps([process.returncode, told]), encoding="utf-8")
"""
"""Sends Ctrl-C to every process of its console, itself included, once there are losses."""


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("daten für Windows"), tiny_family, "video", held_out=False)


def test_ctrl_c_in_a_console_still_finishes_the_step(data, tmp_path):
    """The workers that read batches have the event too."""
    flags = ["--output_dir", str(tmp_path), "--max_train_steps", "100000", "--max_data_loader_n_workers", "1"]
    command = [sys.executable, "-m", "musubi_tuner.ltxv2_train_network", *data.arguments(*flags, "--gradient_accumulation_steps", "4")]
    words = [sys.executable, "-c", IN_A_CONSOLE, str(tmp_path / "report.json"), str(tmp_path / "ltxv2_lora-loss.jsonl"), *command]
    subprocess.run(words, creationflags=subprocess.CREATE_NEW_CONSOLE, check=True, timeout=600)
    code, told = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert code == 130, told
    (state,) = tmp_path.glob("*-state")
    assert str(state) in told and "--resume" in told


def test_a_cache_file_that_another_program_has_open_is_named(data, tmp_path):
    """It is not replaced, the other clips are, and the next run completes the cache."""
    held = next((data.folder / "cache").glob("clip_000_*_ltxv2.safetensors"))
    before = held.read_bytes()
    held.write_bytes(before[:-8])  # damaged, so that it is made again
    words = ["--dataset_config", str(data.toml), "--vae", str(data.model), "--device", "cpu"]
    with held.open("rb"):
        answer = subprocess.run(
            [sys.executable, "-m", "musubi_tuner.ltxv2_cache_latents", *words],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
    assert answer.returncode != 0 and "Traceback" not in answer.stderr
    assert f"{held}: cannot be written (" in answer.stderr
    assert [path.name for path in held.parent.glob("*.tmp")] == []
    assert ltxv2_cache_latents.main(words) == 0
    assert held.read_bytes() == before


def test_a_lora_that_another_program_has_open_costs_no_run(data, tmp_path, monkeypatch, caplog):
    old, held, original = tmp_path / "ltxv2_lora-step00000001.safetensors", [], StepLog.write

    def open_at_two(self, step, norm, bar):
        if step == 2:
            held.append(old.open("rb"))
        return original(self, step, norm, bar)

    monkeypatch.setattr(StepLog, "write", open_at_two)
    flags = ["--save_every_n_steps", "1", "--save_last_n", "1", "--max_train_steps", "3", "--output_dir", str(tmp_path)]
    assert ltxv2_train_network.main(data.arguments(*flags)) == 0
    held[0].close()
    assert f"{old}: an old LoRA that could not be removed (" in caplog.text
    assert old.is_file() and (tmp_path / "ltxv2_lora.safetensors").is_file()


def test_text_of_pipes_is_utf_8_whatever_the_code_page(tmp_path):
    """A name that code page 1252 lacks would end the program otherwise."""
    missing = tmp_path / "日本 ü" / "dataset.toml"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUTF8"} | {"PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "musubi_tuner.ltxv2_cache_latents", "--dataset_config", str(missing), "--vae", "none"]
    answer = subprocess.run(command, env=variables, capture_output=True, text=True, encoding="utf-8", check=False)
    assert answer.returncode == 2 and f"{missing}: no such file" in answer.stderr


def test_paths_with_drive_letters_and_backslashes(data, tmp_path):
    """In literal strings of TOML, in JSON lines, in prompt files, and in flags; forward slashes name the same files."""
    folder = tmp_path / "mit Leerzeichen ä"
    clips.write_clips(folder / "clips", count=1, frames=17)
    clips.write_stills(folder, count=1)
    listing = folder / "list.jsonl"
    listing.write_text(json.dumps({"video_path": str(folder / "clips" / "clip_000.mp4"), "caption": "a disc"}) + "\n", encoding="utf-8")
    toml = folder / "dataset.toml"
    for shown in (str, Path.as_posix):
        toml.write_text(
            f"[[datasets]]\nresolution = [96, 64]\ntarget_frames = [17]\nvideo_jsonl_file = '{shown(listing)}'\n"
            f"cache_directory = '{shown(folder / 'cache')}'\n",
            encoding="utf-8",
        )
        assert ltxv2_cache_latents.main(["--dataset_config", shown(toml), "--vae", shown(data.model), "--device", "cpu"]) == 0
    assert len(list((folder / "cache").glob("*_ltxv2.safetensors"))) == 1
    prompts = folder / "prompts.txt"
    prompts.write_text(f"A disc. --i {folder / 'still_000.png'}\nA disc. --i {(folder / 'still_000.png').as_posix()}\n", encoding="utf-8")
    first, second = (prompt.inputs for prompt in load_prompts(prompts))
    assert first == second
