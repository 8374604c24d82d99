"""Frames of planned clips -> video and image latents, references, and masks as shares of white in each latent cell."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.cache.clip import Clip
from musubi_tuner.cache.store import canonical
from musubi_tuner.encoding.layout import ClipSize
from musubi_tuner.encoding.look import MediaFile
from musubi_tuner.encoding.plan import PlannedClip
from musubi_tuner.ltxv2.autoencoders.video_vae import TileSizes, VideoVAE
from musubi_tuner.ltxv2.geometry import LATENT_CHANNELS, SPATIAL_SCALE, TEMPORAL_SCALE, latent_frames, latent_size
from musubi_tuner.media.picture import cover_and_crop, read_picture
from musubi_tuner.media.probe import VideoInfo
from musubi_tuner.media.video import choose_frames, read_frames
from musubi_tuner.runtime.device import HostCopy, stacked_on_device, to_host
from musubi_tuner.runtime.errors import UserError

STORED_DTYPE = torch.bfloat16


def decode_frames(planned: PlannedClip) -> Tensor:
    """(F, H, W, 3) uint8 of the clip itself."""
    return frames_of(planned.clip, planned.media)


def decode_reference(planned: PlannedClip) -> Tensor:
    """(F, H, W, 3) uint8 at the reference's own size and rate, from the clip's first second on."""
    clip, own = planned.clip, planned.clip.sidecars["reference"]
    start = clip.start_seconds * own.fps
    return _frames(clip, planned.files["reference"], start, own.fps, ClipSize(own.frames, own.height, own.width))


def decode_keyframes(planned: PlannedClip) -> Tensor:
    """(K, H, W, 3) uint8: frames of the clip itself."""
    clip = planned.clip
    places = choose_frames(planned.media.video, clip.fps, clip.start_frame, clip.frames)
    frames = read_frames(planned.media.video, [places[frame] for frame in clip.sidecars["keyframes"].at], clip.width, clip.height)
    return frames.flip(2) if clip.mirrored else frames


def keyframe_numbers(planned: PlannedClip) -> tuple[Tensor]:
    """(K,) int32: which frames of the clip they are."""
    return (torch.tensor(planned.clip.sidecars["keyframes"].at, dtype=torch.int32),)


def decode_mask(planned: PlannedClip) -> Tensor:
    """(f, h, w) float32; a picture stands for all frames.

    Raises:
        UserError: it is black in all of the clip.
    """
    clip, file = planned.clip, planned.files["mask"]
    cells = cells_of(frames_of(clip, file))
    if not isinstance(file.found, VideoInfo):
        cells = cells.expand(latent_frames(clip.frames), -1, -1)
    if not bool((cells > 0.5).any()):
        raise UserError(f"{file.path}: is black in all of {clip.key}, so nothing of it would count. White is what counts; fix the mask.")
    return cells.contiguous()


def frames_of(clip: Clip, file: MediaFile) -> Tensor:
    """(F, H, W, 3) uint8 of a file that is cut and resized as the clip; of a picture one frame."""
    return _frames(clip, file, clip.start_frame, clip.fps, ClipSize(clip.frames, clip.height, clip.width))


def _frames(clip: Clip, file: MediaFile, start: float, fps: float, size: ClipSize) -> Tensor:
    if isinstance(file.found, VideoInfo):
        frames = read_frames(file.found, choose_frames(file.found, fps, start, size.frames), size.width, size.height)
    else:
        frames = cover_and_crop(read_picture(file.path), size.width, size.height)[None]
    return frames.flip(2) if clip.mirrored else frames


def cells_of(frames: Tensor) -> Tensor:
    """(F, H, W, 3) uint8 -> (f, h, w) float32 share of white in each latent cell: the first is of one frame, each other of eight."""
    gray = frames.float().mean(-1) / 255
    space = F.avg_pool2d(gray[:, None], SPATIAL_SCALE)[:, 0]
    return torch.cat([space[:1], space[1:].unflatten(0, (-1, TEMPORAL_SCALE)).mean(1)]) if len(space) > 1 else space


def frame_encoder(vae: VideoVAE) -> Callable[[Sequence[Tensor]], list[HostCopy]]:
    """(F, H, W, 3) frames of clips of one size -> their latents, on the way to the host."""

    def encode(frames: Sequence[Tensor]) -> list[HostCopy]:
        return [to_host(latents) for latents in vae.encode_frames(stacked_on_device(frames, vae.device)).to(STORED_DTYPE)]

    return encode


def keyframe_encoder(vae: VideoVAE) -> Callable[[Sequence[Tensor]], list[HostCopy]]:
    """(K, H, W, 3) pictures of clips of one size -> (128, K, h, w) latents, on the way to the host: each picture encoded alone."""

    def encode(pictures: Sequence[Tensor]) -> list[HostCopy]:
        found = []
        for clip in pictures:
            alone = [vae.encode_frames(picture[None, None]) for picture in stacked_on_device(list(clip), vae.device)]
            found.append(to_host(torch.cat(alone, dim=2)[0].to(STORED_DTYPE)))
        return found

    return encode


def sidecar_size(clip: Clip, kind: str) -> ClipSize:
    """Of the pictures that a sidecar is made of: its own where it has one, else the clip's."""
    own = clip.sidecars[kind]
    return ClipSize(own.frames, own.height, own.width) if own.frames else ClipSize(clip.frames, clip.height, clip.width)


def picture_encoding(size: ClipSize, dtype: torch.dtype, tiles: TileSizes) -> str:
    """What shapes latents besides window and weights; tile sizes only where tiles are used.

    Args:
        dtype: that the VAE computes in.
    """
    space = [tiles.pixels, tiles.pixel_overlap] if max(size.width, size.height) > tiles.pixels else None
    value: Mapping[str, object] = {
        "stored": str(STORED_DTYPE).removeprefix("torch."),
        "computed": str(dtype).removeprefix("torch."),
        "resize": "bicubic cover, center crop",
        "tiles": {"space": space, "time": None},
    }
    return canonical(value)


def latent_bytes(clip: Clip, kind: str) -> int:
    return LATENT_CHANNELS * STORED_DTYPE.itemsize * _cells(sidecar_size(clip, kind))


def keyframe_bytes(clip: Clip, kind: str) -> int:
    return latent_bytes(clip, kind) * len(clip.sidecars[kind].at)


def mask_bytes(clip: Clip, kind: str) -> int:
    return torch.float32.itemsize * _cells(sidecar_size(clip, kind))


def _cells(size: ClipSize) -> int:
    width, height = latent_size(size.width, size.height)
    return latent_frames(size.frames) * height * width
