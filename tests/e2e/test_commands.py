"""The commands that users have in their notes (design, section 2), through `accelerate launch`, as they stand but for paths and length."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests import training_parts as parts

ROOT = Path(__file__).resolve().parents[2]


def launch(script: str, *argv: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_cpu_threads_per_process",
        "1",
        "--mixed_precision",
        "bf16",
        script,
        *argv,
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")


ONE_CLIP = """
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
resolution = [96, 64]
target_frames = [9]
"""
CASES = {"video with T5": ("video", "t5"), "video with Gemma": ("video", "gemma"), "AV with Gemma": ("av", "gemma")}


@pytest.mark.parametrize("case", CASES)
def test_training_command_runs_as_users_type_it(tiny_family, tmp_path, case):
    mode, backend = CASES[case]
    encoder = str(getattr(tiny_family, backend if backend == "t5" else "gemma"))
    text = ("--text_encoder", encoder, "--text_encoder_backend", backend, "--tokenizer", encoder, "--max_length", "256")
    data = parts.Data(tmp_path, tmp_path / "dataset.toml", tiny_family.ltx23, mode, tiny_family.gemma)
    parts.write_clips(tmp_path / "clips", count=2, frames=17)
    data.toml.write_text(parts.TOML.format(batch_size=1).split("[[validation_datasets]]")[0], encoding="utf-8")
    parts.cache(data, text=text)
    done = launch(
        "ltxv2_train_network.py",
        "--dataset_config", str(data.toml), "--ltx_mode", mode, "--ltxv2_backend", "official",
        "--ltxv2_model", str(tiny_family.ltx23), "--vae", str(tiny_family.ltx23),
        "--text_encoder", encoder, "--text_encoder_backend", backend, "--tokenizer", encoder, "--max_length", "256",
        "--ltxv2_timestep_format", "flowmatch_1_1000",
        "--network_module", "musubi_tuner.networks.lora_ltxv2", "--network_dim", "16", "--network_alpha", "16",
        "--max_train_steps", "2", "--output_dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bfloat16" in done.stderr
    with safe_open(tmp_path / "out" / "ltxv2_lora.safetensors", framework="pt") as file:
        streams = {"audio" if "audio" in name else "video" for name in file.keys()}
    assert streams == ({"video"} if mode == "video" else {"video", "audio"})


def test_missing_timestep_format_exits_with_2_and_lists_the_values(tiny_family):
    done = launch("ltxv2_train_network.py", "--dataset_config", "d.toml", "--ltxv2_model", str(tiny_family.ltx23))
    assert "flowmatch_1_1000" in done.stderr and "sd3_0_1" in done.stderr
    assert "exit status 2" in done.stderr or done.returncode == 2


def test_latent_caching_needs_no_other_part_of_the_model_and_no_program(tmp_path, tiny_family):
    """Neither transformer nor text encoder nor adapters are imported, and with an empty PATH there is no ffmpeg to call."""
    parts.write_clips(tmp_path / "clips", count=1, frames=9)
    config = tmp_path / "dataset.toml"
    config.write_text(ONE_CLIP, encoding="utf-8")
    code = (
        "import importlib, sys\n"
        "rooms = ('ltxv2.transformer.model', 'ltxv2.text', 'networks', 'placement', 'training', 'preview', 'generation')\n"
        "for name in ('ltxv2_cache_latents', 'ltxv2_cache_audio_latents'):\n"
        "    assert importlib.import_module(f'musubi_tuner.{name}').main(sys.argv[1:]) == 0, name\n"
        "    found = [room for room in rooms if f'musubi_tuner.{room}' in sys.modules]\n"
        "    assert not found, (name, found)\n"
    )
    flags = ["--dataset_config", str(config), "--ltx_mode", "av", "--vae", str(tiny_family.ltx23), "--device", "cpu"]
    subprocess.run([sys.executable, "-c", code, *flags], check=True, env=os.environ | {"PATH": ""})
    assert len(list((tmp_path / "cache").glob("*_ltxv2.safetensors"))) == 1
    assert len(list((tmp_path / "cache").glob("*_ltxv2_audio.safetensors"))) == 1
