"""What a run tells its page: `{output_name}-report.json`, written anew as the run goes on. Losses and previews have files of their own."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from musubi_tuner.runtime.disk import write_whole
from musubi_tuner.runtime.errors import UserError

ENDING = "-report.json"
MOST_POINTS = 600
"""Of the pace; beyond it neighbours become one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt of `--sample_prompts`."""

    index: int
    prompt: str
    negative: str
    seed: int
    fps: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipReceipt:
    """An item of a dataset, as it is trained on."""

    name: str
    caption: str
    seconds: float
    frames: int
    """1 for stills, 0 for sound alone."""
    size: str
    sound: bool
    start: float
    """Seconds of its source before it."""
    picture: str = ""
    """Path of its picture; none of caches of before there were any."""
    outline: list[int] = field(default_factory=list)
    """Of its sound: peaks of equal parts, in percent of full scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetReceipt:
    """What a run got out of a dataset."""

    label: str
    folder: str
    held_out: bool
    repeats: int
    clips: list[ClipReceipt]
    more: int
    """Clips that are not listed."""
    seconds: float
    """Of all clips, as the next ones; 0 of stills."""
    shortest: float | None = None
    """None in records of before, which knew these of the listed clips alone."""
    longest: float | None = None
    heard: int | None = None
    """Clips with sound."""
    sources: list[tuple[str, str, str]] = field(default_factory=list)
    """(source, `kept`, `trimmed`, `dropped` or `failed`, why): those of which there is something to say."""


@dataclass(kw_only=True, slots=True)
class Record:
    """One run."""

    ltxv2_report: Literal[1] = 1
    name: str
    program: str
    """Name and version."""
    started: str
    """ISO 8601, UTC; that of the first start where the run was resumed."""
    command: str
    device: str
    total: int
    step: int = 0
    state: Literal["training", "done", "interrupted"] = "training"
    settings: list[tuple[str, str, str]] = field(default_factory=list)
    """(flag, value, default)"""
    plan: list[tuple[str, str]] = field(default_factory=list)
    """Rows of the table before the first step."""
    predicted_bytes: int | None = None
    """Of the memory plan; None where there is none."""
    peak_bytes: int | None = None
    """Of the card; None where there is none."""
    prompts: list[Prompt] = field(default_factory=list)
    datasets: list[DatasetReceipt] = field(default_factory=list)
    pace: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, seconds since the start with all that lies between steps, seconds a step since the entry before)"""

    def add_pace(self, step: int, elapsed: float, seconds: float) -> None:
        """
        Args:
            elapsed: as in `pace`.
            seconds: a step.
        """
        self.pace.append((step, round(elapsed, 3), round(seconds, 5)))
        if len(self.pace) > MOST_POINTS:
            pairs = zip(self.pace[::2], self.pace[1::2], strict=False)
            odd = self.pace[-1:] if len(self.pace) % 2 else []
            self.pace = [(later[0], later[1], round((former[2] + later[2]) / 2, 5)) for former, later in pairs] + odd


_ADAPTER = TypeAdapter(Record)


def record_path(folder: Path, name: str) -> Path:
    return folder / f"{name}{ENDING}"


def write_record(folder: Path, record: Record) -> None:
    """
    Raises:
        OSError: it could not be written; the one of before is untouched.
    """
    path = record_path(folder, record.name)
    data = json.dumps(asdict(record), ensure_ascii=False).encode("utf-8", "backslashreplace")
    write_whole(path, data, path.with_name(f".{record.name}.{os.getpid()}{ENDING}.tmp"), lasting=False)


def read_record(path: Path) -> Record:
    """
    Raises:
        UserError: it cannot be read, or is of another version.
    """
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: is no record of a run: {where}: {first['msg']}. Remove it: the page is then made without it.") from error
