"""Runs the trainer itself on a synthetic checkpoint and synthetic caches: how long until the first step, seconds a step, memory against the
plan. Flags after `--` are the trainer's.

    python -m benchmarks.training --shape 768x512x49 -- --vram_gb 15.5 --ram_gb 24      a 16 GB card, on a larger one
    python -m benchmarks.training --shape 768x512x121 -- --weight_format fp8            what a user's run would print
    python -m benchmarks.training --sizes toy                                           anywhere, as a check that it runs
    python -m benchmarks.training --simulated_gb 7 --blocks 8 --steps 1 -- --no-compile      memory against the plan, without a card: what
                                                                                        it learns is nothing there, and it says so
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import simulated_card
from benchmarks.block_counts import RANK, TEXT_TOKENS
from benchmarks.loading_case import write_checkpoint
from musubi_tuner.cache import store
from musubi_tuner.cache.clip import Clip, Sidecar
from musubi_tuner.cache.index import DatasetIndex, write_index
from musubi_tuner.cache.names import text_name, video_latent_name
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.config.dataset import DatasetSpec, load_dataset_config
from musubi_tuner.ltxv2.geometry import (
    AUDIO_CHANNELS,
    AUDIO_LATENTS_PER_SECOND,
    AUDIO_MEL_BINS,
    LATENT_CHANNELS,
    latent_frames,
    latent_size,
)
from musubi_tuner.ltxv2.text.pipeline import text_widths
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint

FPS = 24.0
BLOCKS = 48
_CLIPS = 4
_TOML = """
[general]
resolution = [{width}, {height}]

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [{frames}]
"""


def main(argv: Sequence[str]) -> int:
    own = list(itertools.takewhile(lambda argument: argument != "--", argv))
    options, passed = _parse(own), argv[len(own) + 1 :]
    if options.simulated_gb and not simulated_card.Card.is_here():
        return simulated_card.run_within("benchmarks.training", argv, gigabytes=options.simulated_gb)
    toy = options.sizes == "toy"
    width, height, frames = (int(part) for part in ("96x64x17" if toy else options.shape).split("x"))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        needed = 0 if toy or (options.checkpoint and options.checkpoint.exists()) else int((options.blocks + 2) * 0.8e9)
        if (free := shutil.disk_usage(folder).free) < needed:
            print(
                f"{folder}: {free / 1e9:.0f} GB are free, and {needed / 1e9:.0f} are written; give another --folder, or fewer --blocks",
                file=sys.stderr,
            )
            return 2
        model = options.checkpoint or Path(folder) / "synthetic.safetensors"
        if not model.exists():
            write_checkpoint(model, toy=toy, blocks=2 if toy else options.blocks)
        toml = Path(folder) / "dataset.toml"
        toml.write_text(_TOML.format(width=width, height=height, frames=frames), encoding="utf-8")
        write_caches(toml, open_checkpoint(model), frames=frames, width=width, height=height, tokens=TEXT_TOKENS)
        if options.cold:
            _drop_from_cache(model)
        flags = ["--dataset_config", str(toml), "--ltxv2_model", str(model), "--output_dir", str(Path(folder) / "out"), "--ltx_mode", "av"]
        flags += ["--ltxv2_timestep_format", "flowmatch_1_1000", "--network_dim", str(4 if toy else RANK)]
        flags += ["--max_train_steps", str(options.steps), *passed]
        return _timed_run(flags)


def write_caches(toml: Path, checkpoint: Checkpoint, *, frames: int, width: int, height: int, tokens: int) -> None:
    """Latents, sound and text contexts of a few clips, all random, as the caching programs name and describe them."""
    spec = load_dataset_config(toml).datasets[0]
    clips = [_clip(f"clip{number}", frames, width, height) for number in range(_CLIPS)]
    write_index(spec, DatasetIndex(settings=spec.settings(), clips=tuple(clips)))
    size = (LATENT_CHANNELS, latent_frames(frames), *reversed(latent_size(width, height)))
    steps = round(frames / FPS * AUDIO_LATENTS_PER_SECOND)
    widths = text_widths(read_config(checkpoint), "av")
    for number, clip in enumerate(clips):
        generator = torch.Generator().manual_seed(number)
        synthetic = {"encoder_fingerprint": "synthetic"}
        latents = torch.randn(size, generator=generator).bfloat16()
        _write(spec, clip, "latents", synthetic, latents)
        sound = torch.randn(AUDIO_CHANNELS, steps, AUDIO_MEL_BINS, generator=generator).bfloat16()
        _write(spec, clip, "audio", synthetic | {"audio": "present"}, sound)
        entries = {"caption": "", "source": clip.source, "source_fingerprint": "synthetic", "stage": "context"}
        entries |= {"widths": "+".join(map(str, widths)), "model_version": checkpoint.model_version, "backend": "gemma"}
        text = torch.randn(tokens, sum(widths), generator=generator).bfloat16()
        _write(spec, clip, "text", entries, text, torch.ones(tokens, dtype=torch.bool))


def _write(spec: DatasetSpec, clip: Clip, kind: str, entries: Mapping[str, str], *tensors: torch.Tensor) -> None:
    store.write(spec.cache_directory / clip.sidecars[kind].file, KINDS[kind].pack(*tensors), {**KINDS[kind].expected(clip), **entries})


def _clip(stem: str, frames: int, width: int, height: int) -> Clip:
    latents = video_latent_name(stem, 0, frames, width, height)
    files = {"latents": latents, "audio": KINDS["audio"].name_beside(latents), "text": text_name(stem)}
    return Clip(
        key=stem, kind="video", source=f"{stem}.mp4", stem=stem, source_fingerprint="synthetic", start_seconds=0.0,
        end_seconds=frames / FPS, fps=FPS, start_frame=0, frames=frames, width=width, height=height, original_width=width,
        original_height=height, has_audio=True,
        sidecars={name: Sidecar(file=file) for name, file in files.items()},
    )  # fmt: skip


def _timed_run(flags: Sequence[str]) -> int:
    """The program in a process of its own; its output goes through, and a line says what came before its first step."""
    command = [sys.executable, str(Path(__file__).parents[1] / "src" / "musubi_tuner" / "ltxv2_train_network.py"), *flags]
    started, training = time.perf_counter(), 0.0
    with subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"time\s+([\d.]+) s; ", line):
                training = float(found[1])
    seconds = time.perf_counter() - started
    if process.returncode == 0:
        print(f"\nbefore the first step and after the last: {seconds - training:.1f} s of {seconds:.1f} s in all")
    return process.returncode


def _drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    prog = "python -m benchmarks.training"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", choices=("real", "toy"), default="real", help="layer sizes; toy has 2 blocks (default: real)")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"depth of the checkpoint, 0.8 GB each (default: {BLOCKS})")
    parser.add_argument("--shape", default="768x512x121", help="width x height x frames of the clips (default: 768x512x121)")
    parser.add_argument("--steps", type=int, default=30, help="steps of the run (default: 30)")
    parser.add_argument("--simulated_gb", type=float, metavar="GB", help="on a simulated card of this size (benchmarks/simulated_card)")
    parser.add_argument("--checkpoint", type=Path, help="keep the checkpoint as this file, and take it where it is there already")
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before (Linux)")
    parser.add_argument("--folder", help="where the checkpoint is written, and removed again")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
