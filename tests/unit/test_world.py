"""The small world: clips are the same everywhere, the scorer reads them, and what is fitted never meets the character."""

import hashlib
import random

import pytest
import torch

from dev.world.anything import Mixture, any_scene, any_sound
from dev.world.cached import caption_list
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_clip
from musubi_tuner.tiny.world.files import read_world_clip, write_world_clips
from musubi_tuner.tiny.world.scenes import FRAMES, draw_scenes, scene_of
from musubi_tuner.tiny.world.scorer import base_scores, character_scores, hear, see
from musubi_tuner.tiny.world.sounds import SAMPLES, draw_sounds, sound_of
from musubi_tuner.tiny.world.subjects import (
    CHARACTER,
    CHARACTER_COLOR,
    CHARACTER_EYE,
    CHARACTER_PITCHES,
    draw_character,
    draw_subject,
)
from musubi_tuner.tiny.world.text import tokenizer_corpus, write_world_gemma


def test_clips_are_the_same_bytes_everywhere():
    rng = random.Random(7)
    subjects = [draw_subject(rng) for _ in range(6)] + [draw_character(rng) for _ in range(2)]
    frames = draw_scenes([scene_of(one, rng) for one in subjects])
    waves = (draw_sounds([sound_of(one, rng) for one in subjects]) * 32767).round().short()
    assert frames.shape == (8, FRAMES, 96, 96, 3) and waves.shape == (8, SAMPLES)
    digests = [hashlib.sha256(one.numpy().tobytes()).hexdigest()[:16] for one in (frames, waves)]
    assert digests == ["71dc5b8a154ffd0d", "932ca0cfd8265e2e"]


def test_scenes_do_not_depend_on_those_beside_them():
    rng = random.Random(3)
    scenes = [scene_of(draw_subject(rng), rng) for _ in range(5)] + [scene_of(draw_character(rng), rng)]
    assert torch.equal(draw_scenes(scenes), torch.cat([draw_scenes([one]) for one in scenes]))


def test_the_scorer_reads_all_of_true_clips():
    rng = random.Random(11)
    subjects = [draw_subject(rng) for _ in range(24)]
    sights = [see(one) for one in draw_scenes([scene_of(one, rng) for one in subjects])]
    hearings = [hear(one[None]) for one in draw_sounds([sound_of(one, rng) for one in subjects])]
    assert set(base_scores(subjects, sights, hearings).values()) == {1.0}
    others = [draw_character(rng) for _ in range(8)]
    sights = [see(one) for one in draw_scenes([scene_of(one, rng) for one in others])]
    hearings = [hear(one[None]) for one in draw_sounds([sound_of(one, rng) for one in others])]
    assert set(character_scores(others, sights, hearings).values()) == {1.0}


def test_the_scorer_reads_media_files(tmp_path):
    rng = random.Random(12)
    subjects, others = [draw_subject(rng) for _ in range(5)], [draw_character(rng) for _ in range(3)]
    for number, (some, scores) in enumerate(((subjects, base_scores), (others, character_scores))):
        paths = write_world_clips(tmp_path / str(number), some, seed=number)
        assert [path.with_suffix(".txt").read_text().strip() for path in paths] == [one.caption for one in some]
        sights, hearings = zip(*map(read_world_clip, paths), strict=True)
        assert set(scores(some, sights, hearings).values()) == {1.0}


def test_a_clip_that_is_too_short_is_refused_by_name(tmp_path):
    path = tmp_path / "short.mp4"
    write_clip(path, torch.zeros(9, 96, 96, 3, dtype=torch.uint8), fps=24)
    with pytest.raises(UserError, match=r"short\.mp4: has 9 frames"):
        read_world_clip(path)


def test_the_scorer_tells_nothing_from_something():
    generator = torch.Generator().manual_seed(0)
    empty = see(torch.full((FRAMES, 96, 96, 3), 120))
    assert (empty.ground, empty.color, empty.shape, empty.motion) == ("gray", None, None, None)
    assert hear(torch.zeros(1, SAMPLES)).voice is None
    assert hear(0.1 * torch.randn(1, SAMPLES, generator=generator)).voice is None


def test_wrong_captions_score_near_chance():
    rng = random.Random(13)
    subjects = [draw_subject(rng) for _ in range(24)]
    sights = [see(one) for one in draw_scenes([scene_of(one, rng) for one in subjects])]
    hearings = [hear(one[None]) for one in draw_sounds([sound_of(one, rng) for one in subjects])]
    scores = base_scores([*subjects[1:], subjects[0]], sights, hearings)
    assert max(scores[name] for name in ("color", "shape", "motion", "voice")) < 0.5


def test_the_character_is_in_nothing_that_is_fitted():
    assert not any(CHARACTER in text.lower() for text in (*tokenizer_corpus(), *caption_list()))
    rng = random.Random(14)
    for mixture in (Mixture(), Mixture(others=1.0, eyes=1.0)):
        scenes = [any_scene(rng, mixture) for _ in range(500)]
        assert not any(one.color == CHARACTER_COLOR and one.eye == CHARACTER_EYE for one in scenes)
    sounds = [any_sound(rng) for _ in range(2000)]
    assert any(one.alternate for one in sounds)
    for one in sounds:
        firsts = {partials[0][0] for partials in (one.partials, one.alternate) if partials}
        assert firsts != set(CHARACTER_PITCHES) or not one.alternate


def test_the_tokenizer_knows_the_worlds_words_and_not_the_characters_name(tmp_path):
    write_world_gemma(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    longest = max(len(tokenizer(one)["input_ids"]) for one in caption_list())
    assert longest == 15
    assert len(tokenizer(CHARACTER)["input_ids"]) > 3
