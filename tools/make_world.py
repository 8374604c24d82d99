"""The small world of the quickstart, its model and a lesson for a LoRA: python tools/make_world.py FOLDER"""

import argparse
import sys
from pathlib import Path
from typing import Any

from musubi_tuner.tiny.world.checkpoint import write_world_checkpoint
from musubi_tuner.tiny.world.lesson import Lesson, write_lesson
from musubi_tuner.tiny.world.text import write_world_gemma

CHARACTER_PROMPTS, BASE_PROMPTS, STEPS = 6, 9, 12
CLIPS: dict[str, Any] = {"clips": 16, "repeats": 13, "batch": 3, "reminders": 72, "reminder_batch": 1, "reminder_weight": 2.7}
"""As many batches of either kind: three clips of the character, or one on which it is held to the base model."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="that all of it is written into: models, clips, prompts.txt, dataset.toml")
    folder: Path = parser.parse_args(arguments).folder
    models = folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    write_world_checkpoint(models / "world.safetensors")
    write_world_gemma(models / "gemma3")
    write_lesson(folder, Lesson(character_prompts=CHARACTER_PROMPTS, base_prompts=BASE_PROMPTS, steps=STEPS, **CLIPS))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
