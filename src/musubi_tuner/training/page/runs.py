"""What is in an output folder, for a page: records, losses, previews, LoRAs of its runs."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.networks.formats import CONNECTORS_ENDING
from musubi_tuner.page.fill import MEDIA_KINDS
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.checkpoint import lora_files, steps_of
from musubi_tuner.training.metrics import loss_path, read_losses
from musubi_tuner.training.page.record import ENDING, Record, read_record, record_path

PREVIEWS = "sample"
"""Their folder in that of the run."""
_LOSSES = "-loss.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewFile:
    """A preview, by its name."""

    path: Path
    step: int
    index: int
    """Of its prompt."""
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundRun:
    """A run, as far as its folder tells."""

    folder: Path
    name: str
    record: Record | None
    """None of runs of before there were any."""
    losses: Sequence[dict[str, float]]
    previews: Sequence[PreviewFile]
    loras: dict[int, str]
    """Names of the files by their steps."""

    @property
    def identity(self) -> str:
        """The same as long as it is the same run, wherever its folder is moved."""
        started = self.record.started if self.record else ""
        return hashlib.sha256(json.dumps([self.name, started]).encode()).hexdigest()[:16]


def find_runs(folder: Path) -> list[FoundRun]:
    """The runs of an output folder, by name.

    Raises:
        UserError: there is no such folder, or no run in it; a record that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give the --output_dir of a run.")
    endings = (ENDING, _LOSSES)
    names = {path.name.removesuffix(ending) for path in folder.iterdir() for ending in endings if path.name.endswith(ending)}
    aside = {name for name in names if re.fullmatch(r".*-loss-\d+", name)}
    if not (names := names - aside):
        raise UserError(
            f"{folder}: holds no run: neither {{output_name}}{ENDING} nor {{output_name}}{_LOSSES}. Give the --output_dir of one."
        )
    return [find_run(folder, name) for name in sorted(names)]


def find_run(folder: Path, name: str, record: Record | None = None) -> FoundRun:
    """
    Args:
        record: its record, where it need not be read.

    Raises:
        UserError: a file that cannot be read.
    """
    if record is None and record_path(folder, name).is_file():
        record = read_record(record_path(folder, name))
    losses = loss_path(folder, name)
    try:
        rows = read_losses(losses) if losses.is_file() else []
    except OSError as error:
        raise UserError(f"{losses}: cannot be read ({error.strerror}).") from error
    loras = [path for path in lora_files(folder, name) if not path.name.endswith(CONNECTORS_ENDING)]
    return FoundRun(
        folder=folder,
        name=name,
        record=record,
        losses=rows,
        previews=_previews(folder, name, record),
        loras={step: path.name for path in loras if (step := steps_of(path))},
    )


def _previews(folder: Path, name: str, record: Record | None) -> list[PreviewFile]:
    """Those of the run: an earlier one of its name may have left more steps, and other prompts."""
    known = {(prompt.index, prompt.seed) for prompt in record.prompts} if record else set()
    found = preview_files(folder, name)
    return [one for one in found if record is None or (one.step <= record.step and (not known or (one.index, one.seed) in known))]


def preview_files(folder: Path, name: str) -> list[PreviewFile]:
    """All that runs of the name have left in an output folder, and nothing of other names."""
    previews = folder / PREVIEWS
    pattern = re.compile(re.escape(name) + r"_s(\d{8})_(\d+)_(-?\d+)\.(\w+)")
    found = []
    for path in sorted(previews.iterdir()) if previews.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match is not None and path.suffix in MEDIA_KINDS:
            step, index, seed = (int(part) for part in match.groups()[:3])
            found.append(PreviewFile(path=path, step=step, index=index, seed=seed))
    return found
