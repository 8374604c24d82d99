"""From sources to clips: what is cut from where, at which rate and size, and why something is left out."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from musubi_tuner.cache.fingerprint import file_fingerprint
from musubi_tuner.cache.index import Clip, DatasetIndex
from musubi_tuner.cache.names import audio_only_name, audio_sidecar_name, image_latent_name, text_name, video_latent_name
from musubi_tuner.config.dataset import DatasetConfig, DatasetSpec
from musubi_tuner.encoding.buckets import bucket_for
from musubi_tuner.encoding.mirror import with_mirror_images
from musubi_tuner.encoding.references import FilesBeside, PlanRow, probe_files_beside, with_files_beside
from musubi_tuner.encoding.windows import AUDIO_UNITS_PER_SECOND, Window, audio_windows, target_lengths, video_windows
from musubi_tuner.media.picture import picture_size
from musubi_tuner.media.probe import SoundInfo, VideoInfo, probe_sound, probe_video
from musubi_tuner.media.video import sampled_length
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.sources.listing import Source, list_all_sources

_STILL_FPS = 24.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """A source and what was found in it."""

    source: Source
    fingerprint: str
    found: VideoInfo | SoundInfo | tuple[int, int] | None
    """None where the file cannot be read; a still has its size."""
    problem: str
    beside: FilesBeside = FilesBeside()


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedClip:
    """A clip and what is needed to decode it."""

    clip: Clip
    source: Source
    found: VideoInfo | SoundInfo | tuple[int, int]
    beside: FilesBeside = FilesBeside()


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetPlan:
    """What is cut from one dataset."""

    spec: DatasetSpec
    clips: tuple[PlannedClip, ...]
    rows: tuple[PlanRow, ...]
    without_caption: int

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


def plan_datasets(config: DatasetConfig, group: Processes, workers: int) -> tuple[DatasetPlan, ...]:
    """Plan all datasets of a config; the processes share the looking into files, and all get the same plans.

    Raises:
        UserError: what listing sources raises, and a dataset of which no clip is usable.
    """
    listed = list_all_sources(config.all, require_captions=False)
    places = [(which, source) for which, sources in enumerate(listed) for source in sources]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        own = list(pool.map(lambda place: _probe(config.all[place[0]], place[1]), group.share(places)))
    probed: list[Probed] = [None] * len(places)  # type: ignore[list-item]
    for index, part in enumerate(group.gather(own)):
        probed[index :: group.count] = part
    by_dataset = [[one for (owner, _), one in zip(places, probed, strict=True) if owner == which] for which in range(len(listed))]
    still_fps = _still_fps(config.all, by_dataset)
    return tuple(plan_dataset(spec, found, still_fps) for spec, found in zip(config.all, by_dataset, strict=True))


def plan_dataset(spec: DatasetSpec, probed: Sequence[Probed], still_fps: float) -> DatasetPlan:
    """Plan one dataset.

    Raises:
        UserError: no clip is usable.
    """
    clips: list[PlannedClip] = []
    rows: list[PlanRow] = []
    for one in probed:
        if one.found is None:
            rows.append(PlanRow(source=one.source.name, outcome="failed", clips=0, note=one.problem))
            continue
        if spec.kind == "video":
            found, row = _plan_video(spec, one, one.found)
        elif spec.kind == "image":
            found, row = _plan_image(spec, one, one.found, still_fps)
        else:
            found, row = _plan_audio(spec, one, one.found)
        if found and spec.kind != "audio":
            found, row = with_mirror_images(spec, one.source, found, row)
        if found:
            found, row = with_files_beside(spec, one.source, found, row, one.beside)
        clips += [PlannedClip(clip=clip, source=one.source, found=one.found, beside=one.beside) for clip in found]
        rows.append(row)
    if not clips:
        reasons = "; ".join(f"{row.source}: {row.note}" for row in rows[:5]) + ("; ..." if len(rows) > 5 else "")
        raise UserError(
            f"{spec.label}: none of the {len(rows)} sources in {spec.root} gives a usable clip ({reasons}). "
            "Ask for shorter clips (target_frames, target_seconds), or give longer ones."
        )
    lacking = sum(not one.source.caption.strip() for one in probed)
    return DatasetPlan(spec=spec, clips=tuple(clips), rows=tuple(rows), without_caption=lacking)


def _probe(spec: DatasetSpec, source: Source) -> Probed:
    look = {"video": probe_video, "image": picture_size, "audio": probe_sound}[spec.kind]
    try:
        found = look(source.path)
        if isinstance(found, VideoInfo) and spec.source_fps is not None:
            times = tuple(i / spec.source_fps for i in range(len(found.stamps)))
            found = dataclasses.replace(found, times=times, fps=spec.source_fps, is_variable=False)
        beside = probe_files_beside(source)
        return Probed(source=source, fingerprint=file_fingerprint(source.path), found=found, problem="", beside=beside)
    except UserError as error:
        return Probed(source=source, fingerprint="", found=None, problem=str(error))


def _still_fps(specs: Sequence[DatasetSpec], probed: Sequence[Sequence[Probed]]) -> float:
    """The rate that most video sources of the config are sampled at, so that stills sit where clips have their frames."""
    rates = Counter(
        spec.target_fps or one.found.fps
        for spec, found in zip(specs, probed, strict=True)
        for one in found
        if isinstance(one.found, VideoInfo)
    )
    return min(rates, key=lambda rate: (-rates[rate], rate)) if rates else _STILL_FPS


def _plan_video(spec: DatasetSpec, one: Probed, info: VideoInfo) -> tuple[list[Clip], PlanRow]:
    fps = spec.target_fps or info.fps
    total = sampled_length(info, fps)
    windows = video_windows(spec, total, fps)
    size = bucket_for(spec, info.width, info.height)
    if not windows:
        shortest = min(target_lengths(spec, total, fps))
        return [], _row(one, "dropped", 0, f"{total} frames at {fps:g} fps; the shortest clip asked for has {shortest}")
    if size is None:
        return [], _row(one, "dropped", 0, f"{info.width}x{info.height} is too small for bucket_no_upscale")
    clips = [_video_clip(spec, one, info, window, fps, size) for window in windows]
    used = set().union(*(range(window.start, window.start + window.count) for window in windows))
    notes = [f"{len(used)} of {total} frames"] if len(used) < total else []
    if info.is_variable:
        notes.append(f"variable frame rate, sampled evenly at {fps:.3f}")
    if info.sound is not None and info.sound.rate and one.beside.sound is None:
        lacking = max(clip.end_seconds for clip in clips) - (info.sound.end - info.start)
        if lacking > 1 / fps:
            notes.append(f"its sound ends {lacking:.2f} s early; that stretch is not learned from")
    return clips, _row(one, "trimmed" if len(used) < total else "kept", len(clips), ", ".join(notes))


def _video_clip(spec: DatasetSpec, one: Probed, info: VideoInfo, window: Window, fps: float, size: tuple[int, int]) -> Clip:
    latents = video_latent_name(one.source.stem, window.start, window.count, *size)
    return Clip(
        key=f"{one.source.name}:{window.start:05d}-{window.count:03d}",
        kind="video",
        source=one.source.name,
        stem=one.source.stem,
        source_fingerprint=one.fingerprint,
        start_seconds=window.start / fps,
        end_seconds=(window.start + window.count) / fps,
        fps=fps,
        start_frame=window.start,
        frames=window.count,
        width=size[0],
        height=size[1],
        original_width=info.width,
        original_height=info.height,
        latents=latents,
        audio=audio_sidecar_name(latents),
        text=text_name(one.source.stem),
        has_audio=info.sound is not None,
    )


def _plan_image(spec: DatasetSpec, one: Probed, shown: tuple[int, int], still_fps: float) -> tuple[list[Clip], PlanRow]:
    size = bucket_for(spec, *shown)
    if size is None:
        return [], _row(one, "dropped", 0, f"{shown[0]}x{shown[1]} is too small for bucket_no_upscale")
    fps = spec.target_fps or still_fps
    clip = Clip(
        key=one.source.name,
        kind="image",
        source=one.source.name,
        stem=one.source.stem,
        source_fingerprint=one.fingerprint,
        start_seconds=0.0,
        end_seconds=1 / fps,
        fps=fps,
        start_frame=0,
        frames=1,
        width=size[0],
        height=size[1],
        original_width=shown[0],
        original_height=shown[1],
        latents=image_latent_name(one.source.stem, *size),
        audio=None,
        text=text_name(one.source.stem),
        has_audio=False,
    )
    return [clip], _row(one, "kept", 1, "")


def _plan_audio(spec: DatasetSpec, one: Probed, info: SoundInfo) -> tuple[list[Clip], PlanRow]:
    seconds = info.end - info.start
    if not info.rate:
        return [], _row(one, "failed", 0, f"{one.source.path}: its audio stream holds nothing that decodes. Mend the file or take it out.")
    windows = audio_windows(spec, seconds)
    if not windows:
        return [], _row(
            one, "dropped", 0, f"{seconds:.2f} s; clips of {spec.target_seconds or 1 / AUDIO_UNITS_PER_SECOND:g} s are asked for"
        )
    clips = [_audio_clip(one, window) for window in windows]
    used = max(clip.end_seconds for clip in clips)
    trimmed = seconds - used > 1 / AUDIO_UNITS_PER_SECOND
    return clips, _row(one, "trimmed" if trimmed else "kept", len(clips), f"{used:.2f} of {seconds:.2f} s" if trimmed else "")


def _audio_clip(one: Probed, window: Window) -> Clip:
    start, length = window.start / AUDIO_UNITS_PER_SECOND, window.count / AUDIO_UNITS_PER_SECOND
    start_ms, length_ms = round(start * 1000), round(length * 1000)
    return Clip(
        key=f"{one.source.name}:{start_ms:08d}-{length_ms:06d}",
        kind="audio",
        source=one.source.name,
        stem=one.source.stem,
        source_fingerprint=one.fingerprint,
        start_seconds=start,
        end_seconds=start + length,
        fps=float(AUDIO_UNITS_PER_SECOND),
        start_frame=0,
        frames=0,
        width=0,
        height=0,
        original_width=0,
        original_height=0,
        latents=None,
        audio=audio_only_name(one.source.stem, start_ms, length_ms),
        text=text_name(one.source.stem),
        has_audio=True,
    )


def _row(one: Probed, outcome: str, clips: int, note: str) -> PlanRow:
    return PlanRow(source=one.source.name, outcome=outcome, clips=clips, note=note)
