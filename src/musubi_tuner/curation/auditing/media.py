"""What the media say, decoded: sound that is clipped, silent or shifted, pictures that stand still, files that are damaged."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from musubi_tuner.cache.clip import Clip
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.config.dataset_audit import Kind
from musubi_tuner.curation.auditing.findings import Finding
from musubi_tuner.encoding.audio import decode_audio, sound_facts
from musubi_tuner.encoding.look import Probed
from musubi_tuner.encoding.plan import PlannedClip
from musubi_tuner.media.probe import VideoInfo
from musubi_tuner.media.video import choose_frames, read_frames
from musubi_tuner.runtime.errors import UserError

_PICTURES = 8
"""Frames of a clip that are compared."""
_SIDE = 64
"""Of these pictures: small, so that the noise of film and codec averages out."""
_STILL = 0.5
"""Of 255: mean difference of a pixel, up to which two pictures count as the same."""


def media_findings(spec: DatasetSpec, clip: Clip, probed: Probed) -> Iterator[Finding]:
    """Of one clip, which is decoded."""
    planned = PlannedClip(clip=clip, caption="", media=probed.media, files=probed.files, supervise_silence=spec.supervise_silence)
    try:
        if clip.has_audio:
            yield from _sound(spec, planned)
        if clip.kind == "video" and isinstance(probed.media.found, VideoInfo) and clip.frames > 1:
            yield from _motion(spec, clip, probed.media.found)
    except UserError as error:
        yield _finding(spec, clip, "unreadable", str(error))


def _sound(spec: DatasetSpec, planned: PlannedClip) -> Iterator[Finding]:
    clip, facts = planned.clip, sound_facts(planned, decode_audio(planned))
    if facts is None:
        return
    if facts.is_silent:
        yield _finding(spec, clip, "silent_sound", "nothing above -80 dBFS in its seconds, their ends apart", facts.peak)
        return
    if facts.is_clipped:
        text = f"{facts.at_full_scale:.1%} of its samples at full scale"
        yield _finding(spec, clip, "clipped_sound", text, facts.at_full_scale)
    if facts.late > 1 / clip.fps:
        yield _finding(spec, clip, "late_sound", f"begins {facts.late:.2f} s after the pictures", facts.late)
    if facts.early > 1 / clip.fps:
        yield _finding(spec, clip, "late_sound", f"ends {facts.early:.2f} s before the pictures", facts.early)


def _motion(spec: DatasetSpec, clip: Clip, info: VideoInfo) -> Iterator[Finding]:
    places = choose_frames(info, clip.fps, clip.start_frame, clip.frames)
    count = min(_PICTURES, len(places))
    chosen = [places[round(number * (len(places) - 1) / max(1, count - 1))] for number in range(count)]
    pictures = read_frames(info, chosen, _SIDE, _SIDE)
    largest = max(_difference(before, after) for before, after in pairwise(pictures))
    if largest < _STILL:
        text = f"its pictures differ by {largest:.2f} of 255 at most"
        yield _finding(spec, clip, "static", text, largest)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().mean())


def _finding(spec: DatasetSpec, clip: Clip, kind: Kind, text: str, value: float | None = None) -> Finding:
    return Finding(kind=kind, dataset=spec.label, name=clip.key, text=text, clip=clip.key, value=value)
