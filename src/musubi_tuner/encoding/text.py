"""Caching captions and sample prompts: identical texts are encoded once.

Texts are worked off in chunks: the encoder turns a chunk into features and is freed, then the connectors finish them. A chunk is bounded
by the memory of its features, so that a thousand captions and more share one loading of the encoder.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from musubi_tuner.cache import keys, store
from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.fingerprint import canonical, text_fingerprint
from musubi_tuner.cache.names import PROMPT_FOLDER, prompt_path, text_name
from musubi_tuner.cache.sidecars import TEXT_KEYS
from musubi_tuner.config.dataset import DatasetConfig
from musubi_tuner.encoding.text_report import TextReport
from musubi_tuner.ltxv2.text.encoders import encoder_fingerprint, load_tokenizer
from musubi_tuner.ltxv2.text.pipeline import (
    Features,
    TextRecipe,
    free_memory,
    load_feature_stage,
    load_finish_stage,
    projection_fingerprint,
    text_widths,
)
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.sources.listing import list_all_sources

STORED_DTYPE = torch.bfloat16
_CHUNK_BYTES = 4 * 2**30

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextJob:
    """One file to make."""

    target: Path
    text: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TextTodo:
    """One file that is to be made now, and why."""

    job: TextJob
    reason: str


@dataclass(slots=True)
class _Waiting:
    """All files of one text."""

    text: str
    todo: list[TextTodo] = field(default_factory=list)
    tokens: int = 0


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
                    f"{spec.label}: '{source.name}' has another caption than in an earlier dataset, and both would be cached in {target}. "
                    "Give one of the datasets a cache_directory of its own."
                )
    return [*jobs.values(), *list_prompt_jobs(config.datasets[0].cache_directory, prompts, common)]


def list_prompt_jobs(cache_directory: Path, prompts: Sequence[str], common: Mapping[str, str]) -> list[TextJob]:
    """A file for each sample prompt, and for the empty one; arguments as for `list_text_jobs`."""
    return [
        TextJob(target=prompt_path(cache_directory, prompt), text=prompt, metadata=_metadata(common, prompt, PROMPT_FOLDER))
        for prompt in dict.fromkeys([*prompts, ""])
    ]


def common_metadata(recipe: TextRecipe) -> dict[str, str]:
    """Metadata that all files of a run share."""
    options = recipe.options
    encoding = {
        "stored": str(STORED_DTYPE).removeprefix("torch."),
        "computed": str(options.dtype).removeprefix("torch."),
        "bits": 8 if options.load_in_8bit else 4 if options.load_in_4bit else 0,
        "max_length": options.max_length,
    }
    return {
        "model_version": recipe.checkpoint.model_version,
        "encoder_fingerprint": encoder_fingerprint(options),
        "projection_fingerprint": projection_fingerprint(recipe.checkpoint) if options.backend == "gemma" else "none",
        "encoding": canonical(encoding),
        "stage": recipe.stage,
        "backend": options.backend,
        "max_length": str(options.max_length),
        "widths": "+".join(map(str, text_widths(recipe.config, recipe.mode))),
    }


def _metadata(common: Mapping[str, str], text: str, source: str) -> dict[str, str]:
    return {**common, "kind": "text", "source": source, "source_fingerprint": text_fingerprint(text), "caption": text}


def choose_text_jobs(jobs: Sequence[TextJob], *, skip_existing: bool) -> list[TextTodo]:
    """Which files must be made, decided from headers before the encoder is loaded."""
    chosen = []
    for job in jobs:
        last = {"model_version": job.metadata["model_version"]}  # the least telling reason
        compared = {"caption": job.text} | {key: value for key, value in job.metadata.items() if key not in ("source", *last)} | last
        reason = reason_to_rebuild(job.target, compared, TEXT_KEYS)
        if reason is not None or not skip_existing:
            chosen.append(TextTodo(job, reason or "--no-skip_existing"))
    return chosen


def encode_texts(todo: Sequence[TextTodo], recipe: TextRecipe, group: Processes, *, batch_size: int) -> TextReport:
    """Encode this process's share and write it; texts of similar length run together."""
    waiting: dict[str, _Waiting] = {}
    for one in todo:
        waiting.setdefault(one.job.text, _Waiting(one.job.text)).todo.append(one)
    mine = group.share(list(waiting.values()))
    report = TextReport()
    if not mine:
        return report
    tokenizer = load_tokenizer(recipe.options)
    for one in mine:
        one.tokens = len(tokenizer(one.text))
    mine.sort(key=lambda one: (one.tokens, one.text))
    for chunk in _chunks(mine, recipe):
        features = _encode(chunk, recipe, batch_size, show=group.is_main)
        _finish(chunk, features, recipe, batch_size, report, show=group.is_main)
    return report


def _chunks(waiting: Sequence[_Waiting], recipe: TextRecipe) -> Iterator[list[_Waiting]]:
    most = _CHUNK_BYTES // (sum(text_widths(recipe.config, "av")) * recipe.options.dtype.itemsize)
    chunk: list[_Waiting] = []
    tokens = 0
    for one in waiting:
        if chunk and tokens + one.tokens > most:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(one)
        tokens += one.tokens
    yield chunk


def _encode(chunk: Sequence[_Waiting], recipe: TextRecipe, batch_size: int, *, show: bool) -> list[Features]:
    """Features of a chunk; the encoder is gone when this returns."""
    stage = load_feature_stage(recipe)
    features: list[Features] = []
    with tqdm(total=len(chunk), unit="text", desc="Text encoder", disable=not show) as bar:
        for batch in _batches(chunk, batch_size):
            features += stage.encode([one.text for one in batch])
            bar.update(len(batch))
    del stage
    free_memory(recipe.options.device)
    return features


def _finish(
    chunk: Sequence[_Waiting], features: Sequence[Features], recipe: TextRecipe, batch_size: int, report: TextReport, *, show: bool
) -> None:
    """Write a chunk's files; the connectors are gone when this returns."""
    stage = load_finish_stage(recipe)
    with tqdm(total=len(chunk), unit="text", desc="Text caching", disable=not show) as bar:
        for waiting, batch in zip(_batches(chunk, batch_size), _batches(features, batch_size), strict=True):
            for one, (text, mask) in zip(waiting, stage.finish(batch), strict=True):
                _write(one, text.to(STORED_DTYPE), mask, report)
            bar.update(len(batch))
    del stage
    free_memory(recipe.options.device)


def _batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _write(one: _Waiting, text: Tensor, mask: Tensor, report: TextReport) -> None:
    for todo in one.todo:
        job = todo.job
        try:
            store.write(job.target, {keys.text_key(text.dtype): text, keys.TEXT_MASK_KEY: mask}, job.metadata)
        except store.DiskFullError:
            raise
        except UserError as error:
            report.failed.append((job.target.name, str(error)))
            continue
        report.encoded += 1
        if todo.reason != "missing":
            report.rebuilt.append((job.target.name, todo.reason))
