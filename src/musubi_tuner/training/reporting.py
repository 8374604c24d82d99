"""The run's page, kept while it trains: at previews, at saves and at the end. It reads what is there, and changes nothing of the run."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from glob import escape
from pathlib import Path

import torch

from musubi_tuner.cache.index import read_index
from musubi_tuner.cache.looks import LOOK_ENDINGS, look_path, read_outline
from musubi_tuner.cache.receipts import read_receipts
from musubi_tuner.cache.store import read_metadata
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.config.flags import VERSION, describe
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.dataset.items import Item
from musubi_tuner.runtime.disk import reason
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.facts import banner_rows
from musubi_tuner.training.hooks import Hook
from musubi_tuner.training.page.record import (
    ENDING,
    MOST_POINTS,
    ClipReceipt,
    DatasetReceipt,
    Prompt,
    Record,
    read_record,
    record_path,
    write_record,
)
from musubi_tuner.training.page.runs import find_run, find_runs
from musubi_tuner.training.page.write import PAGE, write_page
from musubi_tuner.training.preflight import RunInputs, preview_prompts
from musubi_tuner.training.run import Outcome, TrainingRun

log = logging.getLogger(__name__)

_MOST_CLIPS = 300
"""Of a dataset, that are listed."""
_MOST_SOURCES = 1000
"""Of a dataset, of which there is something to say."""
_STALE = 600
"""Seconds after which nobody writes a file any more."""
_PATIENCE = 50
"""How many times as long as it took to write the page lies between it and the next one."""


class Reporting(Hook):
    """Writes the record of a run and the page of its folder; where it cannot, a warning, once."""

    def __init__(self, run: TrainingRun, inputs: RunInputs, command: str) -> None:
        """
        Args:
            command: as it was typed.
        """
        self._run = run
        self._warned = False
        self._record: Record | None = None
        self._begun, self._next = time.monotonic(), 0.0
        self._every = max(1, run.schedule.total // MOST_POINTS)
        self._seconds: list[float] = []
        if run.processes.is_main:
            _remove_leftovers(run.output_dir, run.name)
            try:
                self._record = _record_of(run, inputs, command)
            except (OSError, UserError) as error:
                self._warn(error)
        self._before = self._record.pace[-1][1] if self._record and self._record.pace else 0.0

    def before_training(self, outcome: Outcome) -> None:
        self._write(outcome.step)

    def after_step(self, outcome: Outcome, seconds: float) -> None:
        record, step = self._record, outcome.step
        if record is None:
            return
        self._seconds.append(seconds)
        looked_at = self._run.schedule.is_looked_at(step)
        if looked_at or step % self._every == 0:
            record.add_pace(step, self._before + time.monotonic() - self._begun, sum(self._seconds) / len(self._seconds))
            self._seconds.clear()
        if looked_at and time.monotonic() >= self._next:
            self._write(step)

    @contextmanager
    def kept(self, outcome: Outcome) -> Iterator[None]:
        """Around the steps and their rescue: the page says how they ended, and shows what was saved last."""
        try:
            yield
        except Exception:
            self._end(outcome)
            raise
        self._end(outcome)

    def _end(self, outcome: Outcome) -> None:
        if self._record is not None:
            self._record.state = "done" if outcome.step == self._run.schedule.total else "interrupted"
        self._write(outcome.step)

    def _write(self, step: int) -> None:
        record, run = self._record, self._run
        if record is None:
            return
        started = time.monotonic()
        record.step = step
        if run.device.type == "cuda":
            record.peak_bytes = torch.cuda.max_memory_allocated(run.device)
        try:
            write_record(run.output_dir, record)
            others = [found for found in find_runs(run.output_dir) if found.name != run.name]
            found = sorted([*others, find_run(run.output_dir, run.name, record)], key=lambda one: one.name)
            write_page(run.output_dir / PAGE, found)
        except Exception as error:  # of the disk, and of files of other runs, which anyone may have changed
            self._warn(error)
        self._next = time.monotonic() + _PATIENCE * (time.monotonic() - started)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            log.warning("WARNING: %s: the run's page is not written (%s); training goes on", self._run.output_dir / PAGE, reason(error))
        self._warned = True


def _remove_leftovers(folder: Path, name: str) -> None:
    """What killed runs have begun to write; the page is of all runs of the folder, of which another one may be writing it now."""
    with suppress(OSError):
        pages = [path for path in folder.glob(f".{PAGE}.*.tmp") if time.time() - path.stat().st_mtime > _STALE]
        for path in [*pages, *folder.glob(f".{escape(name)}.[0-9]*{ENDING}.tmp")]:
            path.unlink(missing_ok=True)


def write_page_of(folder: Path) -> None:
    """The page of a folder as its files are; a warning where it cannot be written."""
    try:
        write_page(folder / PAGE, find_runs(folder))
    except (OSError, UserError) as error:
        log.warning("WARNING: %s: not written (%s)", folder / PAGE, reason(error))


def _record_of(run: TrainingRun, inputs: RunInputs, command: str) -> Record:
    """The record of a run that begins, or goes on with what it said of itself before."""
    record = Record(
        name=run.name,
        program=VERSION,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        device=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else str(run.device),
        total=run.schedule.total,
        step=run.start_step,
        settings=settings_of(run.config),
        plan=banner_rows(inputs, run),
        predicted_bytes=None if run.placement.plan is None else run.placement.plan.device_bytes,
        prompts=_prompts(run.config),
        datasets=[
            _receipt(spec, items, inputs.datasets.path, held_out=held_out)
            for specs, items, held_out in (
                (inputs.datasets.datasets, inputs.items, False),
                (inputs.datasets.validation_datasets, inputs.validation_items, True),
            )
            for spec in specs
        ],
    )
    earlier = record_path(run.output_dir, run.name)
    if run.start_step and earlier.is_file():
        try:
            before = read_record(earlier)
        except UserError as error:
            log.warning("WARNING: %s The page knows nothing of the time before.", error)
        else:
            record.started = before.started
            record.pace = [point for point in before.pace if point[0] <= run.start_step]
    return record


def settings_of(config: TrainingConfig) -> list[tuple[str, str, str]]:
    """(flag, value, default) of every setting, in the order of the help."""
    values = config.flat()
    return [
        (flag.name, dataclasses.replace(flag, default=values[flag.key]).default_text, flag.default_text)
        for flag in describe(TrainingConfig)
        if flag.key in values
    ]


def _prompts(config: TrainingConfig) -> list[Prompt]:
    prompts = preview_prompts(config)
    return [Prompt(index=one.index, prompt=one.prompt, negative=one.negative, seed=one.seed, fps=one.fps) for one in prompts]


def _receipt(spec: DatasetSpec, items: tuple[Item, ...], toml: Path, *, held_out: bool) -> DatasetReceipt:
    own = [item for item in items if item.spec.label == spec.label]
    seconds = [item.clip.seconds for item in own if item.clip.frames != 1]
    return DatasetReceipt(
        label=spec.label,
        folder=str(spec.root),
        held_out=held_out,
        repeats=spec.num_repeats,
        clips=[_clip_receipt(item) for item in own[:_MOST_CLIPS]],
        more=max(0, len(own) - _MOST_CLIPS),
        seconds=round(sum(seconds), 3),
        shortest=round(min(seconds, default=0.0), 3),
        longest=round(max(seconds, default=0.0), 3),
        heard=sum(item.has_sound for item in own),
        sources=_sources(spec, toml),
    )


def _sources(spec: DatasetSpec, toml: Path) -> list[tuple[str, str, str]]:
    """Those of which there is something to say."""
    receipts = read_receipts(spec)
    if receipts is None:  # of caches of before, or of other tools
        return [(source, "dropped", why) for source, why in read_index(spec, toml).dropped]
    return [(one.source, one.outcome, one.note) for one in receipts if one.note or one.outcome != "kept"][:_MOST_SOURCES]


def _clip_receipt(item: Item) -> ClipReceipt:
    clip = item.clip
    still = clip.frames == 1
    looks = {kind: look_path(item.paths[kind], kind) for kind in LOOK_ENDINGS if kind in item.paths}
    return ClipReceipt(
        name=clip.key,
        caption=read_metadata(item.paths["text"]).get("caption", ""),
        seconds=0.0 if still else round(clip.seconds, 3),
        frames=clip.frames,
        size=f"{clip.width}x{clip.height}" if clip.width else "",
        sound=item.has_sound,
        start=round(clip.start_seconds, 3),
        picture=str(looks["latents"].resolve()) if "latents" in looks and looks["latents"].is_file() else "",
        outline=read_outline(looks["audio"]) if "audio" in looks else [],
    )
