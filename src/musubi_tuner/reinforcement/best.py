"""The best samples of each prompt as a cached dataset of their own, for supervised training: best of n."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.store import write_bytes
from musubi_tuner.reinforcement.advantages import Flagged, Scored, advantages
from musubi_tuner.reinforcement.rollouts import DATASET, Rollouts
from musubi_tuner.runtime.disk import check_folder, not_written, write_folder
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, slots=True)
class Best:
    """What was written."""

    folder: Path
    samples: tuple[str, ...]
    """Group by group, the best first."""
    flagged: tuple[Flagged, ...]
    """Groups that a reward does not order; where none does, they are left out."""


def best_samples(groups: Mapping[int, Sequence[str]], rewards: Sequence[Scored], count: int) -> tuple[tuple[str, ...], tuple[Flagged, ...]]:
    """Names of the `count` best of each group, by the weighted sum of what each reward says within the group, whatever its route."""
    found = advantages(groups, [dataclasses.replace(one, route="video") for one in rewards], clip=math.inf)
    values = {name: streams["video"] for name, streams in found.of.items()}
    chosen = [
        name
        for names in groups.values()
        if any(values[name] for name in names)
        for name in sorted(names, key=lambda name: (-values[name], name))[:count]
    ]
    return tuple(chosen), found.flagged


def write_best(rollouts: Rollouts, rewards: Sequence[Scored], count: int, folder: Path) -> Best:
    """A dataset's TOML, its index and the cache files of the best samples, in `folder`; nothing in it leads back to the rollouts.

    Raises:
        UserError: the folder is there already, no group has an order, or it cannot be written.
    """
    check_new(folder)
    names, flagged = best_samples(rollouts.groups, rewards, count)
    if not names:
        raise UserError(
            f"--best_directory {folder}: in no group do the rewards tell samples apart, so none is the best. Score another reward, or make "
            "larger groups."
        )
    samples = {one.name: one for one in rollouts.samples}
    kept = [dataclasses.asdict(samples[name]) for name in names]

    def write(into: Path) -> None:
        best = Rollouts(into, {**rollouts.facts, "samples": kept})
        for file in sorted({sidecar.file for one in best.samples for sidecar in best.clip_of(one).sidecars.values()}):
            write_bytes(into / file, (rollouts.folder / file).read_bytes())
        best.write_dataset()

    try:
        write_folder(folder, folder.with_name(f".{folder.name}.{os.getpid()}.tmp"), write)
    except OSError as error:
        raise not_written(folder, error) from error
    assert (folder / DATASET).is_file()
    return Best(folder, names, flagged)


def check_new(folder: Path) -> None:
    """
    Raises:
        UserError: it holds something, or cannot be made.
    """
    if folder.name in ("", ".."):
        raise UserError(f"--best_directory {folder}: give the name of a new folder.")
    check_folder(folder, f"--best_directory {folder}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--best_directory {folder}: is there already. Give another one, or remove it.")
