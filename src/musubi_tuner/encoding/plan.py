"""From sources to clips: what is cut from where, at which rate and size, and why something is left out.

Files that belong to a source go with its clips: a reference (IC-LoRA) covers the same seconds, at a size and rate of its own; a mask is
cut as the clip; sound of a file of its own is cut by the same seconds as the pictures; reference audio starts at its own beginning.

Mirror images (`flip_x`) are clips of their own: pictures, references and masks are flipped left to right before any encoder. They share
sound, caption and reference audio with the clip that they mirror.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from musubi_tuner.cache.clip import Clip, Sidecar
from musubi_tuner.cache.index import DatasetIndex, printable
from musubi_tuner.cache.names import audio_only_name, image_latent_name, mirrored_name, text_name, too_long, video_latent_name
from musubi_tuner.cache.receipts import SourceReceipt
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.config.dataset import DatasetConfig, DatasetSpec
from musubi_tuner.encoding.look import MediaFile, Probed, Unreadable, look_into
from musubi_tuner.encoding.windows import (
    AUDIO_UNITS_PER_SECOND,
    audio_windows,
    bucket_for,
    keyframe_places,
    target_lengths,
    video_windows,
)
from musubi_tuner.media.probe import AudioInfo, VideoInfo
from musubi_tuner.media.video import sampled_length
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.sources.listing import is_mirrored, list_all_sources, side_named

_STILL_FPS = 24.0
_USUAL_FPS = 60.5
"""Above it windows counted in frames are much shorter than people think."""
_HIGHEST_FPS = 1000.0
_THINNEST = 64
"""How many times one side of a picture may be the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedClip:
    """A clip and what is needed to decode it."""

    clip: Clip
    caption: str
    media: MediaFile
    files: Mapping[str, MediaFile]
    supervise_silence: bool = False
    """Its dataset's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRow:
    """What became of one source."""

    source: str
    outcome: str
    """`kept`, `trimmed`, `dropped` or `failed`."""
    clips: int
    note: str
    fps: float = 0.0
    """Of the source, as the next two; 0 where it has none."""
    frames: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    """What is likely not meant so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetPlan:
    """What is cut from one dataset."""

    spec: DatasetSpec
    clips: tuple[PlannedClip, ...]
    rows: tuple[PlanRow, ...]
    without_caption: tuple[str, ...]
    """Names of sources."""

    @property
    def mirrored(self) -> int:
        """Clips that are mirror images of others."""
        return sum(planned.clip.mirrored for planned in self.clips)

    @property
    def not_mirrored(self) -> int:
        """Clips without a mirror image though the dataset asks for them: their captions tell left from right."""
        return len(self.clips) - 2 * self.mirrored if self.spec.flip_x else 0

    @property
    def index(self) -> DatasetIndex:
        lost = tuple((row.source, row.note) for row in self.rows if row.outcome in ("dropped", "failed"))
        return DatasetIndex(settings=self.spec.settings(), clips=tuple(planned.clip for planned in self.clips), dropped=lost)

    @property
    def receipts(self) -> list[SourceReceipt]:
        return [
            SourceReceipt(
                source=row.source,
                outcome=row.outcome,
                note="; ".join(filter(None, (row.note, *row.warnings))),
                clips=row.clips,
                seconds=round(float(row.seconds), 3),
            )
            for row in self.rows
        ]


