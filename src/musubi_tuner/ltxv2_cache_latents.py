"""Caches the video and image latents of a dataset."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from musubi_tuner.config.caching import LatentCachingConfig, first_given
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.flags import parse
from musubi_tuner.config.model import chosen_mode
from musubi_tuner.runtime.program import run_program

if TYPE_CHECKING:
    from musubi_tuner.encoding.plan import DatasetPlan

log = logging.getLogger(__name__)

PROG = "ltxv2_cache_latents.py"
DESCRIPTION = "Cache the video and image latents of a dataset: decode, encode with the video VAE, write one file a clip."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    return _cache(parse(LatentCachingConfig, argv, prog=prog, description=DESCRIPTION))


def _cache(config: LatentCachingConfig) -> int:
    from musubi_tuner.cache.names import LATENTS_ENDING, MASK_ENDING, REFERENCE_ENDING
    from musubi_tuner.cache.sidecars import LATENT_KEYS, MASK_KEYS, REFERENCE_KEYS
    from musubi_tuner.encoding.latents import clip_size, latent_jobs, latent_stages, reference_jobs, reference_size, reference_stages
    from musubi_tuner.encoding.layout import ClipSize, use_fastest_layout
    from musubi_tuner.encoding.masks import mask_jobs, mask_stages
    from musubi_tuner.encoding.program import Task, plan_and_index, run_task
    from musubi_tuner.ltxv2.autoencoders.video_vae import TileSizes, VideoVAE, video_vae_fingerprint
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.runtime.device import DTYPES, pick_device
    from musubi_tuner.runtime.processes import processes

    datasets = load_dataset_config(config.data.dataset_config)
    checkpoint = open_checkpoint(first_given(("--vae", config.vae.vae), ("--ltxv2_model", config.vae.ltxv2_model)))
    encoder = video_vae_fingerprint(checkpoint)
    tiles = TileSizes(pixels=config.vae.vae_spatial_tile_size, frames=config.vae.vae_temporal_tile_size)
    with processes() as group:
        device = pick_device(config.work.device)
        dtype = DTYPES[config.vae.vae_dtype or ("float32" if device.type == "cpu" else "bfloat16")]

        def load_vae(sizes: Sequence[ClipSize]) -> VideoVAE:
            vae = VideoVAE.load(checkpoint, device=device, dtype=dtype, parts=("encoder",), tiles=tiles)
            if (times := use_fastest_layout(vae, sizes, config.work.batch_size)) and group.is_main:
                log.info("%s", times.describe())
            return vae

        task = Task(
            title="Video latent caching",
            ending=LATENTS_ENDING,
            required=LATENT_KEYS,
            make_stages=lambda jobs: latent_stages(load_vae([clip_size(job) for job in jobs])),
        )
        plans = plan_and_index(datasets, task, config.data, config.work, group)
        jobs = latent_jobs(plans, encoder=encoder, dtype=dtype, tiles=tiles, model_version=checkpoint.model_version)
        code = run_task(task, plans, jobs, config.data, config.work, group)
        references = reference_jobs(plans, encoder=encoder, dtype=dtype, tiles=tiles, model_version=checkpoint.model_version)
        if references:
            shown = Task(
                title="Reference latent caching",
                ending=REFERENCE_ENDING,
                required=REFERENCE_KEYS,
                make_stages=lambda jobs: reference_stages(load_vae([reference_size(job) for job in jobs])),
            )
            code = max(code, run_task(shown, plans, references, config.data, config.work, group))
        masks = mask_jobs(plans, model_version=checkpoint.model_version)
        if masks:
            task = Task(title="Mask caching", ending=MASK_ENDING, required=MASK_KEYS, make_stages=lambda jobs: mask_stages())
            code = max(code, run_task(task, plans, masks, config.data, config.work, group))
        if group.is_main and chosen_mode(config.data) == "video":
            _warn_of_sound(plans)
        return code


def _warn_of_sound(plans: "Sequence[DatasetPlan]") -> None:
    sounding = sum(planned.clip.has_audio for plan in plans if plan.spec.kind == "video" for planned in plan.clips)
    if sounding:
        log.warning(
            "WARNING: %d clip(s) have sound, which --ltx_mode video (the default) ignores. To train it, run "
            "ltxv2_cache_audio_latents.py too and give the other programs --ltx_mode av.",
            sounding,
        )


if __name__ == "__main__":
    run_program(main)
