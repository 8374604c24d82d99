"""Files that belong to a source: what is shown beside it (IC-LoRA) covers the same seconds, at a size and rate of its own; what is
played beside its sound starts at its own beginning; sound of its own file is cut by the same seconds as the pictures."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.fingerprint import file_fingerprint
from musubi_tuner.cache.index import Clip
from musubi_tuner.cache.names import mask_sidecar_name, reference_audio_name, reference_sidecar_name
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.media.picture import picture_size
from musubi_tuner.media.probe import SoundInfo, VideoInfo, probe_sound, probe_video
from musubi_tuner.media.video import sampled_length
from musubi_tuner.sources.listing import EXTENSIONS, Source


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRow:
    """What became of one source."""

    source: str
    outcome: str
    """`kept`, `trimmed`, `dropped` or `failed`."""
    clips: int
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesBeside:
    """What was found in the files that belong to a source; None = there is no such file."""

    reference: VideoInfo | tuple[int, int] | None = None
    """A picture has its size."""
    reference_fingerprint: str = ""
    mask: VideoInfo | tuple[int, int] | None = None
    mask_fingerprint: str = ""
    sound: SoundInfo | None = None
    sound_fingerprint: str = ""
    reference_sound: SoundInfo | None = None
    reference_sound_fingerprint: str = ""


def probe_files_beside(source: Source) -> FilesBeside:
    """Look into the files that belong to a source.

    Raises:
        UserError: one cannot be read.
    """
    return FilesBeside(
        reference=None if source.reference is None else _probe_pictures(source.reference),
        reference_fingerprint="" if source.reference is None else file_fingerprint(source.reference),
        mask=None if source.mask is None else _probe_pictures(source.mask),
        mask_fingerprint="" if source.mask is None else file_fingerprint(source.mask),
        sound=None if source.sound is None else probe_sound(source.sound),
        sound_fingerprint="" if source.sound is None else file_fingerprint(source.sound),
        reference_sound=None if source.reference_sound is None else probe_sound(source.reference_sound),
        reference_sound_fingerprint="" if source.reference_sound is None else file_fingerprint(source.reference_sound),
    )


def with_files_beside(
    spec: DatasetSpec, source: Source, clips: Sequence[Clip], row: PlanRow, beside: FilesBeside
) -> tuple[list[Clip], PlanRow]:
    """The clips with what belongs to them; none, and the reason, where a reference does not reach as far as its clips."""
    planned = [_with_sounds(source, clip, beside) for clip in clips]
    if beside.mask is not None:
        if short := _too_short("mask", source.mask, beside.mask, planned):
            return [], _failed(source, short)
        planned = [_with_mask(source, clip, beside) for clip in planned]
    if beside.reference is None:
        return planned, row
    if short := _too_short("reference", source.reference, beside.reference, planned):
        return [], _failed(source, short)
    return _with_references(spec, source, planned, row, beside.reference, beside.reference_fingerprint)


def _probe_pictures(path: Path) -> VideoInfo | tuple[int, int]:
    return picture_size(path) if path.suffix.lower() in EXTENSIONS["image"] else probe_video(path)


def _too_short(what: str, path: Path | None, found: VideoInfo | tuple[int, int], clips: Sequence[Clip]) -> str:
    """Why a video that belongs to clips does not reach as far as they do; empty where it does."""
    if not isinstance(found, VideoInfo):
        return ""
    for clip in clips:
        there, last = sampled_length(found, clip.fps), clip.start_frame + clip.frames
        if there < last:
            return f"its {what} {path} has {there} frames at {clip.fps:g} fps, its clips reach {last}"
    return ""


def _with_mask(source: Source, clip: Clip, beside: FilesBeside) -> Clip:
    assert clip.latents is not None and source.mask is not None
    return dataclasses.replace(
        clip, mask=mask_sidecar_name(clip.latents), mask_source=source.mask.as_posix(), mask_fingerprint=beside.mask_fingerprint
    )


def _with_sounds(source: Source, clip: Clip, beside: FilesBeside) -> Clip:
    if source.sound is not None:
        clip = dataclasses.replace(clip, has_audio=True, sound_source=source.sound.as_posix(), sound_fingerprint=beside.sound_fingerprint)
    if source.reference_sound is not None and clip.audio is not None:
        clip = dataclasses.replace(
            clip,
            reference_sound=reference_audio_name(clip.audio),
            reference_sound_source=source.reference_sound.as_posix(),
            reference_sound_fingerprint=beside.reference_sound_fingerprint,
        )
    return clip


def _with_references(
    spec: DatasetSpec, source: Source, clips: Sequence[Clip], row: PlanRow, found: VideoInfo | tuple[int, int], fingerprint: str
) -> tuple[list[Clip], PlanRow]:
    """The clips with their references; none, and the reason, where a reference does not reach as far as its clips."""
    scale = spec.reference_temporal_scale
    planned = []
    for clip in clips:
        frames, fps = 1, clip.fps
        if isinstance(found, VideoInfo) and clip.frames > 1:
            frames, fps = (clip.frames - 1) // scale + 1, clip.fps / scale
            if (clip.frames - 1) % (8 * scale):
                return [], _failed(source, f"{clip.frames} frames with reference_temporal_scale = {scale}: must be {8 * scale}n+1")
        assert clip.latents is not None and source.reference is not None
        planned.append(
            dataclasses.replace(
                clip,
                reference=reference_sidecar_name(clip.latents),
                reference_source=source.reference.as_posix(),
                reference_fingerprint=fingerprint,
                reference_frames=frames,
                reference_fps=fps,
                reference_width=clip.width // spec.reference_downscale,
                reference_height=clip.height // spec.reference_downscale,
            )
        )
    return planned, row


def _failed(source: Source, note: str) -> PlanRow:
    return PlanRow(source=source.name, outcome="failed", clips=0, note=note)
