"""An official tree -> clips as our index lists them, and the dataset TOML that goes with them."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.clip import Clip, Sidecar
from musubi_tuner.cache.names import audio_only_name, image_latent_name, text_name, too_long, video_latent_name
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.cache.store import file_fingerprint
from musubi_tuner.conversion.official_dataset.files import Sample, read_audio, read_video
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
        return ImportPlan(items=tuple(ImportedItem(sample, _with_files(sample, _audio_clip(sample))) for sample in samples))
    clips = [_picture_clip(sample, source_fps) for sample in samples]
    rates = Counter(clip.fps for clip in clips if clip.kind == "video")
    still_fps = min(rates, key=lambda rate: (-rates[rate], rate)) if rates else _STILL_FPS
    clips = [dataclasses.replace(clip, fps=still_fps, end_seconds=1 / still_fps) if clip.kind == "image" else clip for clip in clips]
    scales = Counter(scale for sample, clip in zip(samples, clips, strict=True) if (scale := _reference_scale(sample, clip)) is not None)
    if len({space for space, _ in scales}) > 1 or len({time for _, time in scales if time}) > 1:
        raise UserError(
            f"{samples[0].files['reference'].parent}: references of several scales (space, time): {sorted(scales)}. A LoRA has one."
        )
    space, time = (max((scale[axis] for scale in scales), default=1) or 1 for axis in (0, 1))
    clips = [_with_files(sample, clip, time) for sample, clip in zip(samples, clips, strict=True)]
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


def _picture_clip(sample: Sample, source_fps: float | None) -> Clip:
    video = read_video(sample.files["latents"])
    _, cells, rows, columns = video.latents.shape
    frames, width, height = (cells - 1) * TEMPORAL_SCALE + 1, columns * SPATIAL_SCALE, rows * SPATIAL_SCALE
    is_still = frames == 1  # stills have 1.0 written as their rate
    fps = 1.0 if is_still else video.fps or source_fps
    if fps is None:
        raise UserError(f"{sample.files['latents']}: tells no 'fps'. Give the rate of such clips with --source_fps (24 as a rule).")
    latents = image_latent_name(sample.stem, width, height) if is_still else video_latent_name(sample.stem, 0, frames, width, height)
    sidecars = {"latents": Sidecar(file=latents), "text": Sidecar(file=text_name(sample.stem))}
    if not is_still:
        audio = Sidecar(file=KINDS["audio"].name_beside(latents))
        sidecars["audio"] = _made_from(audio, sample.files["audio"]) if "audio" in sample.files else audio
    return Clip(
        key=sample.name,
        kind="image" if is_still else "video",
        source=f"{sample.name}.pt",
        stem=sample.stem,
        source_fingerprint=file_fingerprint(sample.files["latents"]),
        start_seconds=0.0,
        end_seconds=frames / fps,
        fps=fps,
        frames=frames,
        width=width,
        height=height,
        original_width=width,
        original_height=height,
        has_audio="audio" in sample.files and not is_still,
        sidecars=sidecars,
    )


def _audio_clip(sample: Sample) -> Clip:
    seconds = read_audio(sample.files["audio"]).seconds
    audio = Sidecar(file=audio_only_name(sample.stem, 0, round(seconds * 1000)))
    return Clip(
        key=sample.name,
        kind="audio",
        source=f"{sample.name}.pt",
        stem=sample.stem,
        source_fingerprint=file_fingerprint(sample.files["audio"]),
        start_seconds=0.0,
        end_seconds=seconds,
        fps=float(AUDIO_LATENTS_PER_SECOND),
        frames=0,
        has_audio=True,
        sidecars={"audio": audio, "text": Sidecar(file=text_name(sample.stem))},
    )


def _reference_scale(sample: Sample, clip: Clip) -> tuple[int, int] | None:
    """How many times coarser a reference is in space and time; 0 in time where one of the two is a picture. None: there is none."""
    if "reference" not in sample.files:
        return None
    _, cells, rows, columns = read_video(sample.files["reference"]).latents.shape
    frames = (cells - 1) * TEMPORAL_SCALE + 1
    space, left = divmod(clip.width, columns * SPATIAL_SCALE)
    time, over = divmod(clip.frames - 1, frames - 1) if frames > 1 and clip.frames > 1 else (0, int(frames > clip.frames))
    if left or over or not space or rows * SPATIAL_SCALE * space != clip.height:
        raise UserError(
            f"{sample.files['reference']}: {columns * SPATIAL_SCALE}x{rows * SPATIAL_SCALE}x{frames}, which is no whole part of its clip's "
            f"{clip.width}x{clip.height}x{clip.frames} (width x height x frames)."
        )
    return space, time


def _with_files(sample: Sample, clip: Clip, time: int = 1) -> Clip:
    """The clip with reference, mask and reference audio.

    Args:
        time: how many of its frames one frame of its reference stands for.

    Raises:
        UserError: a name that leaves no room for those of its cache files.
    """
    sidecars = dict(clip.sidecars)
    for name in ("reference", "mask", "reference_audio"):
        beside = sidecars.get(KINDS[name].beside or "")
        if name in sample.files and beside is not None:
            sidecars[name] = _made_from(Sidecar(file=KINDS[name].name_beside(beside.file)), sample.files[name])
    if "reference" in sidecars:
        _, cells, rows, columns = read_video(sample.files["reference"]).latents.shape
        sidecars["reference"] = dataclasses.replace(
            sidecars["reference"],
            frames=(cells - 1) * TEMPORAL_SCALE + 1,
            fps=clip.fps / time if cells > 1 else clip.fps,
            width=columns * SPATIAL_SCALE,
            height=rows * SPATIAL_SCALE,
        )
    if problem := too_long(sidecar.file for sidecar in sidecars.values()):
        raise UserError(f"{sample.name}.pt: {problem}, in every folder of the tree.")
    return dataclasses.replace(clip, sidecars=sidecars)


def _made_from(sidecar: Sidecar, path: Path) -> Sidecar:
    return dataclasses.replace(sidecar, source=path.as_posix(), fingerprint=file_fingerprint(path))
