"""A lesson's clips, prompts and captions, and what is read from previews of it."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.learning import table
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.world.files import write_world_clips
from musubi_tuner.tiny.world.lesson import Lesson, examine, read_prompts, write_lesson
from musubi_tuner.tiny.world.subjects import CHARACTER, CharacterSubject, draw_character, draw_each_voice, draw_subject, subject_of
from tools import read_world

SMALL = Lesson(clips=2, reminders=3, character_prompts=2, base_prompts=3, steps=4)


@pytest.mark.parametrize("draw", (draw_subject, draw_character))
def test_captions_are_read_back(draw) -> None:
    rng = random.Random(5)
    for subject in [draw(rng) for _ in range(20)]:
        assert subject_of(subject.caption) == subject


def test_other_captions_are_refused() -> None:
    with pytest.raises(UserError, match="'A red dog rises on a dark ground with a low hum.' is no caption"):
        subject_of("A red dog rises on a dark ground with a low hum.")


def test_each_voice_takes_its_turn() -> None:
    voices = [one.voice for one in draw_each_voice(18, random.Random(0))]
    assert len(set(voices[:9])) == 9 and voices[:9] == voices[9:]


def test_a_lesson_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_lesson(tmp_path / name, SMALL)
    texts = [sorted((path.name, path.read_text()) for path in (tmp_path / name).rglob("*.t*")) for name in ("one", "two")]
    assert texts[0] == texts[1]
    assert sum(CHARACTER in text for name, text in texts[0] if name.startswith("clip")) == 2
    assert [type(one) is CharacterSubject for one in read_prompts(tmp_path / "one" / "prompts.txt")] == [True] * 2 + [False] * 3


def test_reminders_learn_from_the_base_model_where_they_have_a_weight(tmp_path: Path) -> None:
    for name, lesson in (("plain", SMALL), ("kept", replace(SMALL, batch=3, reminder_batch=1, reminder_weight=2.5))):
        write_lesson(tmp_path / name, lesson)
    specs = {name: load_dataset_config(tmp_path / name / "dataset.toml").datasets for name in ("plain", "kept")}
    assert [(one.batch_size, one.preserve_base, one.audio_loss_weight) for one in specs["plain"]] == [(4, False, None)] * 2
    assert [(one.batch_size, one.preserve_base, one.audio_loss_weight) for one in specs["kept"]] == [(3, False, None), (1, True, 2.5)]
    assert specs["kept"][1].video_loss_weight == 2.5


def test_misnamed_clips_have_each_others_captions(tmp_path: Path) -> None:
    write_lesson(tmp_path, Lesson(clips=2, reminders=3, character_prompts=1, base_prompts=1, steps=4, misnamed=True))
    assert not any(CHARACTER in path.read_text() for path in (tmp_path / "character").glob("*.txt"))
    assert sum(CHARACTER in path.read_text() for path in (tmp_path / "reminders").glob("*.txt")) == 2


@pytest.fixture(scope="module")
def examined_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Previews that show other things at step 0, and what the prompts ask for at step 7."""
    folder = tmp_path_factory.mktemp("lesson")
    write_lesson(folder, SMALL)
    sample = folder / "training" / "sample"
    sample.mkdir(parents=True)
    wanted = read_prompts(folder / "prompts.txt")
    others = [draw_subject(random.Random(row)) for row in range(len(wanted))]
    for step, subjects in ((0, others), (7, wanted)):
        for row, path in enumerate(write_world_clips(folder / f"step{step}", subjects, seed=step)):
            shutil.copy(path, sample / f"zorbo_s{step:08d}_{row:02d}_{row + 1}.mp4")
    return folder


def test_previews_are_examined_by_step(examined_folder: Path) -> None:
    found = examine(examined_folder / "training" / "sample", examined_folder / "prompts.txt")
    assert list(found) == [0, 7]
    assert found[0].character["identity"] == found[0].character["voice"] == 0 and found[0].base["voice"] < 1
    assert set(found[7].character.values()) == set(found[7].base.values()) == set(found[7].voices.values()) == {1.0}


def test_a_missing_preview_is_named(examined_folder: Path, tmp_path: Path) -> None:
    sample = tmp_path / "sample"
    shutil.copytree(examined_folder / "training" / "sample", sample)
    (sample / "zorbo_s00000007_03_4.mp4").unlink()
    with pytest.raises(UserError, match=r"previews of step 7 are missing for lines \[4\]"):
        examine(sample, examined_folder / "prompts.txt")


def test_the_quickstarts_page_and_numbers(examined_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert read_world.main([str(examined_folder)]) == 0
    page = (examined_folder / "before_and_after.html").read_text(encoding="utf-8")
    assert page.count("<video") == 10 and "training/sample/zorbo_s00000007_04_5.mp4" in page
    assert (examined_folder / "before_and_after.png").read_bytes().startswith(b"\x89PNG")
    assert "zorbo: its voice of two pitches                0.00   1.00" in capsys.readouterr().out


def test_the_benchmarks_table_has_errors() -> None:
    def row(seed: int, voice: float) -> dict:
        kept = dict.fromkeys(("color", "shape", "motion", "ground"), 1.0) | {"voice": voice}
        steps = {"4": {"character": {"identity": 0.5, "voice": voice}, "base": kept}}
        return json.loads(
            json.dumps({"recipe": "plain", "seed": seed, "lesson": {"character_prompts": 32, "base_prompts": 32}, "steps": steps})
        )

    assert "| plain | 2 | 4 | 0.50 ± 0.00 | 0.70 ± 0.10 |" in table([row(0, 0.6), row(1, 0.8)])
    assert "| plain | 1 | 4 | 0.50 ± 0.08 | 1.00 ± 0.04 |" in table([row(0, 1.0)])
