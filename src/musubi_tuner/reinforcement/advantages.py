"""How much better than its group each sample is, for the video and for the sound: what a reward says becomes what is learned.

Per group (samples of one prompt) and reward: z = (r - mean) / (std + 1e-4), 0 for the whole group where its spread is below 1e-6 or any
score is missing. A stream's advantage is the weighted sum of the z of rewards that are routed to it (`sync` to both), clipped.
"""

import math
import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Route = Literal["video", "audio", "sync"]
STREAMS = ("video", "audio")
FLAT = 1e-6
"""A spread below this orders nothing."""
_EPSILON = 1e-4


def streams_of(route: Route) -> tuple[str, ...]:
    """Streams that learn from a reward."""
    return STREAMS if route == "sync" else (route,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What one reward says."""

    reward: str
    route: Route
    weight: float
    scores: Mapping[str, float | None]
    """By sample; None = it has none."""


@dataclass(frozen=True, slots=True)
class Flagged:
    """A group that a reward does not order."""

    group: int
    reward: str
    reason: str


@dataclass(frozen=True, slots=True)
class Advantages:
    """Of every sample."""

    of: Mapping[str, Mapping[str, float]]
    """{sample: {stream: advantage}}"""
    flagged: tuple[Flagged, ...]

    @property
    def learned(self) -> tuple[str, ...]:
        """Samples from which there is anything to learn."""
        return tuple(name for name, streams in self.of.items() if any(streams.values()))

    def within(self, streams: Collection[str]) -> "Advantages":
        """0 in all other streams."""
        of = {name: {stream: value if stream in streams else 0.0 for stream, value in one.items()} for name, one in self.of.items()}
        return replace(self, of=of)


def advantages(
    groups: Mapping[int, Sequence[str]],
    rewards: Sequence[Scored],
    *,
    clip: float = 5.0,
    over_all: bool = False,
    shuffled: int | None = None,
) -> Advantages:
    """
    Args:
        groups: samples by prompt.
        clip: the largest advantage.
        over_all: whether a stream's advantages are then normalized over all samples (GDPO).
        shuffled: seed by which each group's advantages are dealt out at random, as a control from which nothing can be learned.
    """
    found = {name: dict.fromkeys(STREAMS, 0.0) for names in groups.values() for name in names}
    flagged = []
    for group, names in groups.items():
        for scored in rewards:
            z, reason = _normalized([scored.scores.get(name) for name in names])
            if reason:
                flagged.append(Flagged(group, scored.reward, reason))
            for name, value in zip(names, z, strict=True):
                for stream in streams_of(scored.route):
                    found[name][stream] += scored.weight * value
    if over_all:
        _normalize_over_all(found, groups)
    for streams in found.values():
        streams.update({stream: max(-clip, min(clip, value)) for stream, value in streams.items()})
    if shuffled is not None:
        for group, names in groups.items():
            dealt = [found[name] for name in names]
            random.Random(f"{shuffled}|{group}").shuffle(dealt)
            found.update(zip(names, dealt, strict=True))
    return Advantages(found, tuple(flagged))


def group_softmax(groups: Mapping[int, Sequence[str]], found: Advantages, temperature: float) -> dict[str, dict[str, float]]:
    """{sample: {stream: weight}}: softmax of advantage / temperature within the group, times its size, so that weights are 1 on average; 0
    of a stream that no reward orders, which would be taught its own samples otherwise."""
    weights: dict[str, dict[str, float]] = {name: {} for names in groups.values() for name in names}
    for names in groups.values():
        for stream in STREAMS:
            values = [found.of[name][stream] / temperature for name in names]
            powers = [math.exp(value - max(values)) for value in values]
            for name, power in zip(names, powers, strict=True):
                weights[name][stream] = len(names) * power / sum(powers) if any(values) else 0.0
    return weights


def _normalized(scores: Sequence[float | None]) -> tuple[list[float], str]:
    """z of a group; all 0, with the reason, where there is nothing to compare."""
    known = [score for score in scores if score is not None]
    flat = [0.0] * len(scores)
    if len(known) < len(scores):
        return flat, f"{len(scores) - len(known)} of {len(scores)} samples have no score"
    spread = statistics.pstdev(known)
    if spread < FLAT:
        return flat, "all samples have the same score"
    mean = statistics.fmean(known)
    return [(score - mean) / (spread + _EPSILON) for score in known], ""


def _normalize_over_all(found: Mapping[str, dict[str, float]], groups: Mapping[int, Sequence[str]]) -> None:
    """But for groups that nothing orders: their 0 says that nothing is learned from them, which no mean may change."""
    for stream in STREAMS:
        values = [streams[stream] for streams in found.values()]
        mean, spread = statistics.fmean(values), statistics.pstdev(values)
        ordered = [names for names in groups.values() if any(found[name][stream] for name in names)]
        if spread >= FLAT:
            for name in (name for names in ordered for name in names):
                found[name][stream] = (found[name][stream] - mean) / (spread + _EPSILON)
