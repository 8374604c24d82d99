"""An official tree -> clips as our index lists them, and the dataset TOML that goes with them."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.fingerprint import file_fingerprint
from musubi_tuner.cache.index import Clip
from musubi_tuner.cache.names import (
    audio_only_name,
    audio_sidecar_name,
    image_latent_name,
    mask_sidecar_name,
    reference_audio_name,
    reference_sidecar_name,
    text_name,
    video_latent_name,
)
from musubi_tuner.conversion.official_dataset.files import LATENTS, MASK, REFERENCE, REFERENCE_SOUND, SOUND, Sample, read_sound, read_video
from musubi_tuner.ltxv2.geometry import AUDIO_LATENTS_PER_SECOND, SPATIAL_SCALE, TEMPORAL_SCALE
from musubi_tuner.runtime.errors import UserError

CACHE_FOLDER = "cache"
_STILL_FPS = 24.0
_NO_MEDIA = "media that are not needed"
"""A folder that is not there: training goes on without media, and caching programs stop before they write anything."""


@dataclass(frozen=True, slots=True)
class ImportedItem:
    """A clip and the files it comes from."""

    sample: Sample
    clip: Clip


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportPlan:
    """What is made of a tree."""

    items: tuple[ImportedItem, ...]
    """Of the kinds `video`, `image` and `audio`, each a dataset of its own."""
    reference_downscale: int = 1
    reference_temporal_scale: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in ("video", "image", "audio") if any(item.clip.kind == kind for item in self.items))

    def clips(self, kind: str) -> tuple[Clip, ...]:
        return tuple(item.clip for item in self.items if item.clip.kind == kind)


def plan_import(samples: Sequence[Sample], mode: str, source_fps: float | None) -> ImportPlan:
    """Look into all files.

    Args:
        source_fps: rate of clips whose files tell none.

    Raises:
        UserError: a file of another form, a clip without a rate, or references of several scales.
    """
    if mode == "audio":
        return ImportPlan(items=tuple(ImportedItem(sample, _with_reference_sound(sample, _sound_clip(sample))) for sample in samples))
    clips = [_picture_clip(sample, mode, source_fps) for sample in samples]
    rates = Counter(clip.fps for clip in clips if clip.kind == "video")
    still_fps = min(rates, key=lambda rate: (-rates[rate], rate)) if rates else _STILL_FPS
    clips = [dataclasses.replace(clip, fps=still_fps, end_seconds=1 / still_fps) if clip.kind == "image" else clip for clip in clips]
    scales = Counter(scale for sample, clip in zip(samples, clips, strict=True) if (scale := _reference_scale(sample, clip)) is not None)
    if len({space for space, _ in scales}) > 1 or len({time for _, time in scales if time}) > 1:
        raise UserError(
            f"{samples[0].files[REFERENCE].parent}: references of several scales (space, time): {sorted(scales)}. A LoRA has one."
        )
    space, time = (max((scale[axis] for scale in scales), default=1) or 1 for axis in (0, 1))
    clips = [_with_files_beside(sample, clip, time) for sample, clip in zip(samples, clips, strict=True)]
    items = tuple(ImportedItem(sample, clip) for sample, clip in zip(samples, clips, strict=True))
    return ImportPlan(items=items, reference_downscale=space, reference_temporal_scale=time)


def dataset_toml(plan: ImportPlan, tree: Path) -> str:
    """The dataset file of an import; the user sets batch sizes, repeats and weights in it."""
    lines = [
        f"# Imported from {tree.as_posix()}".replace("\n", " "),
        "# Training reads the caches alone; there are no media. batch_size, num_repeats and the loss weights may be changed.",
        "",
        "[general]",
        f"reference_downscale = {plan.reference_downscale}",
        f"reference_temporal_scale = {plan.reference_temporal_scale}",
    ]
    for kind in plan.kinds:
        clips = plan.clips(kind)
        lines += ["", "[[datasets]]", f"{kind}_directory = {json.dumps(_NO_MEDIA)}", f'cache_directory = "{CACHE_FOLDER}"']
        if kind != "audio":
            sizes = Counter((clip.width, clip.height) for clip in clips)
            lines.append(f"resolution = {list(min(sizes, key=lambda size: (-sizes[size], size)))}")
        if kind == "video":
            lines.append(f"target_frames = {sorted({clip.frames for clip in clips})}")
        lines += ["batch_size = 1", "num_repeats = 1"]
    return "\n".join(lines) + "\n"


def _picture_clip(sample: Sample, mode: str, source_fps: float | None) -> Clip:
    video = read_video(sample.files[LATENTS])
    _, cells, rows, columns = video.latents.shape
    frames, width, height = (cells - 1) * TEMPORAL_SCALE + 1, columns * SPATIAL_SCALE, rows * SPATIAL_SCALE
    is_still = frames == 1  # stills have 1.0 written as their rate
    fps = video.fps or source_fps
    if fps is None and not is_still:
        raise UserError(f"{sample.files[LATENTS]}: tells no 'fps'. Give the rate of such clips with --source_fps (24 as a rule).")
    latents = image_latent_name(sample.stem, width, height) if is_still else video_latent_name(sample.stem, 0, frames, width, height)
    sound = sample.files.get(SOUND)
    return Clip(
        key=sample.name,
        kind="image" if is_still else "video",
        source=f"{sample.name}.pt",
        stem=sample.stem,
        source_fingerprint=file_fingerprint(sample.files[LATENTS]),
        start_seconds=0.0,
        end_seconds=1.0 if is_still else frames / fps,
        fps=1.0 if is_still else fps,
        start_frame=0,
        frames=frames,
        width=width,
        height=height,
        original_width=width,
        original_height=height,
        latents=latents,
        audio=None if is_still else audio_sidecar_name(latents),
        text=text_name(sample.stem),
        has_audio=sound is not None and not is_still,
        sound_source="" if sound is None or is_still else sound.as_posix(),
        sound_fingerprint="" if sound is None or is_still else file_fingerprint(sound),
    )


def _sound_clip(sample: Sample) -> Clip:
    seconds = read_sound(sample.files[SOUND]).seconds
    return Clip(
        key=sample.name,
        kind="audio",
        source=f"{sample.name}.pt",
        stem=sample.stem,
        source_fingerprint=file_fingerprint(sample.files[SOUND]),
        start_seconds=0.0,
        end_seconds=seconds,
        fps=float(AUDIO_LATENTS_PER_SECOND),
        start_frame=0,
        frames=0,
        width=0,
        height=0,
        original_width=0,
        original_height=0,
        latents=None,
        audio=audio_only_name(sample.stem, 0, round(seconds * 1000)),
        text=text_name(sample.stem),
        has_audio=True,
    )


def _reference_scale(sample: Sample, clip: Clip) -> tuple[int, int] | None:
    """How many times coarser a reference is in space and time; 0 in time where one of the two is a picture. None: there is none."""
    if REFERENCE not in sample.files:
        return None
    _, cells, rows, columns = read_video(sample.files[REFERENCE]).latents.shape
    frames = (cells - 1) * TEMPORAL_SCALE + 1
    space, left = divmod(clip.width, columns * SPATIAL_SCALE)
    time, over = divmod(clip.frames - 1, frames - 1) if frames > 1 and clip.frames > 1 else (0, int(frames > clip.frames))
    if left or over or not space or rows * SPATIAL_SCALE * space != clip.height:
        raise UserError(
            f"{sample.files[REFERENCE]}: {columns * SPATIAL_SCALE}x{rows * SPATIAL_SCALE}x{frames}, which is no whole part of its clip's "
            f"{clip.width}x{clip.height}x{clip.frames} (width x height x frames)."
        )
    return space, time


def _with_files_beside(sample: Sample, clip: Clip, time: int) -> Clip:
    assert clip.latents is not None
    if REFERENCE in sample.files:
        path = sample.files[REFERENCE]
        _, cells, rows, columns = read_video(path).latents.shape
        clip = dataclasses.replace(
            clip,
            reference=reference_sidecar_name(clip.latents),
            reference_source=path.as_posix(),
            reference_fingerprint=file_fingerprint(path),
            reference_frames=(cells - 1) * TEMPORAL_SCALE + 1,
            reference_fps=clip.fps / time if cells > 1 else clip.fps,
            reference_width=columns * SPATIAL_SCALE,
            reference_height=rows * SPATIAL_SCALE,
        )
    if MASK in sample.files:
        path = sample.files[MASK]
        clip = dataclasses.replace(
            clip, mask=mask_sidecar_name(clip.latents), mask_source=path.as_posix(), mask_fingerprint=file_fingerprint(path)
        )
    return _with_reference_sound(sample, clip)


def _with_reference_sound(sample: Sample, clip: Clip) -> Clip:
    path = sample.files.get(REFERENCE_SOUND)
    if path is None or clip.audio is None:
        return clip
    return dataclasses.replace(
        clip,
        reference_sound=reference_audio_name(clip.audio),
        reference_sound_source=path.as_posix(),
        reference_sound_fingerprint=file_fingerprint(path),
    )
