"""Scores of rollouts: rewards in turn, samples in turn, and what is there already is kept.

Rewards without weights share one pass over the samples; a reward with a model has a pass of its own, in which it is the only one on the
device. Each score is written when it is known, so a run that was stopped goes on where it was.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from musubi_tuner.config.scoring import ScoringConfig
from musubi_tuner.reinforcement.decoding import Decoders, decoding
from musubi_tuner.reinforcement.rewards.base import NoScore, Reward, RewardSample, Score, scores_groups
from musubi_tuner.reinforcement.rewards.catalog import Chosen, choose
from musubi_tuner.reinforcement.rollouts import SCORES, Rollouts, Sample, read_rollouts
from musubi_tuner.reinforcement.scores import LARGEST, Scores, latents_fingerprint, parse_rewards, read_scores
from musubi_tuner.runtime.device import free_memory, pick_device
from musubi_tuner.runtime.disk import check_folder, check_writable
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.lock import held
from musubi_tuner.runtime.progress import Progress
from musubi_tuner.runtime.servers import shortened
from musubi_tuner.runtime.tables import names_of

log = logging.getLogger(__name__)

_LOCK = ".scoring.lock"


@dataclass(frozen=True, slots=True)
class Scoring:
    """What is asked for, checked."""

    rollouts: Rollouts
    chosen: tuple[Chosen, ...]
    decoders: Decoders


@dataclass(frozen=True, slots=True)
class Scored:
    """For the last table."""

    scores: Scores
    made: int


def prepare(config: ScoringConfig) -> Scoring:
    """Everything that can fail before anything is decoded.

    Raises:
        UserError: no rollouts, or some are missing; rewards or arguments that are none; what they need is not there.
    """
    rollouts = read_rollouts(config.rewards.rl_rollout_cache)
    rollouts.check_whole(steps=False)
    chosen = choose(list(parse_rewards(config.rewards.reward_fn)), config.rewards.reward_args, config.rewards.reward_plugins)
    check_folder(rollouts.folder / SCORES, f"--rl_rollout_cache {rollouts.folder}")
    device = pick_device(config.decoding.device)
    decoders = Decoders(vae=config.decoding.vae, audio_vae=config.decoding.audio_vae, device=device)
    for one in chosen:
        hears = "audio" in one.needs or one.kind.route in ("audio", "sync")
        if hears and rollouts.facts["mode"] != "av":
            raise UserError(f"--reward_fn {one.name}: is about sound, and the rollouts in {rollouts.folder} have none.")
        with one.blamed("to name its files"):
            reward = one.kind()
        one.files(reward)
    decoders.check(rollouts, {need for one in chosen for need in one.needs})
    return Scoring(rollouts, tuple(chosen), decoders)


def score_all(scoring: Scoring) -> list[Scored]:
    """Scores of all samples by all rewards, written.

    Raises:
        UserError: another run scores the same folder, a file of scores that is damaged, or whatever a reward raises.
    """
    rollouts = scoring.rollouts
    fingerprints = {one.name: latents_fingerprint(rollouts, one.name) for one in rollouts.samples}
    folder = rollouts.folder / SCORES
    folder.mkdir(exist_ok=True)
    check_writable(folder)
    found: dict[str, Scored] = {}
    with held(folder / _LOCK, what=f"the scores of {rollouts.folder}", remedy="Wait for it, or end it."):
        books = {one.name: _book(one, scoring, fingerprints) for one in scoring.chosen}
        for together in _passes(scoring.chosen):
            made = _score_pass(together, books, fingerprints, scoring)
            found |= {one.name: Scored(books[one.name], made[one.name]) for one in together}
    for name, scored in found.items():
        _tell(name, scored.scores)
    return [found[one.name] for one in scoring.chosen]


def score_once(one: Chosen, samples: Sequence[Sample], scoring: Scoring) -> list[float | None]:
    """Scores of a group, which is decoded for it; nothing is written."""
    with _alive([one], scoring) as alive, decoding(scoring.rollouts, one.needs, scoring.decoders) as decode:
        (reward,) = alive.values()
        if scores_groups(one.kind):
            given = _of_group(one, reward, [decode(sample) for sample in samples])
        else:
            given = [_of_sample(one, reward, decode(sample)) for sample in samples]
    return [number(score)[0] for score in given]


def number(score: Any) -> tuple[float | None, str]:
    """A score as it is kept: a finite number, or None with the reason."""
    if score is None or isinstance(score, NoScore):
        return None, "the reward has none for it" if score is None else shortened(score.reason).encode("utf-8", "replace").decode()
    value = float(score)
    if not math.isfinite(value):
        return None, f"the reward gave {value}, which is not finite"
    return (value, "") if abs(value) <= LARGEST else (None, f"the reward gave {value:g}; {LARGEST:g} is the most that is compared")


def _book(one: Chosen, scoring: Scoring, fingerprints: Mapping[str, str]) -> Scores:
    """The scores that are there already, as far as they are still those."""
    files = one.files(one.kind()) | scoring.decoders.hashes(one.needs)
    arguments = {key: value if _is_plain(value) else str(value) for key, value in one.arguments.items()}
    new = Scores(reward=one.name, route=one.kind.route, version=one.kind.version, arguments=arguments, weight_files=files)
    earlier = read_scores(scoring.rollouts.folder, one.name)
    if earlier is None:
        return new
    if earlier.identity(one.kind.indifferent) != new.identity(one.kind.indifferent):
        log.info("%s: scored again, as %s", one.name, _changed(earlier, new, one.kind.indifferent))
        return new
    earlier.arguments = new.arguments
    earlier.scores = {name: score for name, score in earlier.scores.items() if earlier.fingerprints.get(name) == fingerprints.get(name)}
    earlier.errors = {name: reason for name, reason in earlier.errors.items() if name in earlier.scores}
    earlier.fingerprints = {name: fingerprint for name, fingerprint in earlier.fingerprints.items() if name in earlier.scores}
    return earlier


def _is_plain(value: Any) -> bool:
    """Whether JSON holds it as it is: a default of one's own may be NaN, or anything."""
    is_number = isinstance(value, int | float) and math.isfinite(value) and abs(value) < 2**63
    return value is None or isinstance(value, str | bool) or is_number


