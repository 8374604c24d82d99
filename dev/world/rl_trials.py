"""Rounds of reinforcement learning in one process: rollouts, scores and updates by the product's rules, judged on held-out prompts.

python -m dev.world.rl_trials FOLDER TRIALS.toml [--only NAME ...]   TRIALS.toml: tables `[NAME]` with fields of `RlTrial`, `seeds`, and
                                                                     `like`, the name of a table whose fields hold besides

Each trial is a line of FOLDER/rl_trials.jsonl and is not made again; `--table` prints them. See `rollouts.py` for what differs from the
programs. Prompts for the sound's reward name no voice, so samples have any; those for the picture's are whole captions, which leave the
place open. What is kept is told by other captions, with guidance.
"""

import argparse
import datetime
import json
import os
import platform
import random
import re
import statistics
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dev.world.lab import Lab, Scores
from dev.world.rewards import REWARDS
from dev.world.rollouts import Clips, WorldWrapper, batch_of, make_clips, scores_of
from musubi_tuner.config.rl import RlOptions
from musubi_tuner.flow.sigma import SigmaSettings
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, create_network
from musubi_tuner.reinforcement.advantages import Advantages, Route, Scored, advantages
from musubi_tuner.reinforcement.learning import Weights, best_and_worst, settings_of, weights_in_pair, weights_of
from musubi_tuner.reinforcement.objective import OldPolicy, RolloutObjective
from musubi_tuner.reinforcement.rewards.base import Reward
from musubi_tuner.reinforcement.rollouts import list_samples
from musubi_tuner.reinforcement.sampling import Stochastic, choose_steps
from musubi_tuner.tiny.world.subjects import Subject, draw_each_voice, draw_subject
from musubi_tuner.training.objective import BatchObjective, FlowMatching
from musubi_tuner.training.optimizer import clip, make_optimizer

