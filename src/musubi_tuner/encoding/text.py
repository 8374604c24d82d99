"""Caching captions and sample prompts: identical texts are encoded once.

Texts are worked off in chunks: the encoder turns a chunk into features and is freed, then the connectors finish them. A chunk is bounded
by the memory of its features, so that a thousand captions and more share one loading of the encoder.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from musubi_tuner.cache import store
from musubi_tuner.cache.forms import text_forms
from musubi_tuner.cache.names import PROMPT_FOLDER, prompt_path, text_name
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.cache.store import canonical, text_fingerprint
from musubi_tuner.config.dataset import DatasetConfig
from musubi_tuner.encoding.jobs import Job, Todo, one_for_each_file
from musubi_tuner.encoding.report import Outcome, outcome_of
from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS
from musubi_tuner.ltxv2.text.encoders import encoder_fingerprint, load_tokenizer
from musubi_tuner.ltxv2.text.pipeline import (
    Features,
    FeatureStage,
    TextRecipe,
    load_finish_stage,
    projection_fingerprint,
    text_widths,
)
from musubi_tuner.memory.regions import processes_here
from musubi_tuner.placement.text import TextBatch, load_feature_stage, memory_in_words
from musubi_tuner.runtime.device import free_memory
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.runtime.progress import Progress
from musubi_tuner.sources.listing import list_all_sources

STORED_DTYPE = torch.bfloat16
_CHUNK_BYTES = 4 * 2**30

T = TypeVar("T")


TextJob = Job[str]
_Waiting = tuple[str, list[Todo[str]]]
"""A text and all files of it."""


def list_text_jobs(config: DatasetConfig, prompts: Sequence[str], recipe: TextRecipe) -> tuple[list[TextJob], list[tuple[str, str]]]:
    """A file for each caption of every dataset, and for each sample prompt; and (source, reason) of captions that cannot be read.

    Args:
        prompts: texts of the sample prompts; the empty prompt is always added.

    Raises:
        UserError: missing captions, or two captions that want the same file.
    """
    common, size = _common_metadata(recipe), _most_bytes(recipe)
    jobs, unread = [], []
    for spec, sources in zip(config.all, list_all_sources(config.all), strict=True):
        for source in sources:
            name = f"{spec.label}/{source.name}"
            if source.caption_problem:
                unread.append((name, source.caption_problem))
            else:
                jobs.append(_job(name, spec.cache_directory / text_name(source.stem), source.caption, source.name, common, size))
    prompt_jobs = list_prompt_jobs(config.datasets[0].cache_directory, prompts, recipe)
    return [*one_for_each_file(jobs), *prompt_jobs], unread


def list_prompt_jobs(cache_directory: Path, prompts: Sequence[str], recipe: TextRecipe) -> list[TextJob]:
    """A file for each sample prompt, and for the empty one."""
    common, size = _common_metadata(recipe), _most_bytes(recipe)
    return [
        _job(f"prompt '{prompt}'", prompt_path(cache_directory, prompt), prompt, PROMPT_FOLDER, common, size)
        for prompt in dict.fromkeys([*prompts, ""])
    ]


def _job(name: str, target: Path, text: str, source: str, common: Mapping[str, str], size: int) -> TextJob:
    last = {"model_version": common["model_version"]}  # the least telling reason
    own = {"caption": text, "kind": "text", "source_fingerprint": text_fingerprint(text)}
    expected = own | {key: value for key, value in common.items() if key not in last} | last
    return Job(name=name, target=target, content=text, expected=expected, people={"source": source}, size=size, forms=text_forms)


def _common_metadata(recipe: TextRecipe) -> dict[str, str]:
    """Metadata that all files of a run share."""
    options = recipe.options
    encoding = {
        "stored": str(STORED_DTYPE).removeprefix("torch."),
        "computed": str(options.dtype).removeprefix("torch."),
        "bits": options.bits or 0,
        "max_length": options.max_length,
    }
    return {
        "model_version": recipe.checkpoint.model_version,
        "encoder_fingerprint": encoder_fingerprint(options),
        "projection_fingerprint": projection_fingerprint(recipe.whole) if options.backend == "gemma" else "none",
        "encoding": canonical(encoding),
        "stage": recipe.stage,
        "backend": options.backend,
        "max_length": str(options.max_length),
        "widths": "+".join(map(str, text_widths(recipe.config, recipe.mode))),
    }


def _most_bytes(recipe: TextRecipe) -> int:
    """Of a file; features have as many rows as the text has tokens."""
    rows = recipe.options.max_length if recipe.options.backend == "t5" else CONTEXT_TOKENS
    return rows * (sum(text_widths(recipe.config, recipe.mode)) * STORED_DTYPE.itemsize + 1)


def encode_texts(todo: Sequence[Todo[str]], recipe: TextRecipe, group: Processes, *, batch_size: int) -> Outcome:
    """Encode this process's share and write it; texts of similar length run together."""
    by_text: dict[str, list[Todo[str]]] = {}
    for one in todo:
        by_text.setdefault(one.job.content, []).append(one)
    mine = group.share(list(by_text.items()))
    sharers = processes_here(group.gather)
    failures: list[tuple[TextJob, str]] = []
    if mine:
        tokenizer = load_tokenizer(recipe.options)
        tokens = {text: len(tokenizer(text)) for text, _ in mine}
        tokenizer.tell_of_cut({text: files[0].job.name for text, files in mine if tokens[text] == recipe.options.max_length})
        mine.sort(key=lambda one: (tokens[one[0]], one[0]))
        for chunk in _chunks(mine, tokens, recipe):
            sizes = [TextBatch(len(batch), max(tokens[text] for text, _ in batch)) for batch in _batches(chunk, batch_size)]
            with memory_in_words(f"fewer texts run together: --batch_size {max(1, batch_size // 2)}, which goes on where this has ended"):
                stage = load_feature_stage(recipe, sizes, sharers=sharers)
                features = _encode(stage, chunk, batch_size, show=group.is_main)
                del stage
                free_memory(recipe.options.device)
                failures += _finish(chunk, features, recipe, batch_size, show=group.is_main)
    return outcome_of([one for _, files in mine for one in files], failures)


