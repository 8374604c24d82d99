"""Are long clips that are made in windows seamless and steady? On the small world, whose scorer sees and hears, through the real program.

python -m benchmarks.long_clips FOLDER [--prompts N] [--windows N]    writes models and clips there, and prints a table

Each prompt is made three times: in windows that share a part, as a whole, and as clips of one window's length, one behind the other, which
shows what a seam looks like. `seams` are the places where a window begins or ends in the others' midst; of the joined clips, the cuts.
"""

import argparse
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.generation.windows import WindowSize, spans_of
from musubi_tuner.ltxv2.geometry import audio_latent_steps, latent_frames
from musubi_tuner.media.audio import read_audio, resample
from musubi_tuner.media.probe import probe_video
from musubi_tuner.media.video import read_frames
from musubi_tuner.tiny.world.checkpoint import write_world_checkpoint
from musubi_tuner.tiny.world.scenes import FPS, FRAMES, SIZE
from musubi_tuner.tiny.world.scorer import hear, see
from musubi_tuner.tiny.world.sounds import RATE
from musubi_tuner.tiny.world.subjects import PITCHES, Subject, draw_subject
from musubi_tuner.tiny.world.text import write_world_gemma

ROOT = Path(__file__).resolve().parent.parent
WINDOW, OVERLAP = 33, 9
_HOP = RATE // 100
"""Samples of 10 ms: periods of every pitch of the world fit."""
_LEAST_LEVEL = 0.1
"""Of a clip's mean level: below it no phase is read."""


@dataclass(frozen=True, slots=True)
class Clip:
    """What a file holds."""

    frames: Tensor
    """(F, 96, 96, 3) uint8"""
    sound: Tensor
    """(samples,) at 16 kHz"""


@dataclass(frozen=True, slots=True)
class Changes:
    """Of one clip, at seams or elsewhere: between neighboring frames, and between the 40 ms before and after a moment."""

    picture: list[float]
    """Mean absolute difference, 0 to 255."""
    level: list[float]
    """Decibels; of moments with sound on both sides alone."""
    phase: list[float]
    """Degrees by which the voice's tone turns, of a tone that turns by 0; likewise."""
    silent: int
    """Moments with sound on one side or on none."""


def read(path: Path, count: int) -> Clip:
    """The first `count` frames and their sound."""
    info = probe_video(path)
    assert info.audio is not None, path
    wave = read_audio(path, info.audio, info.start, info.start + count / FPS)
    return Clip(read_frames(info, tuple(range(count)), SIZE, SIZE), resample(wave.samples, wave.rate, RATE).mean(0))


def joined(clips: Sequence[Clip]) -> Clip:
    return Clip(torch.cat([clip.frames for clip in clips]), torch.cat([clip.sound for clip in clips]))


