"""Samples groups of clips of each prompt as latents, for reinforcement learning: `ltxv2_cache_rollouts.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from musubi_tuner.config.flags import parse
from musubi_tuner.config.rollouts import RolloutConfig
from musubi_tuner.runtime.program import run_program

log = logging.getLogger(__name__)

PROG = "ltxv2_cache_rollouts.py"
DESCRIPTION = "Sample groups of clips of each prompt as latents, for reinforcement learning: rollouts."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse(RolloutConfig, argv, prog=prog, description=DESCRIPTION)
    from musubi_tuner.reinforcement.making import make_rollouts
    from musubi_tuner.runtime.processes import processes
    from musubi_tuner.runtime.tables import format_table

    with processes() as group:
        made = make_rollouts(config, group, prog)
        if group.is_main:
            facts = made.rollouts.facts
            beside = [one["name"] for one in facts["frozen"]]
            sound = ", with sound" if facts["mode"] == "av" else ""
            rows = [
                ("prompts", str(len(facts["prompts"]))),
                ("samples", f"{made.made} made, {made.kept} there already"),
                ("of each", f"{facts['width']}x{facts['height']}, {facts['frames']} frames{sound}"),
                ("by", " beside ".join([facts["policy"]["name"] if facts["policy"] else "the base model", *beside])),
                ("guidance", "on" if facts["sampling"]["guided"] else "off"),
                ("written", str(made.rollouts.folder)),
            ]
            log.info("\n%s", format_table(rows, ("rollouts", "")))
    return 0


if __name__ == "__main__":
    run_program(main)
