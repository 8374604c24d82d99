"""Mirror images (`flip_x`): clips of their own with pictures, references and masks flipped left to right before any encoder.

They share the sound, the caption and what is played beside the sound with the clip that they mirror.
"""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from musubi_tuner.cache.index import Clip
from musubi_tuner.cache.names import mirrored_name
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.encoding.references import PlanRow
from musubi_tuner.sources.listing import Source, is_mirrored, side_named


def with_mirror_images(spec: DatasetSpec, source: Source, clips: Sequence[Clip], row: PlanRow) -> tuple[list[Clip], PlanRow]:
    """The clips of one source and, where `flip_x` asks for them, their mirror images; the row says why there are none."""
    if not spec.flip_x:
        return list(clips), row
    if not is_mirrored(spec, source.caption):
        note = f"not mirrored, as its caption says '{side_named(source.caption)}'"
        return list(clips), dataclasses.replace(row, note=f"{row.note}, {note}" if row.note else note)
    mirrored = [_mirror_image(clip) for clip in clips]
    return [*clips, *mirrored], dataclasses.replace(row, clips=row.clips + len(mirrored))


def as_planned(frames: Tensor, clip: Clip) -> Tensor:
    """Frames (F, H, W, 3) as decoded -> flipped left to right where the clip is a mirror image."""
    return frames.flip(2) if clip.mirrored else frames


def _mirror_image(clip: Clip) -> Clip:
    assert clip.latents is not None
    return dataclasses.replace(clip, key=f"{clip.key}:mirrored", latents=mirrored_name(clip.latents), mirrored=True)
