"""Masks of planned clips -> shares of white in each latent cell. No encoder is needed."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.cache import store
from musubi_tuner.cache.index import Clip
from musubi_tuner.cache.keys import VIDEO_MASK_KEY
from musubi_tuner.cache.sidecars import mask_of
from musubi_tuner.encoding.jobs import Job, list_jobs
from musubi_tuner.encoding.mirror import as_planned
from musubi_tuner.encoding.pipeline import Stages
from musubi_tuner.encoding.plan import DatasetPlan
from musubi_tuner.ltxv2.geometry import SPATIAL_SCALE, TEMPORAL_SCALE, latent_frames, latent_size
from musubi_tuner.media.picture import cover_and_crop, read_picture
from musubi_tuner.media.probe import VideoInfo
from musubi_tuner.media.video import choose_frames, read_frames
from musubi_tuner.runtime.errors import UserError


def mask_jobs(plans: Sequence[DatasetPlan], *, model_version: str) -> tuple[Job, ...]:
    """Jobs for the clips that have masks."""
    return list_jobs(plans, name_of=lambda clip: clip.mask, expected_of=mask_of, size_of=_size_of, model_version=model_version)


def mask_stages() -> Stages[Job, Tensor, Tensor, Tensor]:
    """Decode frames as those of the clip, take means of cells, write."""
    return Stages(decode=_decode, shape=lambda cells: cells.shape, encode=list, settle=lambda cells: cells, write=_write)


def cells_of(frames: Tensor) -> Tensor:
    """(F, H, W, 3) uint8 -> (f, h, w) float32 share of white in each latent cell: the first is of one frame, each other of eight."""
    gray = frames.float().mean(-1) / 255
    space = F.avg_pool2d(gray[:, None], SPATIAL_SCALE)[:, 0]
    return torch.cat([space[:1], space[1:].unflatten(0, (-1, TEMPORAL_SCALE)).mean(1)]) if len(space) > 1 else space


def _decode(job: Job) -> Tensor:
    clip, found, path = job.planned.clip, job.planned.beside.mask, job.planned.source.mask
    assert path is not None
    if isinstance(found, VideoInfo):
        frames = read_frames(found, choose_frames(found, clip.fps, clip.start_frame, clip.frames), clip.width, clip.height)
    else:
        frames = cover_and_crop(read_picture(path), clip.width, clip.height)[None]
    cells = cells_of(as_planned(frames, clip))
    if not isinstance(found, VideoInfo):  # a picture stands for all frames
        cells = cells.expand(latent_frames(clip.frames), -1, -1)
    if not bool((cells > 0.5).any()):
        raise UserError(f"{path}: is black in all of {clip.key}, so nothing of it would count. White is what counts; mend the mask.")
    return cells.contiguous()


def _write(job: Job, cells: Tensor) -> None:
    store.write(job.target, {VIDEO_MASK_KEY: cells}, {**job.expected, **job.people})


def _size_of(clip: Clip) -> int:
    width, height = latent_size(clip.width, clip.height)
    return latent_frames(clip.frames) * height * width * torch.float32.itemsize
