"""Caches the captions of a dataset, and its sample prompts, as the text contexts that training reads."""

import logging
from collections.abc import Sequence

from musubi_tuner.cache.fingerprint import canonical
from musubi_tuner.cache.names import PROMPT_FOLDER
from musubi_tuner.cache.store import clean_temporaries
from musubi_tuner.config.dataset import DatasetConfig, load_dataset_config
from musubi_tuner.config.flags import parse
from musubi_tuner.config.text_caching import TextCachingConfig, check_text_caching
from musubi_tuner.encoding.text import STORED_DTYPE, choose_text_jobs, encode_texts, list_text_jobs
from musubi_tuner.ltxv2.text.encoders import EncoderOptions, encoder_fingerprint
from musubi_tuner.ltxv2.text.pipeline import load_text_pipeline, projection_fingerprint, text_widths
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.preview.prompts import PromptDefaults, all_prompt_texts, load_prompts
from musubi_tuner.runtime.device import DTYPES, pick_device
from musubi_tuner.runtime.processes import Processes, processes
from musubi_tuner.runtime.program import run_program

log = logging.getLogger(__name__)

PROG = "ltxv2_cache_text_encoder_outputs.py"
DESCRIPTION = "Cache captions and sample prompts: text encoder, projection and connectors, so that training needs none of them."


def main(argv: Sequence[str]) -> int:
    config = parse(TextCachingConfig, argv, prog=PROG, description=DESCRIPTION)
    check_text_caching(config)
    datasets = load_dataset_config(config.data.dataset_config)
    prompts = []
    if config.data.sample_prompts is not None:
        prompts = all_prompt_texts(load_prompts(config.data.sample_prompts, PromptDefaults()))
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
    jobs = list_text_jobs(datasets, prompts, _common_metadata(config, checkpoint, options))
    with processes() as group:
        return _run(config, datasets, checkpoint, options, jobs, group)


def _run(
    config: TextCachingConfig, datasets: DatasetConfig, checkpoint: Checkpoint, options: EncoderOptions, jobs: list, group: Processes
) -> int:
    if group.is_main:
        for spec in datasets.all:
            clean_temporaries(spec.cache_directory)
            clean_temporaries(spec.cache_directory / PROMPT_FOLDER)
    group.barrier()
    chosen, report = choose_text_jobs(jobs, skip_existing=config.data.skip_existing)
    transformer = read_config(checkpoint)
    if config.data.dry_run:
        if group.is_main:
            width = sum(text_widths(transformer, config.ltx_mode))
            size = len(chosen) * 1024 * width * STORED_DTYPE.itemsize / 2**20
            texts = len({job.text for job in chosen})
            log.info(
                "Text caching: %d file(s) of %d different text(s) to encode, at most %.1f MiB. Nothing was encoded (--dry_run).",
                len(chosen),
                texts,
                size,
            )
        return 0
    group.barrier()
    encoded = encode_texts(
        chosen,
        lambda: load_text_pipeline(checkpoint, transformer, options, mode=config.ltx_mode, stage=config.data.text_cache_stage),
        group,
        batch_size=config.work.batch_size,
    )
    report.encoded = sum(group.gather(encoded))
    if group.is_main:
        log.info("\n%s", report.table())
    return 0


def _common_metadata(config: TextCachingConfig, checkpoint: Checkpoint, options: EncoderOptions) -> dict[str, str]:
    model = config.model
    gemma = options.backend == "gemma"
    encoding = {
        "stored": str(STORED_DTYPE).removeprefix("torch."),
        "computed": str(options.dtype).removeprefix("torch."),
        "bits": 8 if model.gemma_load_in_8bit else 4 if model.gemma_load_in_4bit else 0,
        "max_length": model.max_length,
    }
    widths = text_widths(read_config(checkpoint), config.ltx_mode)
    return {
        "model_version": checkpoint.model_version,
        "encoder_fingerprint": encoder_fingerprint(options),
        "projection_fingerprint": projection_fingerprint(checkpoint) if gemma else "none",
        "encoding": canonical(encoding),
        "stage": config.data.text_cache_stage,
        "backend": options.backend,
        "max_length": str(model.max_length),
        "widths": "+".join(map(str, widths)),
    }


if __name__ == "__main__":
    run_program(main)
