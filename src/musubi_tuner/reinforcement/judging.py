"""What scores are worth: their spread within and between groups, and, by scoring a group twice, whether it is more than noise."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from musubi_tuner.reinforcement.advantages import FLAT, Scored
from musubi_tuner.reinforcement.rollouts import Rollouts, Sample
from musubi_tuner.reinforcement.scores import Scores, rewards_of
from musubi_tuner.reinforcement.scoring import Scoring, score_once
from musubi_tuner.runtime.progress import Progress

_TRIED = 4
"""Groups, at most: prompts may have no score by a reward, such as those that quote no speech."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one reward."""

    mean: float
    within: float
    """Root mean variance of the groups: what is learned from."""
    between: float
    """Standard deviation of the groups' means."""
    nulls: int


def spread_of(scores: Scores | Scored, groups: Mapping[int, Sequence[str]]) -> Spread | None:
    """None where no sample has a score."""
    known = [[score for name in names if (score := scores.scores.get(name)) is not None] for names in groups.values()]
    known = [one for one in known if one]
    nulls = sum(scores.scores.get(name) is None for names in groups.values() for name in names)
    if not known:
        return None
    means = [statistics.fmean(one) for one in known]
    return Spread(
        mean=statistics.fmean(score for one in known for score in one),
        within=math.sqrt(statistics.fmean(statistics.pvariance(one) for one in known)),
        between=statistics.pstdev(means),
        nulls=nulls,
    )


def units_of(rollouts: Rollouts, reward_fn: str) -> dict[str, float]:
    """By reward, the spread within groups: what an advantage of 1 is. 1 of one that is flat there, whose scores then count as they are."""
    found = {one.reward: spread_of(one, rollouts.groups) for one in rewards_of(rollouts, reward_fn)}
    return {name: 1.0 if one is None or one.within < FLAT else one.within for name, one in found.items()}


@dataclass(frozen=True, slots=True)
class Trial:
    """One reward, one group, scored twice."""

    reward: str
    scored: int
    """Samples that have a score both times."""
    spread: float
    """Standard deviation within the group, of the means of both."""
    noise: float
    """Standard deviation of scoring the same sample again."""

    @property
    def tells_apart(self) -> bool:
        """Whether there is something to learn."""
        return self.spread > self.noise and self.spread >= FLAT


def try_rewards(scoring: Scoring) -> list[Trial]:
    """Decode and score a group twice, by each reward: the first one of which at least two samples have a score, among a few."""
    groups: dict[int, list[Sample]] = {}
    for sample in scoring.rollouts.samples:
        groups.setdefault(sample.prompt, []).append(sample)
    found = []
    with Progress("dry run", len(scoring.chosen), unit="reward") as bar:
        for one in scoring.chosen:
            first, samples = [], []
            for samples in list(groups.values())[:_TRIED]:
                first = score_once(one, samples, scoring)
                if sum(score is not None for score in first) > 1:
                    break
            both = zip(first, score_once(one, samples, scoring), strict=True)
            found.append(_trial(one.name, [(a, b) for a, b in both if a is not None and b is not None]))
            bar.advance()
    return found


def _trial(name: str, pairs: Sequence[tuple[float, float]]) -> Trial:
    if len(pairs) < 2:
        return Trial(name, len(pairs), 0.0, 0.0)
    spread = statistics.pstdev([(first + second) / 2 for first, second in pairs])
    noise = math.sqrt(statistics.fmean((first - second) ** 2 / 2 for first, second in pairs))
    return Trial(name, len(pairs), spread, noise)