RESULTS = "rl_trials.jsonl"
KEPT = ("color", "shape", "motion", "ground", "voice")
_HELD_OUT_ROUND = -1
"""Names the held-out samples' seeds, which no round has."""
_GUIDANCE = 3.0
"""Of the clips that show what is kept, which are those of `lab.read`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RlTrial:
    """One run of rounds."""

    reward: str
    reward_args: Mapping[str, Any] = field(default_factory=dict)
    route: Route | None = None
    """In place of the reward's own."""
    rl: Mapping[str, Any] = field(default_factory=dict)
    """Options of `ltxv2_train_rl.py`, by their names: rl_loss and so on."""
    drawn: str = "none"
    """`--rl_sde_type`"""
    level: float = 0.7
    """`--rl_sde_eta`"""
    drawn_steps: int = 3
    window: tuple[int, int] = (0, 10)
    """`--rl_sde_window`"""
    streams: tuple[str, ...] = ("video", "audio")
    """Whose steps are drawn."""
    args: Mapping[str, str] = field(default_factory=lambda: {"preset": "attention_ff"})
    """`--network_args`"""
    dim: int = 32
    alpha: float = 32.0
    rate: float = 1e-3
    rounds: int = 4
    prompts: int = 8
    group: int = 8
    steps: int = 8
    """Of sampling."""
    sigma: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SigmaSettings`, for rules that draw noise levels."""
    batch: int = 8
    """Samples, or of dpo pairs, of an update."""
    held_out: int = 8
    held_out_group: int = 4
    kept: int = 36
    """Prompts of the base world, nine voices in turn."""
    seed: int = 0


class Rounds:
    """A trial on its way."""

    def __init__(self, lab: Lab, trial: RlTrial) -> None:
        self._lab, self._trial = lab, trial
        self.options = RlOptions(rl_rollout_cache=Path("memory"), reward_fn=trial.reward, **trial.rl)
        self._reward = reward_of(trial)
        self.model = lab.model()
        self.network: LoRANetwork = create_network(self.model.model, dim=trial.dim, alpha=trial.alpha, args=trial.args, seed=trial.seed)
        for parameter in self.network.parameters():
            parameter.requires_grad_(True)
        self._prompts, self._held_out = prompts_of(trial)
        lab.text([*self._prompts, *self._held_out])

    def round(self, number: int) -> float:
        """Rollouts, scores, one pass over them; the mean score of the rollouts."""
        options = self.options
        clips, drawn, scores, found = self._sample(number)
        weights: Weights
        if options.rule == "dpo":
            pairs = best_and_worst(clips.groups, found)
            weights = {
                f"pair {place}/{name}": weights_in_pair(sign, streams)
                for place, (best, worst, streams) in enumerate(pairs)
                for name, sign in ((best, 1.0), (worst, -1.0))
            }
            parts = [[f"pair {place}/{name}" for name in pair[:2]] for place, pair in enumerate(pairs)]
        else:
            weights = weights_of(options, clips.groups, found)
            parts = [[f"samples/{name}"] for name in found.learned]
            weights = {f"samples/{name}": streams for name, streams in weights.items()}
        self._update(number, clips, weights, parts, None if drawn is None else drawn[0])
        return statistics.fmean(score for score in scores.values() if score is not None)

    def first_step(self) -> tuple[Clips, BatchObjective, RolloutObjective]:
        """The first round's samples, and what their update begins with, for rules that learn from samples one by one."""
        clips, drawn, _, found = self._sample(0)
        weights = {f"samples/{name}": streams for name, streams in weights_of(self.options, clips.groups, found).items()}
        objective = self._objective(clips, weights, None if drawn is None else drawn[0])
        return clips, BatchObjective(network=self.network, objective=objective), objective

    def _sample(self, number: int) -> tuple[Clips, dict[int, Stochastic] | None, Mapping[str, float | None], Advantages]:
        """Rollouts of a round, their stochastic steps by prompt, scores and advantages."""
        trial, options = self._trial, self.options
        samples = list_samples(trial.seed, number, self._prompts, trial.group)
        drawn = None if trial.drawn == "none" else {prompt: self._stochastic(number, prompt) for prompt in range(len(self._prompts))}
        clips = make_clips(self.model, self._lab, samples, self._prompts, trial.steps, drawn)
        scores = scores_of(clips, self._reward, self._lab)
        scored = Scored(reward=trial.reward, route=trial.route or self._reward.route, weight=1.0, scores=scores)
        shuffled = None if options.rl_shuffle_advantages is None else options.rl_shuffle_advantages + number
        found = advantages(
            clips.groups, [scored], clip=options.nft_adv_clip_max, over_all=options.rl_advantage == "gdpo", shuffled=shuffled
        )
        return clips, drawn, scores, found

    def _objective(self, clips: Clips, weights: Weights, stochastic: Stochastic | None) -> RolloutObjective:
        return RolloutObjective(
            matching=FlowMatching(WorldWrapper(self.model)),
            network=self.network,
            old=OldPolicy(self.network),
            settings=settings_of(self.options),
            advantages=weights,
            rollouts=clips.kept(stochastic),
        )

    def _update(self, number: int, clips: Clips, weights: Weights, parts: Sequence[Sequence[str]], stochastic: Stochastic | None) -> None:
        """
        Args:
            parts: samples that stay together in a batch.
        """
        trial, options = self._trial, self.options
        step = BatchObjective(network=self.network, objective=self._objective(clips, weights, stochastic))
        optimizer = make_optimizer("AdamW", self.network.parameter_groups(trial.rate), trial.rate, {})
        turns = [(turn, part) for turn in range(options.rl_timesteps_per_sample) for part in parts]
        random.Random(f"{trial.seed}|{number}|order").shuffle(turns)
        for start in range(0, len(turns), trial.batch):
            optimizer.zero_grad()
            batches = list(self._batches(clips, turns[start : start + trial.batch], number))
            for batch in batches:
                step.backward(batch, len(batches))
            clip(list(self.network.parameters()), 1.0)
            optimizer.step()

    def _batches(self, clips: Clips, turns: Sequence[tuple[int, Sequence[str]]], number: int) -> Iterator[Any]:
        """All at once; of dpo pair by pair, as its loss wants them."""
        for some in [[turn] for turn in turns] if self.options.rule == "dpo" else [turns]:
            keys = [key for _, part in some for key in part]
            drawn = [f"{number}|{turn}|{key}" for turn, part in some for key in part]
            names = [key.partition("/")[2] for key in keys]
            yield batch_of(clips, names, keys, self._lab, SigmaSettings(**self._trial.sigma), drawn, self._trial.seed)

    def _stochastic(self, number: int, prompt: int) -> Stochastic:
        trial = self._trial
        chosen = choose_steps(f"{trial.seed}|{number}|{prompt}|steps", tuple(trial.window), trial.drawn_steps, trial.steps)
        return Stochastic(kind=trial.drawn, level=trial.level, streams=trial.streams, steps=chosen)  # type: ignore[arg-type]

    @property
    def judged_by(self) -> str:
        """What decides how the base model fares before any round."""
        trial = self._trial
        sampling = (trial.seed, trial.steps, trial.held_out_group, trial.kept)
        return json.dumps([trial.reward, dict(trial.reward_args), self._held_out, sampling])

    def held_out(self) -> list[list[float]]:
        """Scores by prompt, each from noise that stays the same."""
        trial = self._trial
        samples = list_samples(trial.seed, _HELD_OUT_ROUND, self._held_out, trial.held_out_group)
        scores = scores_of(make_clips(self.model, self._lab, samples, self._held_out, trial.steps), self._reward, self._lab)
        by_prompt: list[list[float]] = [[] for _ in self._held_out]
        for one in samples:
            score = scores[one.name]
            assert score is not None, "the world's rewards score every clip of such prompts"
            by_prompt[one.prompt].append(score)
        return by_prompt

    def kept(self) -> Scores:
        """What captions of the base world still show, and each of its voices."""
        subjects = draw_each_voice(self._trial.kept, random.Random("kept"))
        found = self._lab.read(self.model, [], subjects, _GUIDANCE)
        return {"base": found["base"], "voices": found["voices"]}


def reward_of(trial: RlTrial) -> Reward:
    """Set up."""
    kind = next(one for one in REWARDS if one.name == trial.reward)
    reward = kind()
    reward.setup(torch.device("cpu"), **trial.reward_args)
    return reward


def prompts_of(trial: RlTrial) -> tuple[list[str], list[str]]:
    """Prompts that are learned from, and those that are held out: none twice."""
    rng = random.Random(f"rl prompts|{trial.seed}")
    found: list[str] = []
    while len(found) < trial.prompts + trial.held_out:
        prompt = _prompt(draw_subject(rng), trial.reward)
        if prompt not in found:
            found.append(prompt)
    return found[: trial.prompts], found[trial.prompts :]


def _prompt(subject: Subject, reward: str) -> str:
    return f"{subject.sight}." if reward == "world_pitch" else subject.caption


def run_trial(lab: Lab, trial: RlTrial, before: dict[str, Any]) -> dict[str, Any]:
    """All rounds, held-out samples and what is kept before and after.

    Args:
        before: what other trials have found of the base model, which is added to.
    """
    started = time.process_time()
    rounds = Rounds(lab, trial)
    key = rounds.judged_by
    if key not in before:
        before[key] = (rounds.held_out(), rounds.kept())
    base, base_kept = before[key]
    means = []
    for number in range(trial.rounds):
        means.append(rounds.round(number))
        print(f"  round {number}: rollouts {means[-1]:.3f}, {time.process_time() - started:.0f} s", flush=True)
    scores, kept = rounds.held_out(), rounds.kept()
    gains = [[one - other for one, other in zip(*pair, strict=True)] for pair in zip(scores, base, strict=True)]
    every, by_prompt = [one for group in gains for one in group], [statistics.fmean(group) for group in gains]
    return {
        "rollouts": [round(mean, 4) for mean in means],
        "held_out": {
            "before": round(statistics.fmean(one for group in base for one in group), 4),
            "after": round(statistics.fmean(one for group in scores for one in group), 4),
            "gain": round(statistics.fmean(every), 4),
            "error": round(statistics.stdev(every) / len(every) ** 0.5, 4),
            "error_over_prompts": round(statistics.stdev(by_prompt) / len(by_prompt) ** 0.5, 4),
        },
        "kept": {"before": base_kept, "after": kept},
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def fallen(row: Mapping[str, Any]) -> float:
    """By how much the share of clips that are right has fallen the most, over what is looked at."""
    before, after = row["kept"]["before"]["base"], row["kept"]["after"]["base"]
    return max(before[name] - after[name] for name in KEPT)


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    held, kept = row["held_out"], row["kept"]["after"]["base"]
    error = max(held["error"], held["error_over_prompts"])
    times = f"{held['gain'] / error:.1f}" if error else "0"
    shares = " | ".join(f"{kept[name]:.2f}" for name in KEPT)
    cells = [row["name"], row["trial"]["reward"], row["trial"]["seed"], f"{held['before']:.3f}", f"{held['after']:.3f}"]
    rest = f"{held['gain']:+.3f} ± {error:.3f} | {times} | {shares} | {fallen(row):.2f} | {row['cpu_seconds']:.0f}"
    return f"| {' | '.join(map(str, cells))} | {rest} |"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of all trials; the error is the larger of that over samples and that over prompts."""
    first = "trial", "reward", "seed", "before", "after", "gain", "gain / error"
    heads = [*first, *(f"kept: {name}" for name in KEPT), "largest fall", "CPU s"]
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *map(line, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("trials", type=Path, nargs="?", help="TOML")
    parser.add_argument("--only", nargs="+", help="regular expressions over names")
    parser.add_argument("--seeds", type=int, nargs="+", help="of those that a table has; default: all")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results = options.folder / RESULTS
    rows = [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    if options.table:
        print(table(rows))
        return
    torch.set_num_threads(1)
    lab, before = Lab(options.folder), {}
    tables = tomllib.loads(options.trials.read_text(encoding="utf-8"))
    for name in tables:
        values = fields_of(name, tables)
        if options.only and not any(re.fullmatch(pattern, name) for pattern in options.only):
            continue
        for seed in values.pop("seeds", [values.get("seed", 0)]):
            trial = RlTrial(**(values | {"seed": seed}))
            if options.seeds and seed not in options.seeds:
                continue
            if any(row["name"] == name and row["trial"] == json.loads(json.dumps(asdict(trial))) for row in rows):
                continue
            print(f"{name}, seed {seed}", flush=True)
            row = {"name": name, "trial": asdict(trial), **run_trial(lab, trial, before), **_where()}
            print(line(row), flush=True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def fields_of(name: str, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of a table, over those of the table that it is like."""
    own = dict(tables[name])
    like = own.pop("like", None)
    if like is None:
        return own
    beneath = fields_of(like, tables)
    return beneath | own | {key: beneath.get(key, {}) | own.get(key, {}) for key in ("rl",) if key in beneath or key in own}


def _where() -> dict[str, str]:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {torch.__version__}"
    return {"machine": machine, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


if __name__ == "__main__":
    main()
