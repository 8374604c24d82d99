"""Rounds: rollouts, scores, update, and how the new policy does on prompts that are never learned from.

    OUTPUT_DIR/rounds.json               what each round did; written when it is done
    OUTPUT_DIR/before/heldout            held-out samples of the base model
    OUTPUT_DIR/round_000/rollouts, training, heldout
    OUTPUT_DIR/NAME.safetensors          the LoRA of the best round
    OUTPUT_DIR/rounds.html               the page of all rounds

Every stage can be stopped at any point and goes on from its files, so the driver need not remember where it was.
"""

import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.cache.names import PROMPT_FOLDER
from musubi_tuner.cache.store import write_bytes
from musubi_tuner.config.rounds import RoundOptions, StageFlags
from musubi_tuner.reinforcement.advantages import Scored
from musubi_tuner.reinforcement.judging import units_of
from musubi_tuner.reinforcement.page.write import PAGE, write_page
from musubi_tuner.reinforcement.rollouts import ROLLOUTS, STEPS_ENDING, read_rollouts
from musubi_tuner.reinforcement.scores import parse_rewards, read_scores, rewards_of, scores_path, totals_of
from musubi_tuner.reinforcement.stages import check_stages
from musubi_tuner.runtime.disk import remove_folder
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json, read_text

log = logging.getLogger(__name__)

ROUNDS = "rounds.json"
_FORMAT = 2
_JUDGED = ("heldout_prompts", "heldout")
"""Settings that decide what rounds are judged on."""
Run = Callable[[str, Sequence[str]], int]
"""Command and words -> exit code."""


