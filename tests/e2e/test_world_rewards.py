"""The small world's rewards put its clips in order, and score rollouts of its model through the programs."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from musubi_tuner import ltxv2_cache_rollouts, ltxv2_score_rollouts
from musubi_tuner.media.audio import Waveform
from musubi_tuner.reinforcement.rewards.base import NoScore, RewardSample
from musubi_tuner.reinforcement.rewards.catalog import choose
from musubi_tuner.reinforcement.rewards.onsets import agreement
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.world.checkpoint import write_world_checkpoint
from musubi_tuner.tiny.world.scenes import FPS, draw_scenes, scene_of
from musubi_tuner.tiny.world.sounds import RATE, draw_sounds, sound_of
from musubi_tuner.tiny.world.subjects import COLORS, PITCHES, TIMBRES, Subject
from musubi_tuner.tiny.world.text import write_world_gemma

PLUGIN = Path(__file__).resolve().parent.parent.parent / "dev" / "world" / "rewards.py"
RED = Subject(color="red", shape="circle", motion="moves left", ground="dark", pitch="low", timbre="hum")


def world(name: str, *arguments: str):
    (chosen,) = choose([name], arguments, [PLUGIN])
    reward = chosen.kind()
    reward.setup(torch.device("cpu"), **chosen.arguments)
    return reward


def sample(frames=None, wave=None, prompt: str = RED.caption) -> RewardSample:
    sound = None if wave is None else Waveform(wave.expand(2, -1), RATE)
    return RewardSample(name="a", group=0, prompt=prompt, fps=24.0, decoded_frames=frames, decoded_sound=sound)


def test_a_redder_object_scores_higher():
    scene = scene_of(RED, random.Random(0))
    reward = world("world_red")
    found = {}
    for share in (0.0, 0.3, 0.6, 1.0):
        mixed = tuple(round(share * other + (1 - share) * red) for red, other in zip(COLORS["red"], COLORS["blue"], strict=True))
        frames = draw_scenes([replace(scene, color=mixed)])[0]
        (found[share],) = reward.score([sample(frames.to(torch.uint8))])
    assert list(found.values()) == sorted(found.values(), reverse=True) and found[0.0] > -0.1 > -0.4 > found[1.0]
    empty = torch.full((17, 96, 96, 3), 25, dtype=torch.uint8)
    assert reward.score([sample(empty)]) == [-1.0]
    with pytest.raises(UserError, match="17 frames of 96x96"):
        reward.score([sample(empty[:9])])
    with pytest.raises(UserError, match="world_red.color=pink: must be one of red"):
        world("world_red", "world_red.color=pink")


def test_an_object_that_is_nearer_to_the_side_scores_higher():
    scene = scene_of(replace(RED, motion="stands still"), random.Random(1))
    found = {}
    for side in ("left", "right", "top", "bottom"):
        reward = world("world_place", f"world_place.side={side}")
        frames = draw_scenes([scene])[0].to(torch.uint8)
        moved = frames.roll({"left": -9, "right": 9}.get(side, 0), 2).roll({"top": -9, "bottom": 9}.get(side, 0), 1)
        first, second = reward.score([sample(frames), sample(moved)])
        assert second == pytest.approx(first + 2 * 9 / 96, abs=0.02)
        found[side] = first
    assert found["left"] == pytest.approx(-found["right"]) and found["top"] == pytest.approx(-found["bottom"])
    assert world("world_place").score([sample(torch.full((17, 96, 96, 3), 25, dtype=torch.uint8))]) == [-1.0]
    with pytest.raises(UserError, match="world_place.side=middle: must be one of left"):
        world("world_place", "world_place.side=middle")


def test_the_pitch_of_the_caption_scores_highest():
    reward, high = world("world_pitch"), world("world_pitch", "world_pitch.pitch=high")
    for timbre in TIMBRES:
        of = {}
        for pitch in PITCHES:
            wave = draw_sounds([sound_of(replace(RED, pitch=pitch, timbre=timbre), random.Random(1))])
            (of[pitch],) = reward.score([sample(wave=wave)])
            (of_high,) = high.score([sample(wave=wave)])
            assert (of_high > 0) == (pitch == "high")
        assert of["low"] > 0 > max(of["middle"], of["high"])
    (none,) = reward.score([sample(wave=torch.zeros(1, 8000), prompt="A zorbo rises on a gray ground.")])
    assert isinstance(none, NoScore)


def test_beats_agree_with_the_bounces_that_they_are_of():
    bounces = replace(RED, motion="bounces")
    for seed in range(3):
        frames = draw_scenes([scene_of(bounces, random.Random(seed))])[0].to(torch.uint8)
        wave = draw_sounds([sound_of(bounces, random.Random(seed))]).expand(2, -1)
        at = {late: agreement(frames, Waveform(wave.roll(round(RATE * late / FPS), 1), RATE), FPS, 0.05) for late in (-3, 0, 2, 4)}
        assert at[0] > 0.8 and max(at[-3], at[2], at[4]) < 0.6


def test_rollouts_of_the_world_are_scored(tmp_path):
    write_world_checkpoint(tmp_path / "world.safetensors")
    write_world_gemma(tmp_path / "gemma")
    (tmp_path / "prompts.txt").write_text(f"{RED.caption}\n{replace(RED, color='blue', pitch='high').caption}\n", encoding="utf-8")
    out, model = tmp_path / "rollouts", str(tmp_path / "world.safetensors")
    flags = ["--rl_prompts", str(tmp_path / "prompts.txt"), "--rl_rollout_cache", str(out), "--ltxv2_model", model, "--device", "cpu"]
    flags += ["--text_encoder", str(tmp_path / "gemma"), "--rl_group_size", "2", "--sample_width", "96", "--sample_height", "96"]
    flags += ["--sample_frames", "17", "--sample_steps", "8", "--stg_scale", "0", "--modality_scale", "1", "--video_cfg_scale", "3"]
    flags += ["--audio_cfg_scale", "3", "--ltxv2_timestep_format", "flowmatch_1_1000"]
    assert ltxv2_cache_rollouts.main(flags) == 0
    rewards = ["--rl_rollout_cache", str(out), "--reward_fn", "world_red,world_pitch", "--reward_plugins", str(PLUGIN), "--vae", model]
    assert ltxv2_score_rollouts.main([*rewards, "--device", "cpu"]) == 0
    red, pitch = (
        json.loads((out / "scores" / f"{name}.json").read_text(encoding="utf-8"))["scores"] for name in ("world_red", "world_pitch")
    )
    assert min(red["g0000_k00"], red["g0000_k01"]) > max(red["g0001_k00"], red["g0001_k01"]), "the red prompt's are redder"
    assert min(pitch.values()) > 0, "the world's model sings as it is told"