def _changed(earlier: Scores, new: Scores, indifferent: Sequence[str]) -> str:
    """In words."""
    keys = [key for key in {**earlier.arguments, **new.arguments} if earlier.arguments.get(key) != new.arguments.get(key)]
    keys = [key for key in keys if key not in indifferent]
    if keys:
        return ", ".join(f"{key} was {earlier.arguments.get(key)} and is {new.arguments.get(key)}" for key in keys)
    return "the files that it reads have changed" if earlier.weight_files != new.weight_files else "the reward has changed"


def _passes(chosen: Sequence[Chosen]) -> list[list[Chosen]]:
    """Rewards without weights together, every other one alone."""
    shared = [one for one in chosen if not one.kind.has_model and not scores_groups(one.kind)]
    return [*([shared] if shared else []), *([one] for one in chosen if one not in shared)]


def _score_pass(
    together: Sequence[Chosen], books: Mapping[str, Scores], fingerprints: Mapping[str, str], scoring: Scoring
) -> dict[str, int]:
    """How many samples each reward has scored now."""
    rollouts, made = scoring.rollouts, {one.name: 0 for one in together}
    todo = {one.name: {name for name in fingerprints if not books[one.name].has(name, fingerprints[name])} for one in together}
    if scores_groups(together[0].kind):
        groups = {sample.prompt for sample in rollouts.samples if sample.name in todo[together[0].name]}
        todo[together[0].name] = {sample.name for sample in rollouts.samples if sample.prompt in groups}
    lacking = [one for one in together if todo[one.name]]
    samples = [sample for sample in rollouts.samples if any(sample.name in todo[one.name] for one in lacking)]
    if not samples:
        return made
    needs, asked = {need for one in lacking for need in one.needs}, {one.name: one for one in lacking}
    title = f"scores: {', '.join(one.name for one in lacking)}"
    with (
        _alive(lacking, scoring) as alive,
        decoding(rollouts, needs, scoring.decoders) as decode,
        Progress(title, len(samples), unit="sample") as bar,
    ):

        def note(name: str, sample: Sample, score: Score) -> None:
            value, reason = number(score)
            books[name].note(sample.name, fingerprints[sample.name], value, reason)
            made[name] += 1

        if scores_groups(lacking[0].kind):
            (name,) = alive
            for group in {sample.prompt: 0 for sample in samples}:
                members = [sample for sample in samples if sample.prompt == group]
                for sample, score in zip(members, _of_group(asked[name], alive[name], [decode(one) for one in members]), strict=True):
                    note(name, sample, score)
                books[name].write(rollouts.folder, lasting=False)
                bar.advance(len(members))
        else:
            for sample in samples:
                decoded = decode(sample)
                for name in [name for name in alive if sample.name in todo[name]]:
                    given = decoded if asked[name].plugin is None else _copy(decoded)  # which it may change for those after it
                    note(name, sample, _of_sample(asked[name], alive[name], given))
                    books[name].write(rollouts.folder, lasting=False)
                del decoded, given  # before the next one is made
                bar.advance()
    for one in lacking:
        books[one.name].write(rollouts.folder)
    return made


