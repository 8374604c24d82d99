"""Does a recipe teach a character and its voice, and what does it destroy? Through the real programs, on the small world.

python -m benchmarks.learning FOLDER --recipe plain --seeds 0 1 2     trains, and writes a row for each seed
python -m benchmarks.learning --table                                 the table of all rows

A row that is there is not made again. FOLDER keeps models, clips, caches and previews; rows lie in `results/learning/`.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.tiny.world.checkpoint import write_world_checkpoint
from musubi_tuner.tiny.world.lesson import DATASET, PROMPTS, Examined, Lesson, examine, write_lesson
from musubi_tuner.tiny.world.text import write_world_gemma
from quickstart import WORLD_RECIPE
from tools.make_world import CLIPS

ROOT = Path(__file__).resolve().parent.parent
ROWS = Path(__file__).parent / "results" / "learning"
LOOKS = ("identity", "voice")
KEPT = ("color", "shape", "motion", "ground", "voice")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What is compared: flags beside the common ones, and the clips."""

    flags: str = ""
    """They win over the common ones."""
    rate: float = 2.5e-3
    lesson: Mapping[str, Any] = field(default_factory=lambda: {"reminders": 0})
    """Fields of `Lesson`."""


_COMMON = """
--ltxv2_timestep_format flowmatch_1_1000 --network_module musubi_tuner.networks.lora_ltxv2 --network_dim 32 --network_alpha 48
--network_args preset=attention_ff --lr_scheduler cosine --lr_warmup_steps 0.02 --no-independent_audio_timestep
--no-gradient_checkpointing --stg_scale 0 --modality_scale 1 --rescale_scale 0 --mixed_precision no --no-compile
"""
_LESSON = CLIPS | {"reminder_weight": 4.0}
RECIPES: Mapping[str, Recipe] = {
    "plain": Recipe(),
    "reminders": Recipe(lesson={"reminders": 18}),
    "character_with_voice": Recipe(flags=" ".join(WORLD_RECIPE), rate=4e-3, lesson=_LESSON),
    "hot": Recipe(rate=2.5e-2),
    "misnamed": Recipe(flags=" ".join(WORLD_RECIPE), rate=4e-3, lesson=_LESSON | {"misnamed": True}),
}
"""`character_with_voice` is the quickstart's, with more weight for reminders. `hot` must lose what the base model knew; `misnamed`, whose
captions stand beside other clips, must not learn the character."""


def run(folder: Path, name: str, seed: int, steps: int, prompts: int, looks: int) -> Path:
    """Train with a recipe, examine previews by step, and write the row; returns its path."""
    row = ROWS / f"{name}-{seed}.json"
    if row.exists():
        print(f"{row}: is there")
        return row
    recipe, place = RECIPES[name], folder / f"{name}-{seed}"
    lesson = Lesson(
        character_prompts=prompts // 2,
        base_prompts=prompts - prompts // 2,
        steps=12,
        seed=seed,
        **recipe.lesson,
    )
    models = folder / "models"
    if not (models / "gemma3" / "config.json").exists():
        models.mkdir(parents=True, exist_ok=True)
        write_world_checkpoint(models / "world.safetensors")
        write_world_gemma(models / "gemma3")
    write_lesson(place, lesson)
    model, common = models / "world.safetensors", ["--dataset_config", place / DATASET, "--ltx_mode", "av"]
    on_cpu = ["--device", "cpu"]  # in float32, whatever machine trains
    examination = ["--sample_prompts", place / PROMPTS]
    _program("ltxv2_cache_latents.py", *common, *on_cpu, "--vae", model)
    _program("ltxv2_cache_audio_latents.py", *common, *on_cpu, "--audio_vae", model)
    text = ["--ltxv2_model", model, "--text_encoder", models / "gemma3"]
    _program("ltxv2_cache_text_encoder_outputs.py", *common, *on_cpu, *examination, *text)
    flags = [*_COMMON.split(), *recipe.flags.split(), "--learning_rate", recipe.rate, "--max_train_steps", steps, "--seed", seed]
    flags += ["--sample_at_first", "--sample_every_n_steps", steps // looks]
    started, before = time.monotonic(), _cpu_seconds()
    _program(
        "ltxv2_train_network.py", *common, *examination, "--ltxv2_model", model, *flags, "--output_dir", place / "training", "--overwrite"
    )
    seconds, cpu_seconds = time.monotonic() - started, _cpu_seconds() - before
    found = examine(place / "training" / "sample", place / PROMPTS)
    card = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    asked = f"--steps {steps} --prompts {prompts} --looks {looks}"
    facts = {
        "recipe": name,
        "seed": seed,
        "command": f"python -m benchmarks.learning FOLDER --recipe {name} --seeds {seed} {asked}",
        "flags": " ".join(map(str, flags)),
        "lesson": asdict(lesson),
        "seconds_with_previews": round(seconds),
        "cpu_seconds_with_previews": round(cpu_seconds),
        "machine": f"{card}{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}",
        "date": date.today().isoformat(),
        "steps": {step: _shares(one) for step, one in found.items()},
    }
    ROWS.mkdir(parents=True, exist_ok=True)
    row.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: by recipe and step, means over seeds with their standard error."""
    lines = [
        "| recipe | seeds | step | " + " | ".join((*(f"character: {name}" for name in LOOKS), *(f"base: {name}" for name in KEPT))) + " |",
        "|" + "---|" * (3 + len(LOOKS) + len(KEPT)),
    ]
    for name in dict.fromkeys(row["recipe"] for row in rows):
        same = [row for row in rows if row["recipe"] == name]
        for step in same[0]["steps"]:
            cells = []
            for kind, names, prompts in (("character", LOOKS, "character_prompts"), ("base", KEPT, "base_prompts")):
                for one in names:
                    values = [row["steps"][step][kind][one] for row in same if step in row["steps"]]
                    cells.append(_with_error(values, same[0]["lesson"][prompts]))
            lines.append(f"| {name} | {len(same)} | {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_error(values: Sequence[float], prompts: int) -> str:
    """Mean and standard error: of the seeds where there are some, else of that many yes or no answers (Agresti and Coull's)."""
    mean = statistics.fmean(values)
    if len(values) > 1:
        return f"{mean:.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"
    share = (mean * prompts + 2) / (prompts + 4)
    return f"{mean:.2f} ± {math.sqrt(share * (1 - share) / (prompts + 4)):.2f}"


def _shares(one: Examined) -> dict[str, dict[str, float]]:
    return {"character": dict(one.character), "base": dict(one.base), "voices": dict(one.voices)}


def _cpu_seconds() -> float:
    """Of the programs that have been run, on all cores; other programs beside them hardly change it."""
    times = os.times()
    return times.children_user + times.children_system


def _program(script: str, *words: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="plain")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--looks", type=int, default=2, help="examinations after step 0, evenly spread")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROWS.glob("*.json"))]))
        return
    if options.folder is None:
        parser.error("FOLDER is wanted, or --table")
    for seed in options.seeds:
        print(run(options.folder.resolve(), options.recipe, seed, options.steps, options.prompts, options.looks), flush=True)


if __name__ == "__main__":
    main()
