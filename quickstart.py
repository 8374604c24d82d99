"""The whole pipeline on a toy model, on any machine: python quickstart.py

Creates .venv, installs, makes a tiny checkpoint and clips with sound, runs the three caching programs and training,
and leaves previews and a loss curve in quickstart_output/. Needs nothing but Python 3.11 or newer.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (read by older versions too, to say so)
    sys.exit(f"Python 3.11 or newer is needed; this is Python {sys.version_info[0]}.{sys.version_info[1]}.")

import time
from pathlib import Path

from tools.environment import ROOT, make_environment, run

OUTPUT = ROOT / "quickstart_output"
STEPS = 200
SIZE = "--w 192 --h 128 --f 25 --fr 24 --s 8"

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


def main() -> int:
    python = make_environment()
    started = time.monotonic()
    write_inputs()
    for title, command in commands(python):
        print(f"\n=== {title}", flush=True)
        code = run(command)
        if code != 0:
            print(f"\nfailed with exit code {code}: {' '.join(map(str, command))}", file=sys.stderr)
            return code
    print(summary(time.monotonic() - started))
    return 0


def write_inputs() -> None:
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "dataset.toml").write_text(DATASET, encoding="utf-8")
    (OUTPUT / "prompts.txt").write_text(PROMPTS, encoding="utf-8")


def commands(python: Path) -> list[tuple[str, list[object]]]:
    """What a user of a real checkpoint would type, with the tiny one in its place."""
    model, gemma = OUTPUT / "models" / "ltx2_tiny_2.3.safetensors", OUTPUT / "models" / "gemma3"
    dataset = ["--dataset_config", OUTPUT / "dataset.toml", "--ltx_mode", "av"]
    prompts = ["--sample_prompts", OUTPUT / "prompts.txt"]
    launch = [python, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1", "--mixed_precision", "no"]
    training = [*launch, ROOT / "ltxv2_train_network.py", *dataset, *prompts, "--ltxv2_model", model]
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
        ("caching video latents", [python, ROOT / "ltxv2_cache_latents.py", *dataset, "--vae", model]),
        ("caching audio latents", [python, ROOT / "ltxv2_cache_audio_latents.py", *dataset, "--audio_vae", model]),
        (
            "caching text",
            [python, ROOT / "ltxv2_cache_text_encoder_outputs.py", *dataset, *prompts, "--ltxv2_model", model, "--text_encoder", gemma],
        ),
        ("training", training),
    ]


def summary(seconds: float) -> str:
    training = OUTPUT / "training"
    previews = sorted((training / "sample").glob("quickstart_*.mp4"))
    lines = [f"\nDone in {seconds:.0f} s. To look at:"]
    lines += [f"  {path.relative_to(ROOT)}" for path in previews]
    lines += [f"  {(training / name).relative_to(ROOT)}" for name in ("report.html", "quickstart.safetensors")]
    lines.append(
        "The toy's weights are random, its decoders' too, so the previews are noise to eye and ear. The way to them is the real one."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