@contextmanager
def _alive(together: Sequence[Chosen], scoring: Scoring) -> Iterator[dict[str, Reward]]:
    """Rewards, set up, for as long as the context lasts."""
    device, found = scoring.decoders.device, {}
    try:
        for one in together:
            with one.blamed("to set itself up"):
                found[one.name] = one.kind()
                found[one.name].setup(device, **one.arguments)
        with torch.inference_mode():
            yield found
    finally:
        with ExitStack() as each:
            for one in together:
                if one.name in found:
                    each.enter_context(one.blamed("to tear itself down"))
                    each.callback(found.pop(one.name).teardown)
        free_memory(device)


def _copy(sample: RewardSample) -> RewardSample:
    """With tensors of its own."""
    frames, sound, latents = sample.decoded_frames, sample.decoded_sound, sample.cached_latents
    return replace(
        sample,
        decoded_frames=None if frames is None else frames.clone(),
        decoded_sound=None if sound is None else replace(sound, samples=sound.samples.clone()),
        cached_latents=None if latents is None else {name: tensor.clone() for name, tensor in latents.items()},
    )


def _of_sample(one: Chosen, reward: Reward, decoded: RewardSample) -> Score:
    with one.blamed(f"to score {decoded.name}"):
        given = reward.score([decoded])
        scores = _as_list(given)
    if scores is None or len(scores) != 1:
        raise UserError(f"reward '{one.name}': `score` was given 1 sample and returned {given!r:.100}: must be a list of one score.")
    return _scored(one.name, scores[0])


def _of_group(one: Chosen, reward: Reward, group: Sequence[RewardSample]) -> Sequence[Score]:
    with one.blamed(f"to score the group of {group[0].name}"):
        given = reward.score_groups([group])
        groups = [_as_list(scores) for scores in _as_list(given) or ()]
    if len(groups) != 1 or groups[0] is None or len(groups[0]) != len(group):
        raise UserError(
            f"reward '{one.name}': `score_groups` was given one group of {len(group)} samples and returned {given!r:.100}: must be a list "
            "of one list of as many scores."
        )
    return [_scored(one.name, score) for score in groups[0]]


def _as_list(given: Any) -> list[Any] | None:
    """Of a list, an array or a tensor; None of anything else."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes | dict) else None


def _scored(name: str, score: Any) -> Score:
    """
    Raises:
        UserError: it is none.
    """
    if score is None or isinstance(score, NoScore):
        return score
    try:
        return float(score)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last of tensors without one real value
        shown = "a whole number beyond any float" if isinstance(error, OverflowError) else f"{score!r:.100}"
        raise UserError(f"reward '{name}': gave {shown} as a score: must be a number, None, or NoScore(reason).") from error


def _tell(name: str, scores: Scores) -> None:
    """Of samples without a score, by reason."""
    by_reason: dict[str, list[str]] = {}
    for sample, reason in scores.errors.items():
        by_reason.setdefault(reason, []).append(sample)
    for reason, samples in by_reason.items():
        log.warning("WARNING: %s: %d samples have no score, and nothing is learned from their groups: %s (%s)", name, len(samples), reason,
                    names_of(samples, 5))  # fmt: skip
