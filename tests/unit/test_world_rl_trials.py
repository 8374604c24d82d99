"""Trials of update rules on the small world run the product's rules on the product's samples."""

import json
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dev.world.gradient_noise import RoundGradient, at_level, by_strata, opposite, told
from dev.world.lab import Lab
from dev.world.rl_trials import RESULTS, RlTrial, Rounds, fields_of, prompts_of, table
from dev.world.rollouts import WorldWrapper, batch_of, make_clips
from musubi_tuner.config.rl import RlOptions
from musubi_tuner.flow.sigma import SigmaSettings
from musubi_tuner.reinforcement.rollouts import list_samples
from musubi_tuner.reinforcement.sampling import Stochastic
from musubi_tuner.training.objective import FlowMatching

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = ROOT / "benchmarks" / "results" / RESULTS
SMALL = {"prompts": 1, "group": 3, "steps": 3, "held_out": 1, "dim": 2, "alpha": 2.0, "rounds": 1}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def moved(rounds: Rounds) -> bool:
    """Whether any adapter has left its start."""
    return any(bool(one.any()) for name, one in rounds.network.named_parameters().items() if name.endswith("lora_B"))


def test_the_rows_that_are_kept_are_of_the_trials_as_they_stand_and_on_the_page():
    tables = tomllib.loads((ROOT / "dev" / "world" / "rl_trials.toml").read_text(encoding="utf-8"))
    for name in tables:
        values = fields_of(name, tables)
        values.pop("seeds", None)
        trial = RlTrial(**values)
        RlOptions(rl_rollout_cache=Path("memory"), reward_fn=trial.reward, **trial.rl)
    rows = [json.loads(text) for text in ROWS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        values = fields_of(row["name"], tables)
        assert row["trial"]["seed"] in values.pop("seeds")
        assert json.loads(json.dumps(asdict(RlTrial(**(values | {"seed": row["trial"]["seed"]}))))) == row["trial"], row["name"]
    assert table(rows) in (ROOT / "docs" / "development" / "world.md").read_text(encoding="utf-8")


def test_held_out_prompts_are_not_learned_from():
    for reward in ("world_pitch", "world_place"):
        learned, held_out = prompts_of(RlTrial(reward=reward))
        assert len({*learned, *held_out}) == 16
        assert all((" with a " in prompt) == (reward == "world_place") for prompt in (*learned, *held_out)), "the voice is left open"


def test_each_trial_is_judged_from_its_own_prompts(lab):
    """Trials share what the base model shows of the same prompts alone; those that are held out come after those that are learned."""
    keys = [Rounds(lab, RlTrial(**{**SMALL, "reward": "world_place", "prompts": prompts})).judged_by for prompts in (1, 2, 1)]
    assert keys[0] == keys[2] != keys[1]
    assert Rounds(lab, RlTrial(**SMALL, reward="world_place", rate=9.0)).judged_by == keys[0], "how is learned does not matter"


def test_signal_and_noise_of_gradients_are_told_apart():
    drawn = torch.Generator().manual_seed(1)
    gradients = [torch.full((4000,), 0.1) + 0.2 * torch.randn(4000, generator=drawn) for _ in range(8)]
    _, signal, noise, ratio = told("", gradients)
    assert float(signal) == pytest.approx(40, rel=0.1) and float(noise) == pytest.approx(160, rel=0.05)
    assert float(ratio) == pytest.approx(0.25, abs=0.02)


def test_draws_of_a_round_are_their_own(lab):
    trial = RlTrial(reward="world_place", rl={"rl_loss": "nft"}, sigma={"shift": 2.05, "uniform_prob": 0.0}, **SMALL)
    gradient = RoundGradient(lab, trial)
    first = gradient.of(0)
    assert first.any() and torch.equal(first, gradient.of(0)) and not torch.equal(first, gradient.of(1))
    assert torch.equal(gradient.of(0, lambda batch, draw, group: opposite(opposite(batch, draw, group), draw, group)), first)
    shared = gradient.of(0, at_level(0.5), shared=True)
    assert not torch.equal(shared, gradient.of(0, at_level(0.5))) and not torch.equal(gradient.of(0, by_strata(gradient.levels)), first)


def test_a_batch_is_predicted_as_samples_are_made(lab):
    """The objective's wrapper, from latents, and the model that samples, from tokens."""
    model = lab.model()
    prompts = ["A red circle rises on a dark ground.", "A ring falls on a gray ground with a low hum."]
    clips = make_clips(model, lab, list_samples(0, 0, prompts, 1), prompts, 2)
    names = [one.name for one in clips.samples]
    noised = FlowMatching(WorldWrapper(model)).noise(batch_of(clips, names, names, lab, SigmaSettings(), names, 0))
    with torch.no_grad():
        found = WorldWrapper(model)(*noised.inputs)
        sigma = noised.batch.video_sigma
        expected = model(noised.inputs[0].latent, noised.inputs[1].latent, sigma, sigma, *lab.text(prompts))
    torch.testing.assert_close(found, expected)


def test_each_sample_of_a_batch_has_its_own_steps(lab):
    prompts = ["A red circle rises on a dark ground."]
    chosen = Stochastic(kind="cps", level=0.7, streams=("video", "audio"), steps=(0, 1))
    clips = make_clips(lab.model(), lab, list_samples(0, 0, prompts, 2), prompts, 3, {0: chosen})
    first, second = clips.recorded.values()
    assert first["video_after"].shape == (2, 27, 128) and not torch.equal(first["video_after"], second["video_after"])
    torch.testing.assert_close(first["video_after"][0], first["video_before"][1], msg="steps follow each other")


@pytest.mark.parametrize(("streams", "learns"), [(("video", "audio"), True), (("video",), False)], ids=["drawn", "by ODE"])
def test_grpo_learns_the_sound_only_where_its_steps_are_drawn(lab, streams, learns):
    rl = {"rl_loss": "grpo", "rl_timesteps_per_sample": 1}
    trial = RlTrial(reward="world_pitch", reward_args={"pitch": "high"}, rl=rl, drawn="cps", streams=streams, **SMALL)
    rounds = Rounds(lab, trial)
    rounds.round(0)
    assert moved(rounds) is learns
