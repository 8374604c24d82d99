"""Scores of a folder of rollouts, by the rewards that a run asks for."""

import math
from pathlib import Path

from musubi_tuner.reinforcement.advantages import Scored
from musubi_tuner.reinforcement.rollouts import SCORES
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json


def rewards_of(folder: Path, reward_fn: str) -> list[Scored]:
    """
    Args:
        reward_fn: `NAME:WEIGHT,...`; a weight that is left out is 1.

    Raises:
        UserError: what cannot be read so, or a reward that was not scored.
    """
    found = []
    for part in reward_fn.split(","):
        name, _, text = part.strip().partition(":")
        try:
            weight = float(text or 1)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise UserError(f"--reward_fn {part}: must be NAME:WEIGHT, such as loudness:0.5.")
        path = folder / SCORES / f"{name}.json"
        if not path.is_file():
            raise UserError(
                f"{path}: not found. Score it by: python ltxv2_score_rollouts.py --rl_rollout_cache {folder} --reward_fn {name}"
            )
        facts = read_json(path)
        found.append(Scored(reward=name, route=facts["route"], weight=weight, scores=facts["scores"]))
    return found
