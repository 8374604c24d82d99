"""Takes over data that the official trainer precomputed: caches, index and dataset file, so that training needs no media."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from musubi_tuner.config.caching import ImportConfig, ImportModelOptions
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.flags import parse
from musubi_tuner.prompts.sample_prompts import all_prompt_texts, load_prompts
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import run_program
from musubi_tuner.runtime.tables import format_table

if TYPE_CHECKING:
    from musubi_tuner.conversion.official_dataset.plan import ImportPlan
    from musubi_tuner.conversion.official_dataset.tensors import Encoders, Written
    from musubi_tuner.ltxv2.text.pipeline import TextRecipe
    from musubi_tuner.ltxv2.weights import Checkpoint

log = logging.getLogger(__name__)

PROG = "tools/import_precomputed.py"
DESCRIPTION = "Turn a .precomputed folder of the official trainer into caches and a dataset file: tensors and plain values alone are read."
_MOST_ROWS = 40
_PROMPTS_TOGETHER = 8


def main(argv: Sequence[str], prog: str = PROG) -> int:
    return _import(parse(ImportConfig, argv, prog=prog, description=DESCRIPTION))


def _import(config: ImportConfig) -> int:
    from musubi_tuner.cache.sidecars import KINDS
    from musubi_tuner.cache.store import clean_temporaries
    from musubi_tuner.conversion.official_dataset.files import list_samples, tree_root
    from musubi_tuner.conversion.official_dataset.plan import CACHE_FOLDER, plan_import
    from musubi_tuner.conversion.official_dataset.tensors import Written, import_tensors, import_texts
    from musubi_tuner.ltxv2.weights import open_checkpoint

    data = config.data
    prompts = [] if data.sample_prompts is None else all_prompt_texts(load_prompts(data.sample_prompts))
    checkpoint = open_checkpoint(config.model.ltxv2_model)
    root = tree_root(data.precomputed_directory)
    samples, dropped = list_samples(root, data.ltx_mode)
    recipe = _recipe(config, checkpoint)
    encoders = _encoders(config.model, checkpoint, recipe)
    plan = plan_import(samples, data.ltx_mode, data.source_fps)
    toml, cache = data.output_dir / "dataset.toml", data.output_dir / CACHE_FOLDER
    _write_dataset(plan, toml, root, dropped)
    clean_temporaries(cache, [kind.ending for kind in KINDS.values()])
    written = Written()
    import_tensors(plan.items, cache, data.ltx_mode, encoders, written)
    import_texts(plan.items, cache, recipe, encoders, written)
    if data.sample_prompts is not None:
        _encode_prompts(cache, prompts, recipe, written)
    _report(root, toml, plan, dropped, written, config)
    return 0


def _recipe(config: ImportConfig, checkpoint: Checkpoint) -> TextRecipe:
    from musubi_tuner.ltxv2.text.encoders import encoder_options
    from musubi_tuner.ltxv2.text.pipeline import TextRecipe
    from musubi_tuner.ltxv2.transformer.load import read_config
    from musubi_tuner.runtime.device import pick_device

    options = encoder_options(
        config.model.text_encoder or "", tokenizer=None, backend="gemma", device=pick_device(config.work.device), max_length=None
    )
    return TextRecipe(
        checkpoint=checkpoint,
        config=read_config(checkpoint),
        options=options,
        mode=config.data.ltx_mode,
        stage=config.data.text_cache_stage,
    )


def _encoders(model: ImportModelOptions, checkpoint: Checkpoint, recipe: TextRecipe) -> Encoders:
    from musubi_tuner.conversion.official_dataset.tensors import Encoders
    from musubi_tuner.ltxv2.autoencoders.audio_vae import audio_vae_fingerprint
    from musubi_tuner.ltxv2.autoencoders.video_vae import video_vae_fingerprint
    from musubi_tuner.ltxv2.text.encoders import encoder_fingerprint
    from musubi_tuner.ltxv2.text.pipeline import projection_fingerprint
    from musubi_tuner.ltxv2.weights import open_checkpoint

    vae = checkpoint if model.vae is None else open_checkpoint(model.vae)
    audio_vae = vae if model.audio_vae is None else open_checkpoint(model.audio_vae)
    return Encoders(
        latents="" if recipe.mode == "audio" else video_vae_fingerprint(vae),
        audio="" if recipe.mode == "video" else audio_vae_fingerprint(audio_vae),
        text="not told" if model.text_encoder is None else encoder_fingerprint(recipe.options),
        projection=projection_fingerprint(recipe.whole),
        model_version=checkpoint.model_version,
    )


def _write_dataset(plan: ImportPlan, toml: Path, root: Path, dropped: Sequence[tuple[str, str]]) -> None:
    """The dataset file and the indices, before anything else, so that what fails later is a named hole.

    Raises:
        UserError: a dataset file that says something else is there.
    """
    from musubi_tuner.cache.index import DatasetIndex, write_index
    from musubi_tuner.cache.store import write_bytes
    from musubi_tuner.conversion.official_dataset.plan import dataset_toml
    from musubi_tuner.runtime.files import real_path

    text = dataset_toml(plan, real_path(root)).encode("utf-8")
    if not toml.is_file():
        write_bytes(toml, text)
    elif toml.read_bytes() != text:
        raise UserError(f"{toml}: is there already and says something else. Give another --output_dir, or move the file away.")
    for spec, kind in zip(load_dataset_config(toml).datasets, plan.kinds, strict=True):
        write_index(spec, DatasetIndex(settings=spec.settings(), clips=plan.clips(kind), dropped=tuple(dropped)))


def _encode_prompts(cache: Path, prompts: Sequence[str], recipe: TextRecipe, written: Written) -> None:
    """Sample prompts and the empty one, as the text caching program makes them."""
    from musubi_tuner.cache.sidecars import KINDS
    from musubi_tuner.encoding.jobs import choose
    from musubi_tuner.encoding.text import encode_texts, list_prompt_jobs
    from musubi_tuner.runtime.processes import processes

    recipe.check()
    jobs = list_prompt_jobs(cache, prompts, recipe)
    todo = choose(jobs, KINDS["text"].keys, skip_existing=True)
    with processes() as group:
        outcome = encode_texts(todo, recipe, group, batch_size=_PROMPTS_TOGETHER)
    if outcome.failed:
        raise UserError("; ".join(reason for _, reason in outcome.failed))
    written.made["prompts"] += len(todo)
    written.kept["prompts"] += len(jobs) - len(todo)


def _report(root: Path, toml: Path, plan: ImportPlan, dropped: Sequence[tuple[str, str]], written: Written, config: ImportConfig) -> None:
    from musubi_tuner.conversion.official_dataset.files import NOT_IMPORTED

    for folder in NOT_IMPORTED:
        if (root / folder).is_dir():
            log.warning("WARNING: %s is left aside: there is no mask for sound here.", root / folder)
    counts = [(what, written.made[what], written.kept[what]) for what in sorted(written.made | written.kept)]
    log.info("\n%s", format_table(counts, ("files", "written", "kept")))
    if dropped:
        more = f"\n... and {len(dropped) - _MOST_ROWS} more" if len(dropped) > _MOST_ROWS else ""
        log.info("\n%s%s", format_table(dropped[:_MOST_ROWS], ("left out", "because")), more)
    log.info("\nImport: %d items, %d left out", len(plan.items), len(dropped))
    features = " --train_connectors" if config.data.text_cache_stage == "features" else ""
    log.info("Train on them with --dataset_config %s --ltx_mode %s%s", toml, config.data.ltx_mode, features)


if __name__ == "__main__":
    run_program(main)
