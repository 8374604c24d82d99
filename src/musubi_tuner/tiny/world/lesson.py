"""A lesson for a LoRA: clips of the character, clips of what the base model knows already, and prompts that examine both.

The prompts' previews are read by the scorer: how much of the character is there, and how much of everything else was kept.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.world.files import read_world_clip, write_world_clips
from musubi_tuner.tiny.world.scenes import FPS, FRAMES, SIZE
from musubi_tuner.tiny.world.scorer import Hearing, Sight, base_scores, character_scores
from musubi_tuner.tiny.world.subjects import GROUNDS, MOTIONS, CharacterSubject, Subject, draw_each_voice, subject_of

DATASET, PROMPTS = "dataset.toml", "prompts.txt"
_DATASET = f"""\
# Paths are relative to this file.
[general]
resolution = [{SIZE}, {SIZE}]
caption_extension = ".txt"
target_frames = [{FRAMES}]
"""
_FOLDER = """
[[datasets]]
video_directory = "{name}"
cache_directory = "cache/{name}"
num_repeats = {repeats}
batch_size = {batch}
"""
_KEPT = """\
preserve_base = true
video_loss_weight = {weight:g}
audio_loss_weight = {weight:g}
"""
_PREVIEW = re.compile(r".*_s(?P<step>\d{8})_(?P<row>\d+)_\d+\.mp4")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """How much of each."""

    clips: int = 16
    """Of the character."""
    repeats: int = 3
    """How often each of them counts, against once for a reminder."""
    reminders: int = 18
    """Clips of the base world that are trained beside them; their voices take turns."""
    batch: int = 4
    reminder_batch: int = 4
    """A batch has clips of one kind."""
    reminder_weight: float | None = None
    """Weight of the losses of reminders, which then learn what the base model makes of them (`preserve_base`); None = they are learned as
    the character is."""
    character_prompts: int
    base_prompts: int
    """Their voices take turns too."""
    steps: int
    """Of sampling a preview."""
    guidance: float = 3.0
    """Of both streams."""
    seed: int = 0
    """Of the clips; prompts are the same for all seeds."""
    misnamed: bool = False
    """Captions are moved on by half of the clips, so that the character's stand beside other things: a control that must not learn it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """What previews of one step show: shares of the character's clips and of the base world's, by what was looked at."""

    character: Mapping[str, float]
    base: Mapping[str, float]
    voices: Mapping[str, float]
    """Of the base world, by voice: the share of its clips in which it is heard."""
    paths: Sequence[Path]
    """Of the previews, in the prompts' order."""


def write_lesson(folder: Path, lesson: Lesson) -> None:
    """Clips with captions, `dataset.toml` and `prompts.txt`."""
    characters, reminders = lesson_subjects(lesson)
    folder.mkdir(parents=True, exist_ok=True)
    paths = write_world_clips(folder / "character", characters, seed=lesson.seed)
    tables = _FOLDER.format(name="character", repeats=lesson.repeats, batch=lesson.batch)
    if reminders:
        paths += write_world_clips(folder / "reminders", reminders, seed=lesson.seed)
        tables += _FOLDER.format(name="reminders", repeats=1, batch=lesson.reminder_batch)
        tables += "" if lesson.reminder_weight is None else _KEPT.format(weight=lesson.reminder_weight)
    if lesson.misnamed:
        captions = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in paths]
        half = len(captions) // 2
        for path, caption in zip(paths, captions[half:] + captions[:half], strict=True):
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    (folder / DATASET).write_text(_DATASET + tables, encoding="utf-8")
    (folder / PROMPTS).write_text(_prompt_lines(lesson), encoding="utf-8")


def lesson_subjects(lesson: Lesson) -> tuple[list[CharacterSubject], list[Subject]]:
    """What its clips show: the character, and the base world."""
    rng = random.Random(f"lesson|{lesson.seed}")
    return _characters(lesson.clips, rng), draw_each_voice(lesson.reminders, rng)


def prompt_subjects(lesson: Lesson) -> tuple[list[CharacterSubject], list[Subject]]:
    """What its prompts ask for, in their order: the character first."""
    rng = random.Random("prompts of a lesson")
    return _characters(lesson.character_prompts, rng), draw_each_voice(lesson.base_prompts, rng)


def examine(previews: Path, prompts: Path) -> dict[int, Examined]:
    """What the previews of each step show.

    Args:
        previews: the folder that training leaves them in.
        prompts: the file that they were made from.

    Raises:
        UserError: a step that lacks previews, or a clip that does not decode.
    """
    subjects = read_prompts(prompts)
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(previews.iterdir()):
        match = _PREVIEW.fullmatch(path.name)
        if match is not None:
            found.setdefault(int(match["step"]), {})[int(match["row"])] = path
    for step, paths in found.items():
        missing = set(range(len(subjects))) - set(paths)
        if missing:
            raise UserError(f"{previews}: previews of step {step} are missing for lines {sorted(row + 1 for row in missing)} of {prompts}.")
    return {step: _examined(subjects, [paths[row] for row in range(len(subjects))]) for step, paths in sorted(found.items())}


def read_prompts(path: Path) -> list[Subject | CharacterSubject]:
    """What the prompts of a lesson ask for, in their order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [subject_of(line.split(" --")[0]) for line in lines if line and not line.startswith("#")]


def _examined(subjects: Sequence[Subject | CharacterSubject], paths: Sequence[Path]) -> Examined:
    characters: list[tuple[CharacterSubject, Sight, Hearing]] = []
    others: list[tuple[Subject, Sight, Hearing]] = []
    for subject, path in zip(subjects, paths, strict=True):
        sight, hearing = read_world_clip(path)
        if hearing is None:
            raise UserError(f"{path}: has no sound; previews of the small world have their voice.")
        if isinstance(subject, CharacterSubject):
            characters.append((subject, sight, hearing))
        else:
            others.append((subject, sight, hearing))
    by_voice: dict[str, list[bool]] = {}
    for subject, _, hearing in others:
        by_voice.setdefault(subject.voice, []).append(hearing.voice == subject.voice)
    return Examined(
        character=character_scores(*zip(*characters, strict=True)) if characters else {},
        base=base_scores(*zip(*others, strict=True)) if others else {},
        voices={voice: sum(values) / len(values) for voice, values in by_voice.items()},
        paths=paths,
    )


def _prompt_lines(lesson: Lesson) -> str:
    characters, others = prompt_subjects(lesson)
    flags = f"--w {SIZE} --h {SIZE} --f {FRAMES} --fr {FPS} --s {lesson.steps} --l {lesson.guidance:g}"
    return "".join(f"{one.caption} {flags} --d {row + 1}\n" for row, one in enumerate([*characters, *others]))


def _characters(count: int, rng: random.Random) -> list[CharacterSubject]:
    """Each motion on each ground once before any comes again, in an order that is drawn."""
    ways = [CharacterSubject(motion=motion, ground=ground) for motion in MOTIONS for ground in GROUNDS]
    found: list[CharacterSubject] = []
    while len(found) < count:
        found += rng.sample(ways, len(ways))
    return found[:count]