def plan_datasets(config: DatasetConfig, group: Processes, workers: int) -> tuple[DatasetPlan, ...]:
    """Plan all datasets of a config; the processes share the looking into files, and all get the same plans.

    Raises:
        UserError: what listing sources raises, a dataset of which no clip is usable, and `bucket_no_upscale` without buckets.
    """
    for spec in config.all:
        if spec.bucket_no_upscale and not spec.enable_bucket and spec.kind != "audio":  # here: what was cached so can be trained on
            raise UserError(
                f"{config.path}: {spec.label}: bucket_no_upscale = true and enable_bucket = false: without buckets all pictures get the "
                f"size {spec.resolution[0]}x{spec.resolution[1]}, and small ones are enlarged to it. Leave one of the two out."
            )
    listed = list_all_sources(config.all, require_captions=False)
    places = [(which, source) for which, sources in enumerate(listed) for source in sources]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        own = list(pool.map(lambda place: look_into(config.all[place[0]], place[1]), group.share(places)))
    parts = group.gather(own)
    probed = [parts[place % group.count][place // group.count] for place in range(len(places))]  # dealt round robin by `share`
    by_dataset = [[one for (owner, _), one in zip(places, probed, strict=True) if owner == which] for which in range(len(listed))]
    # stills sit where most clips of the config have their frames
    rates = Counter(
        spec.target_fps or one.media.found.fps
        for spec, found in zip(config.all, by_dataset, strict=True)
        for one in found
        if isinstance(one, Probed) and isinstance(one.media.found, VideoInfo)
    )
    still_fps = min(rates, key=lambda rate: (-rates[rate], rate)) if rates else _STILL_FPS
    return tuple(_plan_dataset(spec, found, still_fps) for spec, found in zip(config.all, by_dataset, strict=True))


def _plan_dataset(spec: DatasetSpec, probed: Sequence[Probed | Unreadable], still_fps: float) -> DatasetPlan:
    clips: list[PlannedClip] = []
    rows: list[PlanRow] = []
    for one in probed:
        if isinstance(one, Unreadable):
            rows.append(PlanRow(source=printable(one.source.name), outcome="failed", clips=0, note=one.problem))
            continue
        cut, row = _plan_source(spec, one, still_fps)
        clips += [
            PlannedClip(clip=clip, caption=one.source.caption, media=one.media, files=one.files, supervise_silence=spec.supervise_silence)
            for clip in cut
        ]
        rows.append(row)
    if not clips:
        reasons = "; ".join(f"{row.source}: {row.note}" for row in rows[:5]) + ("; ..." if len(rows) > 5 else "")
        too_short = spec.kind != "image" and any(row.outcome == "dropped" for row in rows)
        remedy = " Ask for shorter clips (target_frames, target_seconds), or give longer ones." if too_short else ""
        raise UserError(f"{spec.label}: none of the {len(rows)} sources in {spec.root} gives a usable clip ({reasons}).{remedy}")
    lacking = tuple(printable(one.source.name) for one in probed if not one.source.caption.strip())
    return DatasetPlan(spec=spec, clips=tuple(clips), rows=tuple(rows), without_caption=lacking)


def _plan_source(spec: DatasetSpec, one: Probed, still_fps: float) -> tuple[list[Clip], PlanRow]:
    """The clips of one source, and what became of it."""
    if spec.kind == "video":
        clips, outcome, notes = _cut_video(spec, one, one.media.video)
    elif spec.kind == "image":
        clips, outcome, notes = _cut_image(spec, one, one.media.shown, spec.target_fps or still_fps)
    else:
        clips, outcome, notes = _cut_audio(spec, one, one.media.audio)
    if clips and spec.flip_x:
        if is_mirrored(spec, one.source.caption):
            for clip in tuple(clips):
                sidecars = {**clip.sidecars, "latents": Sidecar(file=mirrored_name(clip.sidecars["latents"].file))}
                clips.append(dataclasses.replace(clip, key=f"{clip.key}:mirrored", mirrored=True, sidecars=sidecars))
        else:
            notes = [*notes, f"not mirrored, as its caption says '{side_named(one.source.caption)}'"]
    if spec.keyframes and clips:
        clips, problem = _with_keyframes(spec, clips)
        if problem:
            clips, outcome, notes = [], "failed", [problem]
    for name, file in one.files.items() if clips else ():
        clips, problem = _with_file(spec, clips, name, file)
        if problem:
            clips, outcome, notes = [], "failed", [problem]
            break
    if problem := too_long(sidecar.file for clip in clips for sidecar in clip.sidecars.values()):
        clips, outcome, notes = [], "failed", [problem]
    found = one.media.found
    row = PlanRow(source=one.source.name, outcome=outcome, clips=len(clips), note=", ".join(notes))
    if isinstance(found, VideoInfo):
        seconds, warnings = found.times[-1] + 1 / found.fps, _warnings(spec, found, clips)
        row = dataclasses.replace(row, fps=found.fps, frames=len(found.stamps), seconds=seconds, warnings=warnings)
    elif isinstance(found, AudioInfo):
        row = dataclasses.replace(row, seconds=found.end - found.start)
    return clips, row


def _warnings(spec: DatasetSpec, info: VideoInfo, clips: Sequence[Clip]) -> tuple[str, ...]:
    found = []
    if info.stored_frames:
        found.append(f"cut off: {len(info.stamps)} of the {info.stored_frames} frames that it lists are in it; copy or download it again")
    if info.lost_frames:
        found.append(f"begins between key frames: its first {info.lost_frames} frames cannot be decoded and are left out")
    if clips and info.fps > _USUAL_FPS and not spec.target_fps and not spec.source_fps:
        frames = max(clip.frames for clip in clips)
        found.append(f"{info.fps:g} fps: {frames} frames are {frames / info.fps:.2g} s; set target_fps")
    return tuple(found)


_Cut = tuple[list[Clip], str, list[str]]
"""Clips, outcome and notes of one source."""


def _cut_video(spec: DatasetSpec, one: Probed, info: VideoInfo) -> _Cut:
    fps = spec.target_fps or info.fps
    if fps > _HIGHEST_FPS:
        return [], "failed", [f"{info.fps:g} frames a second by its time stamps; set source_fps or target_fps"]
    if problem := _too_thin(info.width, info.height):
        return [], "failed", [problem]
    total = sampled_length(info, fps)
    windows = video_windows(spec, total, fps)
    size = bucket_for(spec, info.width, info.height)
    if not windows:
        shortest = min(target_lengths(spec, total, fps))
        return [], "dropped", [f"{total} frames at {fps:g} fps; the shortest clip asked for has {shortest}"]
    if size is None:
        return [], "dropped", [f"{info.width}x{info.height} is too small for bucket_no_upscale"]
    clips = []
    for window in windows:
        latents = video_latent_name(one.source.stem, window.start, window.count, *size)
        clip = _clip(
            spec,
            one,
            f"{one.source.name}:{window.start:05d}-{window.count:03d}",
            {"latents": latents, "audio": KINDS["audio"].name_beside(latents)},
            start_seconds=window.start / fps,
            end_seconds=(window.start + window.count) / fps,
            fps=fps,
            start_frame=window.start,
            frames=window.count,
        )
        clips.append(_with_size(clip, size, (info.width, info.height)))
    used = set().union(*(range(window.start, window.start + window.count) for window in windows))
    notes = [f"{len(used)} of {total} frames"] if len(used) < total else []
    if info.is_variable:
        notes.append(f"variable frame rate, sampled evenly at {fps:.3f}")
    if info.is_interlaced:
        notes.append("interlaced: what moves is combed, and so learned; deinterlace it first (ffmpeg -i IN -vf bwdif OUT)")
    if info.is_transparent:
        notes.append("transparent: the colors beneath, mostly black, are learned; lay it over a ground first")
    if info.colors.hdr:
        notes.append(f"HDR ({info.colors.hdr}), tone-mapped")
    elif info.colors.matrix:
        notes.append("colors read as BT.709, as it has no tag for them")
    if info.audio is not None and info.audio.rate and "audio" not in one.files:
        lacking = max(clip.end_seconds for clip in clips) - (info.audio.end - info.start)
        if lacking > 1 / fps:
            notes.append(f"its sound ends {lacking:.2f} s early; that stretch is not learned from")
    return clips, "trimmed" if len(used) < total else "kept", notes


def _cut_image(spec: DatasetSpec, one: Probed, shown: tuple[int, int], fps: float) -> _Cut:
    if problem := _too_thin(*shown):
        return [], "failed", [problem]
    size = bucket_for(spec, *shown)
    if size is None:
        return [], "dropped", [f"{shown[0]}x{shown[1]} is too small for bucket_no_upscale"]
    names = {"latents": image_latent_name(one.source.stem, *size)}
    clip = _clip(spec, one, one.source.name, names, start_seconds=0.0, end_seconds=1 / fps, fps=fps, frames=1)
    return [_with_size(clip, size, shown)], "kept", []


def _too_thin(width: int, height: int) -> str:
    return f"{width}x{height}: one side is over {_THINNEST} times the other" if max(width, height) > _THINNEST * min(width, height) else ""


def _cut_audio(spec: DatasetSpec, one: Probed, info: AudioInfo) -> _Cut:
    seconds, unit = info.end - info.start, 1 / AUDIO_UNITS_PER_SECOND
    if not info.rate:
        return [], "failed", [f"{one.source.path}: its audio stream holds nothing that decodes. Fix the file or take it out."]
    windows = audio_windows(spec, seconds)
    if not windows:
        return [], "dropped", [f"{seconds:.2f} s; clips of {spec.target_seconds or unit:g} s are asked for"]
    clips = []
    for window in windows:
        start, length = window.start / AUDIO_UNITS_PER_SECOND, window.count / AUDIO_UNITS_PER_SECOND
        start_ms, length_ms = round(start * 1000), round(length * 1000)
        key = f"{one.source.name}:{start_ms:08d}-{length_ms:06d}"
        names = {"audio": audio_only_name(one.source.stem, start_ms, length_ms)}
        clips.append(
            _clip(spec, one, key, names, start_seconds=start, end_seconds=start + length, fps=float(AUDIO_UNITS_PER_SECOND), frames=0)
        )
    used = max(clip.end_seconds for clip in clips)
    trimmed = seconds - used > unit
    return clips, "trimmed" if trimmed else "kept", [f"{used:.2f} of {seconds:.2f} s"] if trimmed else []


def _clip(
    spec: DatasetSpec,
    one: Probed,
    key: str,
    names: Mapping[str, str],
    *,
    start_seconds: float,
    end_seconds: float,
    fps: float,
    frames: int,
    start_frame: int = 0,
) -> Clip:
    """A clip of the source, with the file of its caption and those of `names`, by kind."""
    found = one.media.found
    return Clip(
        key=key,
        kind=spec.kind,
        source=one.source.name,
        stem=one.source.stem,
        source_fingerprint=one.media.fingerprint,
        start_seconds=start_seconds,
        end_seconds=end_seconds,
        fps=fps,
        start_frame=start_frame,
        frames=frames,
        has_audio=isinstance(found, AudioInfo) or isinstance(found, VideoInfo) and found.audio is not None,
        sidecars={kind: Sidecar(file=file) for kind, file in {**names, "text": text_name(one.source.stem)}.items()},
        colors=found.rule if isinstance(found, VideoInfo) else "",
        source_fps=(spec.source_fps or 0.0) if isinstance(found, VideoInfo) else 0.0,
    )


def _with_size(clip: Clip, size: tuple[int, int], shown: tuple[int, int]) -> Clip:
    return dataclasses.replace(clip, width=size[0], height=size[1], original_width=shown[0], original_height=shown[1])


def _with_keyframes(spec: DatasetSpec, clips: Sequence[Clip]) -> tuple[list[Clip], str]:
    """The clips with their keyframes, clips of one frame without any; or the reason why the dataset's do not fit them."""
    kind, planned = KINDS["keyframes"], []
    for clip in clips:
        places = keyframe_places(spec, clip.frames) if clip.frames > 1 else ()
        if places and places[-1] >= clip.frames:
            last = clip.frames - 1
            return [], f"keyframes asks for frame {places[-1]}, and the frames of its clips of {last + 1} are 0 to {last}; leave it out"
        if places:
            file = kind.name_beside(clip.sidecars["latents"].file)
            own = Sidecar(file=file, frames=1, fps=clip.fps, width=clip.width, height=clip.height, at=places)
            clip = dataclasses.replace(clip, sidecars={**clip.sidecars, kind.name: own})
        planned.append(clip)
    return planned, ""


def _with_file(spec: DatasetSpec, clips: Sequence[Clip], name: str, file: MediaFile) -> tuple[list[Clip], str]:
    """The clips with the sidecars that are made of a file that belongs to their source; or the reason why it does not fit them."""
    kind, planned = KINDS[name], []
    for clip in clips:
        own = clip.sidecars.get(name)
        if own is None and kind.beside in clip.sidecars:
            own = Sidecar(file=kind.name_beside(clip.sidecars[kind.beside].file))
        if own is None:
            planned.append(clip)
            continue
        own = dataclasses.replace(own, source=file.path.as_posix(), fingerprint=file.fingerprint)
        if isinstance(file.found, VideoInfo):
            there, last = sampled_length(file.found, clip.fps), clip.start_frame + clip.frames
            if there < last:
                return [], f"its {kind.own_files.what} {file.path} has {there} frames at {clip.fps:g} fps, its clips reach {last}"
        if name == "audio" and abs(file.audio.origin - file.audio.start) > 1 / clip.fps:  # less was never told apart
            own = dataclasses.replace(own, from_pictures=True)
        if name == "reference":
            frames, fps, scale = 1, clip.fps, spec.reference_temporal_scale
            if isinstance(file.found, VideoInfo) and clip.frames > 1:
                frames, fps = (clip.frames - 1) // scale + 1, clip.fps / scale
                if (clip.frames - 1) % (8 * scale):
                    return [], f"{clip.frames} frames with reference_temporal_scale = {scale}: must be {8 * scale}n+1"
            width, height = clip.width // spec.reference_downscale, clip.height // spec.reference_downscale
            colors = file.found.rule if isinstance(file.found, VideoInfo) else ""
            own = dataclasses.replace(own, frames=frames, fps=fps, width=width, height=height, colors=colors)
        planned.append(dataclasses.replace(clip, has_audio=clip.has_audio or name == "audio", sidecars={**clip.sidecars, name: own}))
    return planned, ""
