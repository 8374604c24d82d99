"""Trials of recipes learn from what the learning benchmark's lessons show, as training does."""

import tomllib
from pathlib import Path

import pytest
import torch

from dev.world.lab import Lab
from dev.world.trials import Training, Trial, share_of_rate
from musubi_tuner.tiny.world.lesson import DATASET, Lesson, write_lesson
from musubi_tuner.tiny.world.lesson import lesson_subjects as subjects_of

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {"clips": 2, "reminders": 3, "dim": 2, "alpha": 2.0, "steps": 4}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def test_a_lessons_files_hold_what_trials_are_trained_on(tmp_path):
    lesson = Lesson(clips=2, reminders=3, character_prompts=1, base_prompts=1, steps=4)
    write_lesson(tmp_path, lesson)
    assert (tmp_path / DATASET).exists()
    for folder, subjects in zip(("character", "reminders"), subjects_of(lesson), strict=True):
        captions = [path.read_text(encoding="utf-8").strip() for path in sorted((tmp_path / folder).glob("*.txt"))]
        assert captions == [one.caption for one in subjects]


def test_the_trials_of_the_docs_can_be_run_and_are_named_there():
    written = tomllib.loads((ROOT / "dev" / "world" / "trials.toml").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "development" / "world.md").read_text(encoding="utf-8")
    for name, values in written.items():
        Trial(**{key: value for key, value in values.items() if key != "seeds"})
        assert f"| `{name}` |" in page


def test_a_step_moves_the_adapters_and_nothing_else(lab):
    training = Training(lab, Trial(character=1, reminded=1, **SMALL))
    frozen = {name: one.detach().clone() for name, one in training.model.named_parameters() if not one.requires_grad}
    before = [one.detach().clone() for one in training.network.parameters()]
    training.step(0)
    assert all(torch.equal(one, frozen[name]) for name, one in training.model.named_parameters() if name in frozen)
    assert any(not torch.equal(one, old) for one, old in zip(training.network.parameters(), before, strict=True))


def test_what_the_base_model_predicts_teaches_nothing_at_first(lab):
    known, foreign = (Training(lab, Trial(character=0, reminded=2, teacher=teacher, **SMALL)) for teacher in (True, False))
    for training in (known, foreign):
        training._loss(0, 2).backward()
    assert all(one.grad is None or not one.grad.any() for one in known.network.parameters())
    assert any(one.grad is not None and one.grad.any() for one in foreign.network.parameters())


def test_reminders_weigh_what_the_trial_says(lab):
    alone, heavy = (Training(lab, Trial(character=0, reminded=2, reminder_weight=weight, **SMALL)) for weight in (1.0, 5.0))
    torch.testing.assert_close(5 * alone._loss(0, 2), heavy._loss(0, 2))


def test_rates_rise_and_fall_with_the_schedule():
    shares = [share_of_rate(Trial(steps=100, warmup=0.1), number) for number in range(100)]
    assert shares[0] < shares[5] < 1 and shares[10] == 1 and shares[-1] < 0.01
