"""Scores of a folder of rollouts: `FOLDER/scores/REWARD.json`, one file a reward, and the words in which a run asks for rewards."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from musubi_tuner.cache.names import AUDIO_ENDING, LATENTS_ENDING
from musubi_tuner.cache.store import canonical, file_fingerprint, text_fingerprint, write_bytes
from musubi_tuner.reinforcement.advantages import Route, Scored
from musubi_tuner.reinforcement.rewards.base import NAME
from musubi_tuner.reinforcement.rollouts import SCORES, Rollouts
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json

FORMAT = 1
LARGEST = 1e30
"""Scores beyond it have no spread that a float holds."""
_LARGEST_WEIGHT = 1e6
_KEYS = {"arguments": dict, "weight_files": dict, "scores": dict, "errors": dict}


@dataclass(kw_only=True, slots=True)
class Scores:
    """What one reward says of the samples so far."""

    reward: str
    route: Route
    version: int
    arguments: Mapping[str, Any]
    weight_files: Mapping[str, str]
    """Hashes, by name, of what the scores depend on besides: weights, decoders, references, the user's own file."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """None = it has none, for the reason in `errors`."""
    errors: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of the latents that were scored; files made by hand may lack them."""

    def identity(self, without: Collection[str]) -> str:
        """Of two that score alike, the same.

        Args:
            without: arguments that no score depends on.
        """
        counting = {key: value for key, value in self.arguments.items() if key not in without}
        return canonical({"route": self.route, "version": self.version, "arguments": counting, "files": self.weight_files})

    def note(self, sample: str, fingerprint: str, score: float | None, reason: str = "") -> None:
        """Put a sample's score in, or why it has none."""
        self.scores[sample], self.fingerprints[sample] = score, fingerprint
        self.errors.pop(sample, None)
        if score is None:
            self.errors[sample] = reason

    def has(self, sample: str, fingerprint: str) -> bool:
        """Whether a sample has a score, by these latents."""
        return self.scores.get(sample) is not None and self.fingerprints.get(sample) == fingerprint

    def write(self, folder: Path, *, lasting: bool = True) -> Path:
        """Into a folder of rollouts."""
        facts = {
            "format": FORMAT, "reward": self.reward, "route": self.route, "version": self.version, "arguments": self.arguments,
            "weight_files": self.weight_files, "scores": self.scores, "errors": self.errors, "fingerprints": self.fingerprints,
        }  # fmt: skip
        path = scores_path(folder, self.reward)
        write_bytes(path, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode(), lasting=lasting)
        return path


def scores_path(folder: Path, reward: str) -> Path:
    """Of a reward whose name is known to be one."""
    return folder / SCORES / f"{reward}.json"


def read_scores(folder: Path, reward: str) -> Scores | None:
    """What was scored; None where nothing was.

    Raises:
        UserError: a file that is damaged, or of another version.
    """
    path = scores_path(folder, reward)
    if not path.exists():
        return None
    facts = read_json(path)
    again = f"Remove it and score again: {_command(folder, reward)}"
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{path}: its format is not {FORMAT}, the one that this version reads. {again}")
    if facts.get("reward") != reward:
        raise UserError(f"{path}: 'reward' = {facts.get('reward')!r}: must be '{reward}', as the file is called. {again}")
    if facts.get("route") not in get_args(Route):
        raise UserError(f"{path}: 'route' = {facts.get('route')!r}: must be one of {', '.join(get_args(Route))}. {again}")
    known: dict[str, Any] = {"version": 1, "fingerprints": {}} | facts
    for key, kind in (_KEYS | {"version": int, "fingerprints": dict}).items():
        if not isinstance(known.get(key), kind):
            raise UserError(
                f"{path}: '{key}' = {known.get(key)!r:.60}: must be {'a whole number' if kind is int else 'an object'}. {again}"
            )
    for name, score in known["scores"].items():
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or abs(score) > LARGEST):
            raise UserError(f"{path}: 'scores': {name} = {score!r:.60}: must be a number of at most {LARGEST:g}, or null. {again}")
    for key in ("errors", "fingerprints", "weight_files"):
        for name, text in known[key].items():
            if not isinstance(text, str):
                raise UserError(f"{path}: '{key}': {name} = {text!r:.60}: must be text. {again}")
    names = ("reward", "route", "version", "arguments", "weight_files", "errors", "fingerprints")
    scores = {name: None if score is None else float(score) for name, score in known["scores"].items()}
    return Scores(**{name: known[name] for name in names}, scores=scores)


