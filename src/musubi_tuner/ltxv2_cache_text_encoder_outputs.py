"""Caches the captions of a dataset, and its sample prompts, as the text contexts that training reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from musubi_tuner.config.caching import TextCachingConfig
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.flags import parse
from musubi_tuner.prompts.sample_prompts import all_prompt_texts, load_prompts
from musubi_tuner.runtime.program import run_program

if TYPE_CHECKING:
    from musubi_tuner.encoding.text import TextJob, TextTodo
    from musubi_tuner.ltxv2.text.pipeline import TextRecipe
    from musubi_tuner.runtime.processes import Processes

log = logging.getLogger(__name__)

PROG = "ltxv2_cache_text_encoder_outputs.py"
DESCRIPTION = "Cache captions and sample prompts: text encoder, projection and connectors, so that training needs none of them."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse(TextCachingConfig, argv, prog=prog, description=DESCRIPTION)
    datasets = load_dataset_config(config.data.dataset_config)
    prompts = []
    if config.data.sample_prompts is not None:
        prompts = all_prompt_texts(load_prompts(config.data.sample_prompts))
    if config.data.dop_prompt is not None:
        prompts = [*prompts, config.data.dop_prompt]
    from musubi_tuner.encoding.text import common_metadata, list_text_jobs
    from musubi_tuner.runtime.processes import processes

    recipe = _recipe(config)
    recipe.check()
    jobs = list_text_jobs(datasets, prompts, common_metadata(recipe))
    with processes() as group:
        return _run(config, recipe, jobs, group)


def _run(config: TextCachingConfig, recipe: TextRecipe, jobs: Sequence[TextJob], group: Processes) -> int:
    from musubi_tuner.cache.names import TEXT_ENDING
    from musubi_tuner.cache.store import clean_temporaries
    from musubi_tuner.encoding.text import choose_text_jobs, encode_texts
    from musubi_tuner.encoding.text_report import TextReport, describe_orphans

    if group.is_main and not config.data.dry_run:
        for folder in {job.target.parent for job in jobs}:
            clean_temporaries(folder, (TEXT_ENDING,))
    group.barrier()
    todo = choose_text_jobs(jobs, skip_existing=config.data.skip_existing)
    if config.data.dry_run:
        if group.is_main:
            log.info("%s", _forecast(recipe, jobs, todo))
        return 0
    group.barrier()  # nobody writes while another still looks at what is there
    report = TextReport(kept=len(jobs) - len(todo))
    for part in group.gather(encode_texts(todo, recipe, group, batch_size=config.work.batch_size)):
        report.add(part)
    if group.is_main:
        log.info("\n%s", report.table())
        if orphans := describe_orphans([job.target for job in jobs]):
            log.info("%s", orphans)
    return 1 if report.failed else 0


def _recipe(config: TextCachingConfig) -> TextRecipe:
    from musubi_tuner.ltxv2.text.encoders import EncoderOptions
    from musubi_tuner.ltxv2.text.pipeline import TextRecipe
    from musubi_tuner.ltxv2.transformer.load import read_config
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.runtime.device import DTYPES, pick_device

    checkpoint = open_checkpoint(config.model.ltxv2_model)
    device = pick_device(config.work.device)
    options = EncoderOptions(
        path=config.model.text_encoder,
        tokenizer=config.model.tokenizer,
        backend=config.model.text_encoder_backend,
        device=device,
        dtype=DTYPES[config.model.text_dtype or ("float32" if device.type == "cpu" else "bfloat16")],
        max_length=config.model.max_length,
        load_in_8bit=config.model.gemma_load_in_8bit,
        load_in_4bit=config.model.gemma_load_in_4bit,
    )
    return TextRecipe(
        checkpoint=checkpoint,
        config=read_config(checkpoint),
        options=options,
        mode=config.ltx_mode,
        stage=config.data.text_cache_stage,
    )


def _forecast(recipe: TextRecipe, jobs: Sequence[TextJob], todo: Sequence[TextTodo]) -> str:
    from musubi_tuner.encoding.text import STORED_DTYPE
    from musubi_tuner.encoding.text_report import describe_forecast
    from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS
    from musubi_tuner.ltxv2.text.pipeline import text_widths

    rows = recipe.options.max_length if recipe.options.backend == "t5" else CONTEXT_TOKENS
    return describe_forecast(
        [one.job.target for one in todo],
        texts=len({one.job.text for one in todo}),
        kept=len(jobs) - len(todo),
        bytes_each=rows * (sum(text_widths(recipe.config, recipe.mode)) * STORED_DTYPE.itemsize + 1),
        at_most=recipe.stage == "features",
    )


if __name__ == "__main__":
    run_program(main)
