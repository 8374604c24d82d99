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
    from musubi_tuner.encoding.text import TextJob
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
    from musubi_tuner.encoding.text import list_text_jobs
    from musubi_tuner.runtime.processes import processes

    recipe = _recipe(config)
    recipe.check()
    jobs, unread = list_text_jobs(datasets, prompts, recipe)
    with processes() as group:
        return _run(config, recipe, jobs, unread, group)


def _run(
    config: TextCachingConfig, recipe: TextRecipe, jobs: Sequence[TextJob], unread: Sequence[tuple[str, str]], group: Processes
) -> int:
    """
    Args:
        unread: (source, reason) of captions that cannot be read.
    """
    from musubi_tuner.cache.sidecars import KINDS
    from musubi_tuner.cache.store import clean_temporaries
    from musubi_tuner.encoding.jobs import choose
    from musubi_tuner.encoding.program import conclude
    from musubi_tuner.encoding.report import Outcome, describe_forecast
    from musubi_tuner.encoding.text import encode_texts

    kind, folders = KINDS["text"], {job.target.parent for job in jobs}
    if group.is_main and not config.data.dry_run:
        for folder in folders:
            clean_temporaries(folder, (kind.ending,))
    group.barrier()
    todo = choose(jobs, kind.keys, skip_existing=config.data.skip_existing)
    if config.data.dry_run:
        if group.is_main:
            chosen = [one.job for one in todo]
            texts = len({job.content for job in chosen})
            kept, at_most = len(jobs) - len(todo), recipe.stage == "features"
            log.info("%s", describe_forecast(kind.title, chosen, kept=kept, at_most=at_most, further=[("different texts", texts)]))
            for name, reason in unread:
                log.warning("WARNING: %s: %s", name, reason)
        return 1 if unread else 0
    group.barrier()  # nobody writes while another still looks at what is there
    outcome = Outcome.joined(group.gather(encode_texts(todo, recipe, group, batch_size=config.work.batch_size)))
    outcome.kept = len(jobs) - len(todo)
    outcome.failed += unread
    return conclude(kind, outcome, jobs, folders, group)


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


if __name__ == "__main__":
    run_program(main)
