"""Frames of planned clips -> video and image latents in cache files."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from musubi_tuner.cache import store
from musubi_tuner.cache.expected import latents_of
from musubi_tuner.cache.fingerprint import canonical
from musubi_tuner.cache.index import Clip
from musubi_tuner.cache.keys import latents_key
from musubi_tuner.encoding.jobs import Job, list_jobs
from musubi_tuner.encoding.pipeline import Stages
from musubi_tuner.encoding.plan import DatasetPlan
from musubi_tuner.ltxv2.frozen.video_vae import TileSizes, VideoVAE
from musubi_tuner.ltxv2.geometry import LATENT_CHANNELS, latent_frames, latent_size
from musubi_tuner.media.picture import cover_and_crop, read_picture
from musubi_tuner.media.probe import VideoInfo
from musubi_tuner.media.video import choose_frames, read_frames
from musubi_tuner.runtime.transfer import HostCopy, settled, to_device, to_host

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


def latent_stages(vae: VideoVAE) -> Stages[Job, Tensor, HostCopy, Tensor]:
    """Decode frames, encode them with the VAE, write latents."""

    def encode(frames: Sequence[Tensor]) -> list[HostCopy]:
        pixels = to_device(torch.stack(list(frames)), vae.device).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)
        return [to_host(latents) for latents in vae.encode(pixels).to(STORED_DTYPE)]

    return Stages(decode=_decode, shape=lambda frames: frames.shape, encode=encode, settle=settled, write=_write)


def _decode(job: Job) -> Tensor:
    """(F, H, W, 3) uint8"""
    clip, found = job.planned.clip, job.planned.found
    if isinstance(found, VideoInfo):
        places = choose_frames(found, clip.fps, clip.start_frame, clip.frames)
        return read_frames(found, places, clip.width, clip.height)
    return cover_and_crop(read_picture(job.planned.source.path), clip.width, clip.height)[None]


def _write(job: Job, latents: Tensor) -> None:
    _, frames, height, width = latents.shape
    key = latents_key(frames, height, width, latents.dtype)
    store.write(job.target, {key: latents}, {**job.expected, **job.people})


def _encoding(clip: Clip, dtype: torch.dtype, tiles: TileSizes) -> str:
    """What shapes the latents besides window and weights; tile sizes only where tiles are used."""
    space = [tiles.pixels, tiles.pixel_overlap] if max(clip.width, clip.height) > tiles.pixels else None
    time = [tiles.frames, tiles.frame_overlap] if latent_frames(clip.frames) > tiles.time.size else None
    value: Mapping[str, object] = {
        "stored": str(STORED_DTYPE).removeprefix("torch."),
        "computed": str(dtype).removeprefix("torch."),
        "resize": "bicubic cover, center crop",
        "tiles": {"space": space, "time": time},
    }
    return canonical(value)


def _size_of(clip: Clip) -> int:
    width, height = latent_size(clip.width, clip.height)
    return LATENT_CHANNELS * latent_frames(clip.frames) * height * width * STORED_DTYPE.itemsize
