"""The whole pipeline on a small world, on any machine: python quickstart.py

Creates .venv, installs, and teaches a small trained model a character and its voice, through the three caching programs
and training; quickstart_output/world/ has clips of before and after. Beside it, as training takes one core, goes the
same way with a toy of random weights, whose files other tools read. Needs nothing but Python 3.11 or newer.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (read by older versions too, to say so)
    sys.exit(f"Python 3.11 or newer is needed; this is Python {sys.version_info[0]}.{sys.version_info[1]}.")

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

from tools.environment import ROOT, make_environment, run

OUTPUT = ROOT / "quickstart_output"
WORLD_STEPS = 900
STEPS = 10
SIZE = "--w 192 --h 128 --f 25 --fr 24 --s 4"

DATASET = """\
# Written by quickstart.py. Paths are relative to this file.
[general]
resolution = [192, 128]
caption_extension = ".txt"
batch_size = 1
target_frames = [25]

[[datasets]]
video_directory = "clips"
cache_directory = "cache"

[[validation_datasets]]
video_directory = "held_out_clips"
cache_directory = "held_out_cache"
"""

PROMPTS = f"""\
# One prompt a line, flags after the first ' --'.
A red disc moves over a dark ground while a tone rises and falls with it. {SIZE} --d 1
A blue disc moves over a violet ground while a tone rises and falls with it. {SIZE} --d 2 --n noise --l 2
"""

WORLD_RECIPE = r"""
--ltxv2_timestep_format flowmatch_1_1000 --network_module musubi_tuner.networks.lora_ltxv2 --network_dim 32 --network_alpha 48
--network_args include_patterns=transformer_blocks.*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)$,^audio_(proj_out|patchify_proj)
rank_dropout=0 --learning_rate 3e-3 --lr_scheduler cosine --lr_warmup_steps 0.02
--timestep_args shift=2.2 uniform_prob=0 --no-independent_audio_timestep --no-gradient_checkpointing
--stg_scale 0 --modality_scale 1 --rescale_scale 0
""".split()
"""What teaches the small model in minutes; for a real one see training_configs/. Half of the batches hold it to what it knew
(tools/make_world.py), and high noise levels, which decide shapes, come more often than by default (docs/development/world.md)."""


def main() -> int:
    python = make_environment()
    started = time.monotonic()
    write_inputs()
    toy_log = OUTPUT / "toy.log"
    with toy_log.open("w", encoding="utf-8") as told, ThreadPoolExecutor(1) as beside:
        toy = beside.submit(run_all, commands(python), told)
        code = run_all([*world_commands(python), *world_results(python)])
    if code != 0:
        return code
    print(f"\n=== the same way with random weights, beside it: {toy_log.relative_to(ROOT)}")
    if toy.result() != 0:
        print(toy_log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
        return toy.result()
    print(summary(time.monotonic() - started))
    return 0


def run_all(stages: Sequence[tuple[str, list[object]]], told: TextIO | None = None) -> int:
    """Commands one after the other, up to the first that fails; the exit code of the last.

    Args:
        told: takes what they print, and what is shown comes first where cores are short; None = it is shown.
    """
    for title, command in stages:
        print(f"\n=== {title}", flush=True, file=told)
        code = run(command, told=told, aside=told is not None)
        if code != 0:
            print(f"\nfailed with exit code {code}: {' '.join(map(str, command))}", file=told or sys.stderr, flush=True)
            return code
    return 0


def write_inputs() -> None:
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "dataset.toml").write_text(DATASET, encoding="utf-8")
    (OUTPUT / "prompts.txt").write_text(PROMPTS, encoding="utf-8")


def world_commands(python: Path) -> list[tuple[str, list[object]]]:
    """What a user of a real checkpoint would type, with the small world's in its place."""
    world = OUTPUT / "world"
    model, gemma = world / "models" / "world.safetensors", world / "models" / "gemma3"
    dataset = ["--dataset_config", world / "dataset.toml", "--ltx_mode", "av"]
    prompts = ["--sample_prompts", world / "prompts.txt"]
    training = [*launch(python, 2), ROOT / "ltxv2_train_network.py", *dataset, *prompts, "--ltxv2_model", model, *WORLD_RECIPE]
    training += ["--max_train_steps", WORLD_STEPS, "--sample_at_first", "--sample_every_n_steps", WORLD_STEPS]
    training += ["--output_dir", world / "training", "--output_name", "zorbo", "--overwrite"]
    return [
        (
            "a small model that knows shapes and their sounds, and clips of what it does not know",
            [python, ROOT / "tools" / "make_world.py", world],
        ),
        *caching(python, dataset, prompts, model, gemma),
        ("training", training),
    ]