def changes_of(clip: Clip, seams: Sequence[float], pitch: float) -> tuple[Changes, Changes]:
    """At seams, and elsewhere.

    Args:
        seams: seconds.
        pitch: of the voice, in hertz.
    """
    differences = (clip.frames[1:].float() - clip.frames[:-1].float()).abs().mean((1, 2, 3)).tolist()
    at = {min(len(differences) - 1, max(0, round(time * FPS) - 1)) for time in seams}
    hops = clip.sound[: len(clip.sound) // _HOP * _HOP].reshape(-1, _HOP)
    around = [min(len(hops) - 4, max(4, round(time * 100))) for time in seams]
    elsewhere = [place for place in range(8, len(hops) - 8, 4) if all(abs(place - seam) > 8 for seam in around)]
    tones = (hops * torch.exp(-2j * torch.pi * pitch * torch.arange(_HOP) / RATE)).sum(1)
    least = _LEAST_LEVEL * float(hops.square().mean().sqrt())

    def changes(pictures: list[float], places: Sequence[int]) -> Changes:
        level, phase, silent = [], [], 0
        for place in places:
            parts = slice(place - 4, place), slice(place, place + 4)
            levels = [float(hops[part].square().mean().sqrt()) for part in parts]
            if min(levels) <= least:
                silent += 1
                continue
            before, after = (tones[part].sum() for part in parts)
            level.append(abs(20 * math.log10(levels[1] / levels[0])))
            phase.append(abs(float((after * before.conj()).angle().rad2deg())))
        return Changes(pictures, level, phase, silent)

    here = changes([differences[place] for place in at], around)
    return here, changes([one for place, one in enumerate(differences) if place not in at], elsewhere)


def steadiness(clip: Clip, subject: Subject, windows: int) -> tuple[int, int]:
    """In how many of `windows` parts of 17 frames color, shape and ground are right, and in how many the voice."""
    seen = heard = 0
    for place in range(windows):
        start = place * (len(clip.frames) - FRAMES) // max(1, windows - 1)
        sight = see(clip.frames[start : start + FRAMES])
        wave = clip.sound[round(start / FPS * RATE) : round((start + FRAMES) / FPS * RATE)]
        seen += (sight.color, sight.shape, sight.ground) == (subject.color, subject.shape, subject.ground)
        heard += hear(wave[None]).voice == subject.voice
    return seen, heard


def seams_of(count: int) -> list[float]:
    """Seconds at which windows begin and end within a clip of `count` frames."""
    size = WindowSize(latent_frames(WINDOW), latent_frames(OVERLAP))
    spans = spans_of(latent_frames(count), audio_latent_steps(count, FPS), FPS, size)
    places = {span["video"].start for span in spans} | {span["video"].end for span in spans}
    return sorted((8 * place - 7) / FPS for place in places if 0 < place < latent_frames(count))


def generate(folder: Path, name: str, lines: Sequence[str], *flags: object) -> list[Path]:
    """A clip of each line; those that are there are kept."""
    prompts = folder / f"{name}.txt"
    prompts.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    models = folder / "models"
    command = [sys.executable, ROOT / "ltxv2_generate_video.py", "--ltxv2_model", models / "world.safetensors"]
    command += ["--text_encoder", models / "gemma3", "--sample_prompts", prompts, "--output_dir", folder / name, "--output_name", "clip"]
    command += ["--stg_scale", 0, "--modality_scale", 1, "--rescale_scale", 0, "--no-compile", *flags]
    subprocess.run(list(map(str, command)), env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, check=True)
    return [next((folder / name).glob(f"clip_{row:02d}_*.mp4")) for row in range(len(lines))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=9)
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    folder, models = options.folder.resolve(), options.folder.resolve() / "models"
    if not (models / "gemma3" / "config.json").exists():
        models.mkdir(parents=True, exist_ok=True)
        write_world_checkpoint(models / "world.safetensors")
        write_world_gemma(models / "gemma3")
    rng = random.Random("long clips")
    drawn = (draw_subject(rng) for _ in iter(int, 1))
    subjects = list(islice((one for one in drawn if one.motion != "bounces"), options.prompts))
    shared = latent_frames(WINDOW) - latent_frames(OVERLAP)
    count = 8 * (latent_frames(WINDOW) + (options.windows - 1) * shared) - 7
    flags = f"--w {SIZE} --h {SIZE} --fr {FPS} --s 20 --l 3"
    long = [f"{one.caption} {flags} --f {count} --d {row + 1}" for row, one in enumerate(subjects)]
    short = [
        f"{one.caption} {flags} --f {WINDOW} --d {100 * row + part}" for row, one in enumerate(subjects) for part in range(options.windows)
    ]
    made = {
        "in windows": generate(folder, "windows", long, "--window_frames", WINDOW, "--window_overlap", OVERLAP),
        "as a whole": generate(folder, "whole", long),
    }
    clips = {name: [read(path, count) for path in paths] for name, paths in made.items()}
    parts = [read(path, WINDOW) for path in generate(folder, "parts", short)]
    clips["joined"] = [joined(parts[row : row + options.windows]) for row in range(0, len(parts), options.windows)]
    seams = {name: seams_of(count) for name in made} | {"joined": [place * WINDOW / FPS for place in range(1, options.windows)]}
    heads = (f"{what}: {where}" for what in ("picture", "level, dB", "phase, degrees") for where in ("at seams", "elsewhere"))
    print(f"| | {' | '.join(heads)} | seams in silence | sight right | voice right |")
    print("|" + "---|" * 10)
    for name, some in clips.items():
        found = [changes_of(clip, seams[name], PITCHES[one.pitch]) for clip, one in zip(some, subjects, strict=True)]
        right = [steadiness(clip, one, options.windows) for clip, one in zip(some, subjects, strict=True)]
        cells = [
            _mean([value for pair in found for value in getattr(pair[k], key)]) for key in ("picture", "level", "phase") for k in (0, 1)
        ]
        cells += [f"{sum(here.silent for here, _ in found)} of {len(found) * len(seams[name])}"]
        cells += [f"{sum(one[k] for one in right) / len(right) / options.windows:.2f}" for k in (0, 1)]
        print(f"| {name} | {' | '.join(cells)} |")


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f}" if values else "none"


if __name__ == "__main__":
    main()