def _chunks(waiting: Sequence[_Waiting], tokens: Mapping[str, int], recipe: TextRecipe) -> Iterator[list[_Waiting]]:
    most = _CHUNK_BYTES // (sum(text_widths(recipe.config, "av")) * recipe.options.dtype.itemsize)
    chunk: list[_Waiting] = []
    total = 0
    for one in waiting:
        if chunk and total + tokens[one[0]] > most:
            yield chunk
            chunk, total = [], 0
        chunk.append(one)
        total += tokens[one[0]]
    yield chunk


def _encode(stage: FeatureStage, chunk: Sequence[_Waiting], batch_size: int, *, show: bool) -> list[Features]:
    """Features of a chunk."""
    features: list[Features] = []
    with Progress("Text encoder", len(chunk), unit="text", shown=show) as bar:
        for batch in _batches(chunk, batch_size):
            features += stage.encode([text for text, _ in batch])
            bar.advance(len(batch))
    return features


def _finish(
    chunk: Sequence[_Waiting], features: Sequence[Features], recipe: TextRecipe, batch_size: int, *, show: bool
) -> list[tuple[TextJob, str]]:
    """Write a chunk's files, and return those that failed; the connectors are gone when this returns."""
    stage = load_finish_stage(recipe)
    failures = []
    with Progress(KINDS["text"].title, len(chunk), unit="text", shown=show) as bar:
        for waiting, batch in zip(_batches(chunk, batch_size), _batches(features, batch_size), strict=True):
            for (_, files), found, (text, mask) in zip(waiting, batch, stage.finish(batch), strict=True):
                tensors, tokens = KINDS["text"].pack(text.to(STORED_DTYPE), mask), {"tokens": str(len(found[0]))}
                for job in (one.job for one in files):
                    try:
                        store.write(job.target, tensors, {**job.expected, **job.people, **tokens}, job.forms)
                    except store.DiskFullError:
                        raise
                    except UserError as error:
                        failures.append((job, str(error)))
            bar.advance(len(batch))
    del stage
    free_memory(recipe.options.device)
    return failures


def _batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
