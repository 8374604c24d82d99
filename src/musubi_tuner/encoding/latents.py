"""Frames of planned clips -> video and image latents in cache files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from musubi_tuner.cache import store
from musubi_tuner.cache.fingerprint import canonical
from musubi_tuner.cache.index import Clip
from musubi_tuner.cache.keys import latents_key, reference_latents_key
from musubi_tuner.cache.sidecars import latents_of, reference_of
from musubi_tuner.encoding.jobs import Job, list_jobs
from musubi_tuner.encoding.layout import ClipSize
from musubi_tuner.encoding.mirror import as_planned
from musubi_tuner.encoding.pipeline import Stages
from musubi_tuner.encoding.plan import DatasetPlan
from musubi_tuner.ltxv2.autoencoders.video_vae import TileSizes, VideoVAE
from musubi_tuner.ltxv2.geometry import LATENT_CHANNELS, latent_frames, latent_size
from musubi_tuner.media.picture import cover_and_crop, read_picture
from musubi_tuner.media.probe import VideoInfo
from musubi_tuner.media.video import choose_frames, read_frames
from musubi_tuner.runtime.device import HostCopy, settled, stacked_on_device, to_host

STORED_DTYPE = torch.bfloat16


def latent_jobs(plans: Sequence[DatasetPlan], *, encoder: str, dtype: torch.dtype, tiles: TileSizes, model_version: str) -> tuple[Job, ...]:
    """Jobs for the clips that have pictures.

    Args:
        encoder: fingerprint of the video VAE.
        dtype: that the VAE computes in.
    """

    def expected(clip: Clip) -> dict[str, str]:
        return latents_of(clip) | {"encoder_fingerprint": encoder, "encoding": _encoding(clip, dtype, tiles)}

    return list_jobs(plans, name_of=lambda clip: clip.latents, expected_of=expected, size_of=_size_of, model_version=model_version)


def reference_jobs(
    plans: Sequence[DatasetPlan], *, encoder: str, dtype: torch.dtype, tiles: TileSizes, model_version: str
) -> tuple[Job, ...]:
    """Jobs for what is shown beside the clips; arguments as for `latent_jobs`."""

    def shown(clip: Clip) -> Clip:
        return replace(clip, width=clip.reference_width, height=clip.reference_height, frames=clip.reference_frames)

    def expected(clip: Clip) -> dict[str, str]:
        return reference_of(clip) | {"encoder_fingerprint": encoder, "encoding": _encoding(shown(clip), dtype, tiles)}

    return list_jobs(
        plans,
        name_of=lambda clip: clip.reference,
        expected_of=expected,
        size_of=lambda clip: _size_of(shown(clip)),
        model_version=model_version,
    )


def clip_size(job: Job) -> ClipSize:
    """What a job of `latent_jobs` encodes."""
    clip = job.planned.clip
    return ClipSize(clip.frames, clip.height, clip.width)


def reference_size(job: Job) -> ClipSize:
    """What a job of `reference_jobs` encodes."""
    clip = job.planned.clip
    return ClipSize(clip.reference_frames, clip.reference_height, clip.reference_width)


def reference_stages(vae: VideoVAE) -> Stages[Job, Tensor, HostCopy, Tensor]:
    """As `latent_stages`, of references."""
    return replace(latent_stages(vae), decode=_decode_reference, write=_write_reference)


def latent_stages(vae: VideoVAE) -> Stages[Job, Tensor, HostCopy, Tensor]:
    """Decode frames, encode them with the VAE, write latents."""

    def encode(frames: Sequence[Tensor]) -> list[HostCopy]:
        clips = stacked_on_device(frames, vae.device)
        return [to_host(latents) for latents in vae.encode_frames(clips).to(STORED_DTYPE)]

    return Stages(decode=_decode, shape=lambda frames: frames.shape, encode=encode, settle=settled, write=_write)


def _decode(job: Job) -> Tensor:
    """(F, H, W, 3) uint8"""
    clip, found = job.planned.clip, job.planned.found
    if isinstance(found, VideoInfo):
        places = choose_frames(found, clip.fps, clip.start_frame, clip.frames)
        return as_planned(read_frames(found, places, clip.width, clip.height), clip)
    return as_planned(cover_and_crop(read_picture(job.planned.source.path), clip.width, clip.height)[None], clip)


def _decode_reference(job: Job) -> Tensor:
    clip, found, path = job.planned.clip, job.planned.beside.reference, job.planned.source.reference
    size = (clip.reference_width, clip.reference_height)
    if isinstance(found, VideoInfo):
        start = clip.start_seconds * clip.reference_fps
        return as_planned(read_frames(found, choose_frames(found, clip.reference_fps, start, clip.reference_frames), *size), clip)
    assert path is not None
    return as_planned(cover_and_crop(read_picture(path), *size)[None], clip)


def _write_reference(job: Job, latents: Tensor) -> None:
    _, frames, height, width = latents.shape
    store.write(job.target, {reference_latents_key(frames, height, width, latents.dtype): latents}, {**job.expected, **job.people})


def _write(job: Job, latents: Tensor) -> None:
    _, frames, height, width = latents.shape
    key = latents_key(frames, height, width, latents.dtype)
    store.write(job.target, {key: latents}, {**job.expected, **job.people})


def _encoding(clip: Clip, dtype: torch.dtype, tiles: TileSizes) -> str:
    """What shapes the latents besides window and weights; tile sizes only where tiles are used."""
    space = [tiles.pixels, tiles.pixel_overlap] if max(clip.width, clip.height) > tiles.pixels else None
    value: Mapping[str, object] = {
        "stored": str(STORED_DTYPE).removeprefix("torch."),
        "computed": str(dtype).removeprefix("torch."),
        "resize": "bicubic cover, center crop",
        "tiles": {"space": space, "time": None},
    }
    return canonical(value)


def _size_of(clip: Clip) -> int:
    width, height = latent_size(clip.width, clip.height)
    return LATENT_CHANNELS * latent_frames(clip.frames) * height * width * STORED_DTYPE.itemsize
