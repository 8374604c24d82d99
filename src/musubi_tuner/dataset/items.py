"""The items that a run trains on, from the dataset's index."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.index import Clip, DatasetIndex, read_index
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.ltxv2.geometry import AUDIO_LATENTS_PER_SECOND
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.sources.listing import list_sources, sources_exist

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One training example, before repeats."""

    key: str
    """Unique in the run; names the item's random draws."""
    spec: DatasetSpec
    clip: Clip
    latent_cache_path: Path | None
    """None in audio mode."""
    audio_latent_cache_path: Path | None
    """None in video mode, and for stills."""
    text_encoder_output_cache_path: Path
    reference_cache_path: Path | None = None
    """What is shown beside it (IC-LoRA); None = nothing, and in audio mode."""
    mask_cache_path: Path | None = None
    """Where it counts; None = everywhere, and in audio mode."""
    reference_audio_cache_path: Path | None = None
    """What is played beside its sound; None = nothing, and in video mode."""

    @property
    def cache_paths(self) -> tuple[Path, ...]:
        """In the order of merging."""
        given = (self.mask_cache_path, self.reference_cache_path, self.reference_audio_cache_path)
        paths = (self.latent_cache_path, self.audio_latent_cache_path, *given, self.text_encoder_output_cache_path)
        return tuple(path for path in paths if path is not None)

    @property
    def bucket(self) -> tuple[object, ...]:
        """Items of one bucket stack: same dataset, same frame size, same number of frames; in audio mode about the same length."""
        if self.latent_cache_path is None:
            return (self.spec.label, round(self.clip.end_seconds - self.clip.start_seconds))
        return (self.spec.label, self.clip.width, self.clip.height, self.clip.frames, self.clip.reference_frames)


def list_items(specs: Sequence[DatasetSpec], mode: str, dataset_config: Path) -> tuple[Item, ...]:
    """Items of all datasets, in the order of their indices.

    Args:
        mode: `video`, `av` or `audio`; video and AV mode leave out audio datasets, audio mode leaves out stills, silent clips and mirror
            images, which have the sound of others. A warning says how many, and what sources came after caching.

    Raises:
        UserError: an index that is missing or was made with other settings, or no item that the mode can use.
    """
    items = []
    for spec in specs:
        index = read_index(spec, dataset_config)
        clips = [clip for clip in index.clips if not (mode == "audio" and clip.mirrored)]
        used = [clip for clip in clips if (clip.has_audio and clip.audio is not None if mode == "audio" else clip.latents is not None)]
        if len(used) < len(clips):
            what = "stills and clips without sound" if mode == "audio" else "sound without pictures, which --ltx_mode audio trains on"
            left = len(clips) - len(used)
            log.warning("WARNING: %s: %d of %d clips are left out of --ltx_mode %s: %s", spec.label, left, len(clips), mode, what)
        if used and (new := _not_planned(spec, index)):
            shown = ", ".join(new[:3]) + (", ..." if len(new) > 3 else "")
            log.warning(
                "WARNING: %s: %d source(s) came after caching and are not trained on: %s. Run the caching programs again to have them.",
                spec.label, len(new), shown,
            )  # fmt: skip
        items += [_item(spec, clip, mode) for clip in used]
    if not items:
        raise UserError(f"{dataset_config}: no item that --ltx_mode {mode} can train on. " + _EMPTY_HINTS[mode])
    return tuple(items)


def _not_planned(spec: DatasetSpec, index: DatasetIndex) -> list[str]:
    """Sources that the index does not know; none where the sources are gone."""
    if not sources_exist(spec):
        return []
    known = {clip.source for clip in index.clips} | {source for source, _ in index.dropped}
    return [source.name for source in list_sources(spec, require_captions=False) if source.name not in known]


_EMPTY_HINTS = {
    "video": "It needs video_directory, image_directory or their jsonl forms.",
    "av": "It needs video_directory, image_directory or their jsonl forms.",
    "audio": "It needs clips with sound: audio_directory, or video_directory.",
}


def _item(spec: DatasetSpec, clip: Clip, mode: str) -> Item:
    folder = spec.cache_directory
    return Item(
        key=f"{spec.label}/{clip.key}",
        spec=spec,
        clip=clip,
        latent_cache_path=folder / clip.latents if mode != "audio" else None,
        audio_latent_cache_path=folder / clip.audio if mode != "video" and clip.audio is not None else None,
        text_encoder_output_cache_path=folder / clip.text,
        reference_cache_path=folder / clip.reference if mode != "audio" and clip.reference is not None else None,
        mask_cache_path=folder / clip.mask if mode != "audio" and clip.mask is not None else None,
        reference_audio_cache_path=folder / clip.reference_sound if mode != "video" and clip.reference_sound is not None else None,
    )


def token_counts(item: Item, mode: str) -> tuple[int, int]:
    """Video and audio tokens of a batch of items like this one, references included: 8 x 32 x 32 pixels or 1/25 s of sound each."""
    clip, clips = item.clip, item.spec.batch_size
    video = 0 if mode == "audio" else ((clip.frames - 1) // 8 + 1) * (clip.height // 32) * (clip.width // 32)
    if video and clip.reference is not None:
        video += ((clip.reference_frames - 1) // 8 + 1) * (clip.reference_height // 32) * (clip.reference_width // 32)
    has_audio = mode != "video" and clip.has_audio
    audio = round((clip.end_seconds - clip.start_seconds) * AUDIO_LATENTS_PER_SECOND) if has_audio else 0
    if clip.reference_sound is not None:
        audio *= 2  # it is as long as the clip at most
    return video * clips, audio * clips


def largest_item(items: Sequence[Item], mode: str) -> Item:
    """The item whose batch has the most tokens."""
    return max(items, key=lambda item: sum(token_counts(item, mode)))
