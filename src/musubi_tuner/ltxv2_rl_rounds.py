"""Reinforcement learning in rounds: rollouts, scores, update, judged on held-out prompts: `ltxv2_rl_rounds.py`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from musubi_tuner.config.flags import parse
from musubi_tuner.config.rounds import RoundsConfig, read_stages
from musubi_tuner.runtime.children import run_command
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import run_program

log = logging.getLogger(__name__)

PROG = "ltxv2_rl_rounds.py"
DESCRIPTION = "Rollouts, scores and updates in rounds, each judged on held-out prompts."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse(RoundsConfig, argv, prog=prog, description=DESCRIPTION)
    options = config.rounds
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "rounds start the three programs themselves, each on one GPU: run ltxv2_rl_rounds.py without accelerate launch. On several "
            "GPUs make one round after the other by hand: ltxv2_cache_rollouts.py and ltxv2_train_rl.py take accelerate launch."
        )
    stages = read_stages(options.rl_config)
    from musubi_tuner.reinforcement.page.write import PAGE
    from musubi_tuner.reinforcement.rounds import Rounds, StageFailed, best_of
    from musubi_tuner.runtime.lock import held
    from musubi_tuner.runtime.tables import format_table

    options.output_dir.mkdir(parents=True, exist_ok=True)
    with held(options.output_dir / "rounds.lock", what=f"rounds in {options.output_dir}", remedy="Wait for its end."):
        try:
            rows = Rounds(options=options, stages=stages, run=run_command).go()
        except StageFailed as failed:
            log.error("%s: the message is above; the same command goes on from there", failed)
            return failed.code
    best = best_of(rows)
    shown = []
    for row in rows:
        standing = row["heldout"]
        name = "base model" if row["round"] is None else f"round {row['round']}{' (best)' if row['round'] == best else ''}"
        gain = "" if row["round"] is None else f"{standing['gain']:+.4f} ± {standing['error']:.4f}"
        shown.append((name, gain, *(f"{value:.4g}" for value in standing["rewards"].values())))
    log.info("\n%s", format_table(shown, ("held-out prompts", "gain", *rows[0]["heldout"]["rewards"])))
    log.info("gain: in units of the base model's spread within a prompt, each reward by its weight")
    leading = next(row["heldout"] for row in rows if row["round"] == best)
    if leading["gain"] <= leading["error"]:
        log.warning("WARNING: no round is above the base model by more than its standard error: nothing is shown to be learned yet")
    log.info("written: %s", options.output_dir / f"{options.output_name}.safetensors")
    log.info("to look at: %s", options.output_dir / PAGE)
    return 0


if __name__ == "__main__":
    run_program(main)
