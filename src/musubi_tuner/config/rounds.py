"""Options of rounds of reinforcement learning, and the TOML that says what each stage is run with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, FileName, Seed, nearest, options
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_toml

STAGES = ("rollouts", "scores", "training")
_OURS = {
    "rollouts": ("rl_prompts", "rl_rollout_cache", "rl_policy", "rl_round"),
    "scores": ("rl_rollout_cache", "dry_run"),
    "training": ("rl_rollout_cache", "reward_fn", "network_weights", "output_dir", "output_name", "autoresume", "resume", "overwrite"),
}
"""Flags that the rounds give themselves."""


@options
class RoundOptions:
    """Rounds."""

    rl_config: AnyPath = flag(
        "TOML with the tables [rollouts], [scores] and [training]: flags of the three programs by their names without dashes", common=True
    )
    rl_prompts: AnyPath = flag("prompt file (.txt, .toml, .json or .jsonl) of the rollouts", common=True)
    rl_heldout_prompts: AnyPath = flag("prompt file on which each round is judged, with seeds that stay the same", common=True)
    output_dir: AnyPath = flag("folder of the rounds", default=Path("rl"), common=True)
    output_name: FileName = flag("name of the LoRA file", default="ltxv2_lora", common=True)
    rl_rounds: Annotated[int, Field(ge=1, le=1000)] = flag("rounds in all; the same command with more goes on", default=8, common=True)
    rl_heldout_group_size: Annotated[int, Field(ge=2, le=99)] = flag("samples of each held-out prompt", default=4)
    rl_heldout_seed: Seed = flag("of the held-out samples", default=1000)
    rl_page_samples: Annotated[int, Field(ge=0, le=99)] = flag("samples of each held-out prompt that the page shows", default=1)
    rl_control: AnyPath | None = flag(
        "folder of the same rounds with rl_shuffle_advantages = 1, which the page draws beside these", default=None
    )
    rl_delete_round_caches: bool = flag("remove a round's rollouts when it is done; scores and LoRAs stay", default=False)


@options
class RoundsConfig:
    """All sections."""

    rounds: RoundOptions


@dataclass(frozen=True, slots=True)
class StageFlags:
    """What each program is run with, as in the TOML."""

    of: Mapping[str, Mapping[str, Any]]

    def words(self, stage: str, own: Mapping[str, Any]) -> list[str]:
        """The flags of a stage as they are typed; `own` are those of the rounds themselves, None is left out."""
        found: list[str] = []
        for key, value in {**self.of[stage], **own}.items():
            if isinstance(value, bool):
                found.append(f"--{key}" if value else f"--no-{key}")
            elif isinstance(value, list):
                found += [f"--{key}", *map(str, value)]
            elif value is not None:
                found += [f"--{key}", str(value)]
        return found


def read_stages(path: Path) -> StageFlags:
    """
    Raises:
        UserError: an unknown table, a table that is missing, or a flag that the rounds give themselves.
    """
    tables = read_toml(path, named="--rl_config")
    for name, table in tables.items():
        if name not in STAGES or not isinstance(table, dict):
            raise UserError(f"{path}: '{name}' is no table of the rounds.{nearest(name, STAGES)} They are {', '.join(STAGES)}.")
        if own := [key for key in table if key in _OURS[name]]:
            raise UserError(f"{path}: [{name}] {own[0]}: is given by the rounds themselves; take it out.")
    if missing := [name for name in STAGES if name not in tables]:
        raise UserError(f"{path}: the table [{missing[0]}] is missing.")
    if not isinstance(tables["scores"].get("reward_fn"), str):
        raise UserError(f'{path}: [scores] reward_fn is missing: say what is rewarded, such as reward_fn = "loudness:1".')
    return StageFlags(tables)
