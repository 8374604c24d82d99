"""Planning references: what is shown beside a clip (IC-LoRA) covers the same seconds, at a size and rate of its own."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.index import Clip
from musubi_tuner.cache.names import reference_sidecar_name
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.config.sources import EXTENSIONS, Source
from musubi_tuner.media.picture import picture_size
from musubi_tuner.media.probe import VideoInfo, probe_video
from musubi_tuner.media.video import sampled_length


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRow:
    """What became of one source."""

    source: str
    outcome: str
    """`kept`, `trimmed`, `dropped` or `failed`."""
    clips: int
    note: str


def probe_reference(path: Path) -> VideoInfo | tuple[int, int]:
    """A video, or a picture's size.

    Raises:
        UserError: it cannot be read.
    """
    return picture_size(path) if path.suffix.lower() in EXTENSIONS["image"] else probe_video(path)


def with_references(
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
            there = sampled_length(found, clip.fps)
            last = clip.start_frame + clip.frames
            if there < last:
                return [], _failed(
                    source, f"its reference {source.reference} has {there} frames at {clip.fps:g} fps, its clips reach {last}"
                )
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
