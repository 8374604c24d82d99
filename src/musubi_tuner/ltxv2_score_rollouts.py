"""Scores rollouts by rewards: `ltxv2_score_rollouts.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from musubi_tuner.config.flags import parse
from musubi_tuner.config.scoring import ScoringConfig
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import run_program

if TYPE_CHECKING:
    from musubi_tuner.reinforcement.rollouts import Rollouts
    from musubi_tuner.reinforcement.scoring import Scored, Scoring

log = logging.getLogger(__name__)

PROG = "ltxv2_score_rollouts.py"
DESCRIPTION = "Score rollouts by rewards, for reinforcement learning: what is heard, seen, or said by a model of yours."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse(ScoringConfig, argv, prog=prog, description=DESCRIPTION)
    from musubi_tuner.reinforcement.best import check_new
    from musubi_tuner.reinforcement.decoding import Decoders
    from musubi_tuner.reinforcement.page.samples import write_samples_page
    from musubi_tuner.reinforcement.scoring import prepare, score_all
    from musubi_tuner.reinforcement.shown import save_first, save_media

    if config.run.best_directory is not None:
        check_new(config.run.best_directory)
    scoring = prepare(config)
    if config.run.dry_run:
        return _try(scoring, force=config.run.force)
    decoders: Decoders = scoring.decoders
    if config.run.save_media or config.run.save_first:
        decoders.check(scoring.rollouts, {"video", "audio"} if scoring.rollouts.facts["mode"] == "av" else {"video"})
    scored = score_all(scoring)
    _show(scored, scoring)
    if config.run.save_media:
        for one in scored:
            log.info("media of %s: %s", one.scores.reward, save_media(one.scores, scoring.rollouts, decoders, config.run.save_media))
    if config.run.save_first:
        first = save_first(scoring.rollouts, decoders, config.run.save_first)
        log.info("first samples of each prompt: %s", write_samples_page(scoring.rollouts, first, [one.scores for one in scored]))
    if config.run.best_directory is not None:
        _keep_best(scoring.rollouts, config)
    return 0


def _keep_best(rollouts: Rollouts, config: ScoringConfig) -> None:
    from musubi_tuner.reinforcement.best import write_best
    from musubi_tuner.reinforcement.scores import rewards_of

    folder, count = config.run.best_directory, config.run.best_count
    assert folder is not None
    best = write_best(rollouts, rewards_of(rollouts, config.rewards.reward_fn), count, folder)
    for one in best.flagged:
        log.warning("WARNING: prompt %d: '%s' does not order its samples: %s", one.group, one.reward, one.reason)
    log.info("best: %d of %d samples: %s", len(best.samples), len(rollouts.samples), folder / "dataset.toml")


def _show(scored: Sequence[Scored], scoring: Scoring) -> None:
    from musubi_tuner.reinforcement.judging import spread_of
    from musubi_tuner.runtime.tables import format_table

    rows = []
    for one in scored:
        found = spread_of(one.scores, scoring.rollouts.groups)
        known = ("-", "-", "-", str(len(scoring.rollouts.samples))) if found is None else (
            f"{found.mean:.4g}", f"{found.within:.3g}", f"{found.between:.3g}", str(found.nulls)
        )  # fmt: skip
        rows.append((one.scores.reward, one.scores.route, *known, f"{one.made} of {len(one.scores.scores)}"))
    headers = ("reward", "route", "mean", "spread within groups", "between", "without score", "scored now")
    log.info("\n%s\n\nwritten: %s", format_table(rows, headers), scoring.rollouts.folder / "scores")


def _try(scoring: Scoring, *, force: bool) -> int:
    from musubi_tuner.reinforcement.judging import try_rewards
    from musubi_tuner.runtime.tables import format_table

    trials = try_rewards(scoring)
    rows = [(one.reward, one.scored, f"{one.spread:.3g}", f"{one.noise:.3g}", "yes" if one.tells_apart else "no") for one in trials]
    log.info("\n%s", format_table(rows, ("reward", "samples", "spread within the group", "noise of scoring", "more than noise")))
    if flat := [one.reward for one in trials if not one.tells_apart]:
        text = f"{', '.join(flat)}: samples of a group do not differ by more than scoring itself does, so there is nothing to learn"
        if not force:
            raise UserError(f"{text}. Take another reward or other arguments, make more varied rollouts, or give --force.")
        log.warning("WARNING: %s", text)
    return 0


if __name__ == "__main__":
    run_program(main)