def world_results(python: Path) -> list[tuple[str, list[object]]]:
    """What was learned."""
    return [("what was learned", [python, ROOT / "tools" / "read_world.py", OUTPUT / "world"])]


def commands(python: Path) -> list[tuple[str, list[object]]]:
    """The same way with a tiny checkpoint of random weights."""
    model, gemma = OUTPUT / "models" / "ltx2_tiny_2.3.safetensors", OUTPUT / "models" / "gemma3"
    dataset = ["--dataset_config", OUTPUT / "dataset.toml", "--ltx_mode", "av"]
    prompts = ["--sample_prompts", OUTPUT / "prompts.txt"]
    training = [*launch(python, 1), ROOT / "ltxv2_train_network.py", *dataset, *prompts, "--ltxv2_model", model]
    training += ["--ltxv2_timestep_format", "flowmatch_1_1000", "--network_module", "musubi_tuner.networks.lora_ltxv2"]
    training += ["--network_dim", "16", "--network_alpha", "16", "--learning_rate", "1e-2", "--lr_warmup_steps", "5"]
    training += [
        "--max_train_steps",
        STEPS,
        "--validate_every_n_steps",
        max(1, STEPS // 10),
        "--sample_at_first",
        "--sample_every_n_steps",
        STEPS,
    ]
    training += ["--output_dir", OUTPUT / "training", "--output_name", "quickstart", "--save_state", "--overwrite"]
    return [
        (
            "a tiny checkpoint of LTX-2.3 style, with its text encoder",
            [python, ROOT / "make_tiny_checkpoints.py", "--output_dir", OUTPUT / "models"],
        ),
        ("clips with sound", [python, ROOT / "tools" / "make_quickstart_clips.py", OUTPUT]),
        *caching(python, dataset, prompts, model, gemma),
        ("training", training),
    ]


def caching(python: Path, dataset: list[object], prompts: list[object], model: Path, gemma: Path) -> list[tuple[str, list[object]]]:
    """The three programs."""
    return [
        ("caching video latents", [python, ROOT / "ltxv2_cache_latents.py", *dataset, "--vae", model]),
        ("caching audio latents", [python, ROOT / "ltxv2_cache_audio_latents.py", *dataset, "--audio_vae", model]),
        (
            "caching text",
            [python, ROOT / "ltxv2_cache_text_encoder_outputs.py", *dataset, *prompts, "--ltxv2_model", model, "--text_encoder", gemma],
        ),
    ]


def launch(python: Path, threads: int) -> list[object]:
    """accelerate, on one process."""
    words = [python, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    return [*words, "--num_cpu_threads_per_process", threads, "--mixed_precision", "no"]


def summary(seconds: float) -> str:
    world = OUTPUT / "world"
    names = ("before_and_after.html", "before_and_after.png", "training/report.html", "training/zorbo.safetensors")
    lines = [f"\nDone in {seconds:.0f} s. To look at and listen to:"]
    return "\n".join(lines + [f"  {(world / name).relative_to(ROOT)}" for name in names])


if __name__ == "__main__":
    sys.exit(main())
