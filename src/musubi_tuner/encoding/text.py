"""Caching captions and sample prompts: identical texts are encoded once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from musubi_tuner.cache import keys, store
from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.expected import TEXT_KEYS
from musubi_tuner.cache.fingerprint import text_fingerprint
from musubi_tuner.cache.names import PROMPT_FOLDER, prompt_path, text_name
from musubi_tuner.config.dataset import DatasetConfig
from musubi_tuner.config.sources import list_all_sources
from musubi_tuner.ltxv2.text.pipeline import TextPipeline
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.runtime.tables import format_table

STORED_DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class TextJob:
    """One file to make."""

    target: Path
    text: str
    metadata: Mapping[str, str]


@dataclass(slots=True)
class TextReport:
    """Counts and rows; those of several processes add up."""

    kept: int = 0
    encoded: int = 0
    rebuilt: list[tuple[str, str]] = field(default_factory=list)
    """(file, reason) of files that were there and had to be made anew."""

    def table(self) -> str:
        rows = [("kept", self.kept), ("encoded", self.encoded), ("of these rebuilt", len(self.rebuilt))]
        text = format_table(rows, ("text caching", "files"))
        return text + ("\n\n" + format_table(self.rebuilt[:40], ("rebuilt", "because")) if self.rebuilt else "")


@dataclass(slots=True)
class _Waiting:
    """All files of one text."""

    text: str
    jobs: list[TextJob] = field(default_factory=list)


def list_text_jobs(config: DatasetConfig, prompts: Sequence[str], common: Mapping[str, str]) -> list[TextJob]:
    """A file for each caption of every dataset, and for each sample prompt.

    Args:
        prompts: texts of the sample prompts; the empty prompt is always added.
        common: metadata that all files share.

    Raises:
        UserError: missing captions, or two captions that want the same file.
    """
    jobs: dict[Path, TextJob] = {}
    for spec, sources in zip(config.all, list_all_sources(config.all), strict=True):
        for source in sources:
            target = spec.cache_directory / text_name(source.stem)
            job = TextJob(target=target, text=source.caption, metadata=_metadata(common, source.caption, source.name))
            other = jobs.setdefault(target, job)
            if other.text != job.text:
                raise UserError(
                    f"[[{spec.label}]]: '{source.name}' has another caption than the source of the same stem in an earlier "
                    "dataset, and both "
                    f"would be cached in {target}. Give one of the datasets a cache_directory of its own."
                )
    first = config.datasets[0].cache_directory
    for prompt in dict.fromkeys([*prompts, ""]):
        target = prompt_path(first, prompt)
        jobs[target] = TextJob(target=target, text=prompt, metadata=_metadata(common, prompt, PROMPT_FOLDER))
    return list(jobs.values())


def _metadata(common: Mapping[str, str], text: str, source: str) -> dict[str, str]:
    return {**common, "kind": "text", "source": source, "source_fingerprint": text_fingerprint(text), "caption": text}


def choose_text_jobs(jobs: Sequence[TextJob], *, skip_existing: bool) -> tuple[list[TextJob], TextReport]:
    """Which files must be made, decided from headers before the encoder is loaded."""
    report = TextReport()
    chosen = []
    for job in jobs:
        compared = {key: value for key, value in job.metadata.items() if key not in ("source", "caption", "model_version")}
        reason = reason_to_rebuild(job.target, compared, TEXT_KEYS)
        if reason is None and skip_existing:
            report.kept += 1
            continue
        if reason != "missing":
            report.rebuilt.append((job.target.name, reason or "--no-skip_existing"))
        chosen.append(job)
    return chosen, report


def encode_texts(jobs: Sequence[TextJob], load: Callable[[], TextPipeline], group: Processes, *, batch_size: int) -> int:
    """Encode this process's share and write it; texts of similar length run together. Returns the number of files."""
    waiting: dict[str, _Waiting] = {}
    for job in jobs:
        waiting.setdefault(job.text, _Waiting(job.text)).jobs.append(job)
    mine = group.share(list(waiting.values()))
    if not mine:
        return 0
    pipeline = load()
    mine.sort(key=lambda one: (pipeline.token_count(one.text), one.text))
    with tqdm(total=len(mine), unit="text", desc="Text caching", disable=not group.is_main) as bar:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            for one, (text, mask) in zip(batch, pipeline.encode([one.text for one in batch]), strict=True):
                _write(one, text.to(STORED_DTYPE), mask)
            bar.update(len(batch))
    return sum(len(one.jobs) for one in mine)


def _write(one: _Waiting, text: Tensor, mask: Tensor) -> None:
    for job in one.jobs:
        store.write(job.target, {keys.text_key(text.dtype): text, keys.TEXT_MASK_KEY: mask}, job.metadata)