class StageFailed(Exception):
    """A program did not end well."""

    def __init__(self, stage: str, code: int) -> None:
        super().__init__(f"{stage} ended with {code}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Standing:
    """A policy on the held-out prompts."""

    gain: float
    """Mean difference from the base model's sample of the same seed: weighted sum of the rewards, each in units of the base model's spread
    within prompts, as the update weighs them."""
    error: float
    """Standard error of the gain, over prompts."""
    rewards: Mapping[str, float]
    """Mean of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """All rounds of a folder."""

    options: RoundOptions
    stages: StageFlags
    run: Run

    def go(self) -> list[dict[str, Any]]:
        """Do what is left, and return a row for each round, the base model's first.

        Raises:
            StageFailed: a program has told why.
            UserError: settings that a program refuses, rounds of other settings, a reward that no held-out sample has, or a control that
                is none.
        """
        folder = self.options.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        check_stages(self.options, self.stages)
        self._control()
        rows = self._earlier()
        if not rows:
            self._check_new()
        if not rows:
            first: dict[str, Any] = {"round": None, "heldout": _plain(self._judge(folder / "before", None, None))}
            rows = [first]
            self._keep(rows)
        if self.options.rl_delete_round_caches:
            for number in range(len(rows) - 1):  # a run that was killed may not have come to it
                _delete_samples(folder / f"round_{number:03d}" / "rollouts")
        base = folder / "before" / "heldout"
        for number in range(len(rows) - 1, self.options.rl_rounds):
            place = folder / f"round_{number:03d}"
            policy = self._policy(number - 1)
            self._stage(
                "rollouts", "cache-rollouts",
                {"rl_prompts": self.options.rl_prompts, "rl_rollout_cache": place / "rollouts", "rl_policy": policy, "rl_round": number},
            )  # fmt: skip
            self._stage("scores", "score-rollouts", {"rl_rollout_cache": place / "rollouts"})
            reward_fn = self.stages.of["scores"]["reward_fn"]
            _check_same_judge(place / "rollouts", base, reward_fn)
            learned = self._of_rollouts(place / "rollouts")
            self._stage(
                "training", "train-rl",
                {
                    "rl_rollout_cache": place / "rollouts", "reward_fn": reward_fn, "network_weights": policy,
                    "output_dir": place / "training", "output_name": self.options.output_name, "autoresume": True,
                },
            )  # fmt: skip
            standing = self._judge(place, self._policy(number), base)
            rows.append({"round": number, "rollouts": learned, "heldout": _plain(standing)})
            self._keep(rows)
            if self.options.rl_delete_round_caches:
                _delete_samples(place / "rollouts")
        self._show(rows)
        return rows

    def _policy(self, number: int) -> Path | None:
        """The LoRA of a round; None is the base model."""
        if number < 0:
            return None
        return self.options.output_dir / f"round_{number:03d}" / "training" / f"{self.options.output_name}.safetensors"

    def _judge(self, place: Path, policy: Path | None, base: Path | None) -> Standing:
        """Samples of the held-out prompts, the same seeds for every policy, without stochastic steps."""
        own = {
            "rl_prompts": self.options.rl_heldout_prompts, "rl_rollout_cache": place / "heldout", "rl_policy": policy, "rl_round": 0,
            "rl_group_size": self.options.rl_heldout_group_size, "rl_seed": self.options.rl_heldout_seed, "rl_sde_type": "none",
        }  # fmt: skip
        self._stage("rollouts", "cache-rollouts", own)
        shown = self.options.rl_page_samples if self.stages.of["scores"].get("vae") is not None else 0
        self._stage("scores", "score-rollouts", {"rl_rollout_cache": place / "heldout", "save_first": shown})
        return standing(place / "heldout", base, self.stages.of["scores"]["reward_fn"])

    def _of_rollouts(self, folder: Path) -> dict[str, float]:
        return _means(rewards_of(read_rollouts(folder), self.stages.of["scores"]["reward_fn"]))

    def _stage(self, stage: str, command: str, own: Mapping[str, Any]) -> None:
        log.info("\n=== ltxv2 %s: %s", command, own.get("output_dir") or own["rl_rollout_cache"])
        code = self.run(command, self.stages.words(stage, own))
        if code:
            raise StageFailed(f"ltxv2 {command}", code)

    def _earlier(self) -> list[dict[str, Any]]:
        path = self.options.output_dir / ROUNDS
        if not path.is_file():
            return []
        facts = _read(path)
        if facts is None:
            raise UserError(f"{path}: was written by another version, which counts gains otherwise. Give another --output_dir.")
        if facts["settings"] != self._settings():
            raise UserError(
                f"{path}: holds rounds of other settings (--rl_config, prompts or held-out seeds). Give another --output_dir, or go on "
                "with those that it was begun with."
            )
        return list(facts["rounds"])

    def _check_new(self) -> None:
        """
        Raises:
            UserError: what the rounds will write lies there, and is not theirs.
        """
        for name in (f"{self.options.output_name}.safetensors", PAGE):
            if (path := self.options.output_dir / name).exists():
                raise UserError(f"{path}: is there already, and no {ROUNDS} beside it. Give another --output_dir, or move the file.")

    def _keep(self, rows: Sequence[Mapping[str, Any]]) -> None:
        best = best_of(rows)
        if best is not None:
            policy = self._policy(best)
            assert policy is not None
            if not policy.is_file():
                raise UserError(f"{policy}: not found. It is the LoRA of the best round: put it back, and run the same command again.")
            write_bytes(self.options.output_dir / policy.name, policy.read_bytes())
        facts = {"format": _FORMAT, "settings": self._settings(), "best": best, "rounds": list(rows)}
        write_bytes(self.options.output_dir / ROUNDS, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
        self._show(rows)

    def _control(self) -> list[dict[str, Any]]:
        """Rounds of the control."""
        folder = self.options.rl_control
        if folder is None:
            return []
        facts = _read(folder / ROUNDS) if (folder / ROUNDS).is_file() else None
        if facts is None:
            raise UserError(f"--rl_control {folder}: holds no rounds. Give the --output_dir of rounds with rl_shuffle_advantages.")
        ours, theirs = ([one["stages"]["scores"], *(one[name] for name in _JUDGED)] for one in (self._settings(), facts["settings"]))
        if ours[1:] != theirs[1:]:
            raise UserError(f"--rl_control {folder}: was judged on other held-out prompts or seeds. Make it with those of these rounds.")
        if any(ours[0].get(name) != theirs[0].get(name) for name in ("reward_fn", "reward_args")):
            raise UserError(f"--rl_control {folder}: was judged by other rewards. Make it with those of these rounds.")
        if not facts["settings"]["stages"]["training"].get("rl_shuffle_advantages"):
            raise UserError(f"--rl_control {folder}: its advantages were not shuffled: put rl_shuffle_advantages = 1 into its [training].")
        return list(facts["rounds"])

    def _show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        folder = self.options.output_dir
        heldout = {0: folder / "before" / "heldout"}
        heldout |= {row["round"] + 1: folder / f"round_{row['round']:03d}" / "heldout" for row in rows if row["round"] is not None}
        reward_fn = self.stages.of["scores"]["reward_fn"]
        write_page(folder / PAGE, rows, self._control(), heldout=heldout, best=best_of(rows), reward_fn=reward_fn)

    def _settings(self) -> dict[str, Any]:
        options = self.options
        return {
            "stages": {name: dict(table) for name, table in self.stages.of.items()},
            "prompts": read_text(options.rl_prompts, named="--rl_prompts"),
            "heldout_prompts": read_text(options.rl_heldout_prompts, named="--rl_heldout_prompts"),
            "heldout": [options.rl_heldout_group_size, options.rl_heldout_seed],
        }


def _read(path: Path) -> dict[str, Any] | None:
    """None where it is of another format.

    Raises:
        UserError: it is damaged.
    """
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        return None
    settings, rows = facts.get("settings"), facts.get("rounds")
    stages = settings.get("stages") if isinstance(settings, dict) and set(_JUDGED) < set(settings) else None
    sound = isinstance(stages, dict) and isinstance(stages.get("training"), dict) and isinstance(rows, list) and bool(rows)
    if not sound or not all(_is_row(row, number) for number, row in enumerate(rows)):
        raise UserError(f"{path}: is damaged. Put a copy of it back, or remove it and go on in another --output_dir.")
    return facts


def _is_row(row: Any, number: int) -> bool:
    """Of the base model (0), or of the round before `number`."""
    if not isinstance(row, dict) or row.get("round", "") != (number - 1 if number else None) or not isinstance(row.get("heldout"), dict):
        return False
    heldout = row["heldout"]
    rewards = heldout.get("rewards")
    numbers = [heldout.get(name) for name in ("gain", "error")] + (list(rewards.values()) if isinstance(rewards, dict) else [None])
    return all(isinstance(one, int | float) for one in numbers)


def standing(folder: Path, base: Path | None, reward_fn: str) -> Standing:
    """
    Args:
        base: held-out samples of the base model; None = these are.

    Raises:
        UserError: no sample has a score.
    """
    rollouts = read_rollouts(folder)
    before = rollouts if base is None else read_rollouts(base)
    units = units_of(before, reward_fn)
    totals, others = totals_of(rollouts, reward_fn, units), totals_of(before, reward_fn, units)
    if not totals:
        raise UserError(f"{folder}: no held-out sample has a score by all of {reward_fn}. Score another reward, or other prompts.")
    by_prompt: dict[int, list[float]] = {}
    for sample in rollouts.samples:
        if sample.name in totals and sample.name in others:
            by_prompt.setdefault(sample.prompt, []).append(totals[sample.name] - others[sample.name])
    gains = [statistics.fmean(values) for values in by_prompt.values()]
    if len(gains) == 1:
        log.warning("WARNING: %s: a single held-out prompt has scores, so the gain has no standard error. Give several.", folder)
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return Standing(statistics.fmean(gains), error, _means(rewards_of(rollouts, reward_fn)))


def _means(rewards: Sequence[Scored]) -> dict[str, float]:
    """Of each reward over its samples; without those that scored none."""
    known = {one.reward: [score for score in one.scores.values() if score is not None] for one in rewards}
    return {name: statistics.fmean(scores) for name, scores in known.items() if scores}


def _check_same_judge(folder: Path, base: Path, reward_fn: str) -> None:
    """
    Raises:
        UserError: samples were scored otherwise than those of the base model, so that no gain could be told.
    """
    for name in parse_rewards(reward_fn):
        new, first = read_scores(folder, name), read_scores(base, name)
        if new is None or first is None or (new.version, new.weight_files) != (first.version, first.weight_files):
            raise UserError(
                f"{scores_path(folder, name)}: scored by another '{name}' than {scores_path(base, name)}: its file or weights have changed "
                "since the rounds began. Put the earlier one back, or give another --output_dir."
            )


def _plain(one: Standing) -> dict[str, Any]:
    return {"gain": one.gain, "error": one.error, "rewards": dict(one.rewards)}


def _delete_samples(folder: Path) -> None:
    """Of a round's rollouts, latents and texts; what else lies there stays. Nothing where they are gone already."""
    if not (folder / ROLLOUTS).is_file():
        return
    rollouts = read_rollouts(folder)
    for texts in (folder / PROMPT_FOLDER, *folder.glob(f".{PROMPT_FOLDER}.*")):  # hidden: a run was killed while it removed them
        if not texts.is_symlink():
            remove_folder(texts)
    for sample in rollouts.samples:
        for name in (*(sidecar.file for sidecar in rollouts.clip_of(sample).sidecars.values()), f"{sample.name}{STEPS_ENDING}"):
            (folder / name).unlink(missing_ok=True)


def best_of(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The round with the highest held-out gain; None before any is done."""
    done = [row for row in rows if row["round"] is not None]
    return max(done, key=lambda row: row["heldout"]["gain"])["round"] if done else None
