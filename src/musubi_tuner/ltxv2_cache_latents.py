"""Caches the video and image latents of a dataset."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from musubi_tuner.config.caching import LatentCachingConfig, first_given
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.flags import parse
from musubi_tuner.config.model import chosen_mode
from musubi_tuner.runtime.program import run_program

if TYPE_CHECKING:
    from torch import Tensor

    from musubi_tuner.cache.clip import Clip
    from musubi_tuner.encoding.makers import ClipJob
    from musubi_tuner.encoding.plan import DatasetPlan
    from musubi_tuner.runtime.device import HostCopy

log = logging.getLogger(__name__)

PROG = "ltxv2_cache_latents.py"
DESCRIPTION = "Cache the video and image latents of a dataset: decode, encode with the video VAE, write one file a clip."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    return _cache(parse(LatentCachingConfig, argv, prog=prog, description=DESCRIPTION))


def _cache(config: LatentCachingConfig) -> int:
    from musubi_tuner.encoding.layout import use_fastest_layout
    from musubi_tuner.encoding.makers import Encoder
    from musubi_tuner.encoding.pictures import frame_encoder, keyframe_encoder, picture_encoding, sidecar_size
    from musubi_tuner.encoding.program import cache_sidecars, plan_and_index
    from musubi_tuner.ltxv2.autoencoders.video_vae import TileSizes, VideoVAE, video_vae_fingerprint
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.runtime.device import DTYPES, pick_device
    from musubi_tuner.runtime.processes import processes

    datasets = load_dataset_config(config.data.dataset_config)
    checkpoint = open_checkpoint(first_given(("--vae", config.vae.vae), ("--ltxv2_model", config.vae.ltxv2_model)))
    fingerprint = video_vae_fingerprint(checkpoint)
    tiles = TileSizes(pixels=config.vae.vae_spatial_tile_size, frames=config.vae.vae_temporal_tile_size)
    with processes() as group:
        device = pick_device(config.work.device)
        dtype = DTYPES[config.vae.vae_dtype or ("float32" if device.type == "cpu" else "bfloat16")]

        def metadata(clip: Clip, kind: str) -> dict[str, str]:
            return {"encoder_fingerprint": fingerprint, "encoding": picture_encoding(sidecar_size(clip, kind), dtype, tiles)}

        def load(jobs: Sequence[ClipJob], kind: str) -> Callable[[Sequence[Tensor]], list[HostCopy]]:
            vae = VideoVAE.load(checkpoint, device=device, dtype=dtype, parts=("encoder",), tiles=tiles)
            times = use_fastest_layout(vae, [sidecar_size(job.content.clip, kind) for job in jobs], config.work.batch_size)
            if times and group.is_main:
                log.info("%s", times.describe())
            return keyframe_encoder(vae) if kind == "keyframes" else frame_encoder(vae)

        plans = plan_and_index(datasets, PROG, config.data, config.work, group)
        encoder = Encoder(model_version=checkpoint.model_version, metadata=metadata, load=load)
        code = cache_sidecars(plans, PROG, encoder, config.data, config.work, group)
        if group.is_main and chosen_mode(config.data) == "video":
            _warn_of_audio(plans)
        return code


def _warn_of_audio(plans: Sequence[DatasetPlan]) -> None:
    with_audio = sum(planned.clip.has_audio for plan in plans if plan.spec.kind == "video" for planned in plan.clips)
    if with_audio:
        log.warning(
            "WARNING: %d clip(s) have sound, which --ltx_mode video (the default) ignores. To train it, run "
            "ltxv2_cache_audio_latents.py too and give the other programs --ltx_mode av.",
            with_audio,
        )


if __name__ == "__main__":
    run_program(main)
