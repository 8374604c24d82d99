"""Trains a LoRA on scored rollouts: `accelerate launch ltxv2_train_rl.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from musubi_tuner.config.flags import Beneath, parse
from musubi_tuner.config.rl import RlTrainingConfig
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.runtime.program import run_program

PROG = "ltxv2_train_rl.py"
DESCRIPTION = "Train a LoRA on rollouts and their scores: reinforcement learning."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse(RlTrainingConfig, argv, prog=prog, description=DESCRIPTION, beneath=_of_rollouts)
    from musubi_tuner.ltxv2_train_network import run
    from musubi_tuner.reinforcement.learning import check_rollouts

    def check(found: TrainingConfig):  # noqa: ANN202 - as `run` wants it
        assert isinstance(found, RlTrainingConfig)
        return check_rollouts(found)

    return run(config, argv, prog, check)


def _of_rollouts(given: Mapping[str, Any]) -> Beneath | None:
    """What rollouts say of the run: their dataset, mode and timestep format; one pass, and no dropout between two predictions."""
    if not isinstance(folder := given.get("rl_rollout_cache"), str) or not folder:
        return None
    from musubi_tuner.reinforcement.rollouts import DATASET, ROLLOUTS, read_rollouts

    facts = read_rollouts(Path(folder)).facts
    values: dict[str, Any] = {
        "dataset_config": str(Path(folder) / DATASET),
        "ltx_mode": facts["mode"],
        "ltxv2_timestep_format": facts["timestep_format"],
        "network_args": ["rank_dropout=0"],
        "first_frame_conditioning_p": 1.0 if facts["first_frame"] else 0.0,
    }
    if not {"max_train_steps", "max_train_epochs"} & set(given):
        values["max_train_epochs"] = 1
    return Beneath(where=str(Path(folder) / ROLLOUTS), values=values)


if __name__ == "__main__":
    run_program(main)