def rewards_of(rollouts: Rollouts, reward_fn: str) -> list[Scored]:
    """What a run learns from.

    Args:
        reward_fn: as `parse_rewards` takes it.

    Raises:
        UserError: a reward that was not scored, or whose scores are of other samples than are there.
    """
    found, names = [], {one.name for one in rollouts.samples}
    for name, weight in parse_rewards(reward_fn).items():
        path, scores = scores_path(rollouts.folder, name), read_scores(rollouts.folder, name)
        if scores is None:
            raise UserError(f"{path}: not found. Score it by: {_command(rollouts.folder, name)}")
        for sample in scores.scores:
            if sample not in names:
                raise UserError(f"{path}: 'scores': {sample}: there is no such sample. Score again: {_command(rollouts.folder, name)}")
        for sample, fingerprint in scores.fingerprints.items():
            if sample in names and latents_fingerprint(rollouts, sample) != fingerprint:
                raise UserError(
                    f"{path}: 'fingerprints': {sample}: its latents are no longer those that were scored. Score again: "
                    f"{_command(rollouts.folder, name)}"
                )
        found.append(Scored(reward=name, route=scores.route, weight=weight, scores=scores.scores))
    return found


def parse_rewards(reward_fn: str) -> dict[str, float]:
    """`NAME:WEIGHT,...` -> weights by name; a weight that is left out is 1.

    Raises:
        UserError: what cannot be read so.
    """
    found: dict[str, float] = {}
    for part in reward_fn.split(","):
        name, colon, text = (one.strip() for one in part.partition(":"))
        try:
            weight = float(text) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not NAME.fullmatch(name) or not abs(weight) <= _LARGEST_WEIGHT:
            raise UserError(
                f"--reward_fn {part.strip() or reward_fn}: must be NAME:WEIGHT, such as loudness:0.5; several by commas. A weight is at "
                f"most {_LARGEST_WEIGHT:,.0f}."
            )
        if name in found:
            raise UserError(f"--reward_fn {reward_fn}: '{name}' is given twice.")
        found[name] = weight
    return found


def latents_fingerprint(rollouts: Rollouts, sample: str) -> str:
    """Identity of all latents of a sample.

    Raises:
        UserError: they are not there.
    """
    endings = (LATENTS_ENDING, AUDIO_ENDING) if rollouts.facts["mode"] == "av" else (LATENTS_ENDING,)
    return text_fingerprint("|".join(file_fingerprint(rollouts.folder / f"{sample}{ending}") for ending in endings))


def _command(folder: Path, reward: str) -> str:
    return f"python ltxv2_score_rollouts.py --rl_rollout_cache {folder} --reward_fn {reward} ..."


def totals_of(rollouts: Rollouts, reward_fn: str, units: Mapping[str, float]) -> dict[str, float]:
    """Weighted sum of the rewards, of each sample that has them all.

    Args:
        units: by reward, what counts as 1: a loudness in decibels would drown a share of words otherwise.
    """
    rewards = rewards_of(rollouts, reward_fn)
    found = {}
    for sample in rollouts.samples:
        scores = [(one.weight / units[one.reward], one.scores.get(sample.name)) for one in rewards]
        if all(score is not None for _, score in scores):
            found[sample.name] = sum(weight * score for weight, score in scores if score is not None)
    return found
