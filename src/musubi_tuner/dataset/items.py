"""The items that a run trains on, from the dataset's index, and which of them make which batch."""

import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.audit import reason_to_rebuild, sound_steps
from musubi_tuner.cache.clip import Clip
from musubi_tuner.cache.index import DatasetIndex, printable, read_index
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.conditioning.recipe import KeyframesBeside
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
    paths: Mapping[str, Path]
    """Cache files that the run's mode reads, by the names of their kinds (`cache.sidecars.KINDS`)."""
    has_sound: bool
    """As of `has_sound`; not whether the run's mode reads it."""

    @property
    def bucket(self) -> tuple[object, ...]:
        """Items of one bucket stack: same dataset, same frame size, same number of frames; in audio mode about the same length."""
        if "latents" not in self.paths:
            return (self.spec.label, round(self.clip.seconds))
        own_frames = tuple((name, sidecar.frames) for name, sidecar in sorted(self.clip.sidecars.items()) if sidecar.frames)
        return (self.spec.label, self.clip.width, self.clip.height, self.clip.frames, own_frames)


def has_sound(spec: DatasetSpec, clip: Clip) -> bool:
    """Whether a clip has sound to learn from, by its cache file: a track that is silent, or none in the clip's seconds, was cached as none.

    Where that file is missing or not of this clip, the source tells: a cache that is wrong is for `verify_caches` to refuse.
    """
    if "audio" not in clip.sidecars:
        return False
    kind, path = KINDS["audio"], spec.cache_directory / clip.sidecars["audio"].file
    steps = sound_steps(path)
    if not steps and clip.has_audio:
        return reason_to_rebuild(path, kind.expected(clip), kind.keys, kind.forms(clip), to_read=True) is not None
    return bool(steps)


def list_items(
    specs: Sequence[DatasetSpec], mode: str, dataset_config: Path, arguments: Mapping[str, str] | None = None
) -> tuple[Item, ...]:
    """Items of all datasets, in the order of their indices.

    Args:
        mode: `video`, `av` or `audio`; video and AV mode leave out audio datasets, audio mode leaves out stills, silent clips and mirror
            images, which have the sound of others. A warning says how many, and what sources came after caching.
        arguments: of each caching program, for the command in messages, as in `read_index`.

    Raises:
        UserError: an index that is missing or was made with other settings, or no item that the mode can use.
    """
    items = []
    for spec in specs:
        index = read_index(spec, dataset_config, arguments)
        clips = [clip for clip in index.clips if not (mode == "audio" and clip.mirrored)]
        heard = {clip.key for clip in clips if has_sound(spec, clip)}
        used = [clip for clip in clips if (clip.key in heard if mode == "audio" else "latents" in clip.sidecars)]
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
        for clip in used:
            kinds = [kind for kind in KINDS.values() if mode in kind.modes and kind.name in clip.sidecars]
            paths = {kind.name: spec.cache_directory / clip.sidecars[kind.name].file for kind in kinds}
            items.append(Item(key=f"{spec.label}/{clip.key}", spec=spec, clip=clip, paths=paths, has_sound=clip.key in heard))
    if not items:
        raise UserError(f"{dataset_config}: no item that --ltx_mode {mode} can train on. " + _EMPTY_HINTS[mode])
    return tuple(items)


def _not_planned(spec: DatasetSpec, index: DatasetIndex) -> list[str]:
    """Sources that the index does not know; none where the sources are gone."""
    if not sources_exist(spec):
        return []
    known = {clip.source for clip in index.clips} | {source for source, _ in index.dropped}
    return [source.name for source in list_sources(spec, require_captions=False) if printable(source.name) not in known]


_EMPTY_HINTS = {
    "video": "It needs video_directory, image_directory or their jsonl forms.",
    "av": "It needs video_directory, image_directory or their jsonl forms.",
    "audio": "It needs clips with sound: audio_directory, or video_directory.",
}


def token_counts(item: Item, mode: str, keyframes: KeyframesBeside | None = None) -> tuple[int, int]:
    """Video and audio tokens of a batch of items like this one, references and as many keyframes as may be drawn included.

    A token is of 8 x 32 x 32 pixels (of a keyframe 32 x 32) or of 1/25 s of sound.

    Args:
        keyframes: the recipe's rule; None = it has none.
    """
    clip, clips = item.clip, item.spec.batch_size
    video = 0 if mode == "audio" else ((clip.frames - 1) // 8 + 1) * (clip.height // 32) * (clip.width // 32)
    if video and (reference := clip.sidecars.get("reference")):
        video += ((reference.frames - 1) // 8 + 1) * (reference.height // 32) * (reference.width // 32)
    if video and keyframes is not None and (own := clip.sidecars.get("keyframes")):
        video += keyframes.most(own.at, clip.frames - 1) * (own.height // 32) * (own.width // 32)
    audio = round(clip.seconds * AUDIO_LATENTS_PER_SECOND) if mode != "video" and item.has_sound else 0
    if "reference_audio" in clip.sidecars:
        audio *= 2  # it is as long as the clip at most
    return video * clips, audio * clips


def largest_items(
    items: Sequence[Item], mode: str, keyframes: KeyframesBeside | None = None, *, widths: tuple[int, int] = (1, 1)
) -> tuple[Item, ...]:
    """Those of whose batches each may be the one that takes the most memory, first that with the longest streams.

    A batch takes memory for its streams (tokens times width), for the text of each clip, and for the scores of attention where a kernel
    keeps them (tokens of a clip times tokens of the batch). None of these batches has as much as another one by all three.

    Args:
        widths: of the model's video and audio streams.
    """
    found: dict[tuple[int, int, int], Item] = {}
    for item in items:
        video, audio = token_counts(item, mode, keyframes)
        clips, longest = item.spec.batch_size, max(video, audio)
        found.setdefault((video * widths[0] + audio * widths[1], clips, longest * longest // clips), item)
    sizes = sorted(found, reverse=True)
    kept = [
        own for place, own in enumerate(sizes) if not any(all(map(int.__ge__, other, own)) for other in sizes[:place])
    ]  # nothing later is as large by the first measure
    return tuple(found[size] for size in kept)


@dataclass(frozen=True, slots=True)
class Draw:
    """One appearance of an item in an epoch."""

    item: Item
    epoch: int
    repeat: int


class BatchPlan:
    """An endless sequence of batches: epoch after epoch, each shuffled by (seed, epoch).

    Batch i does not depend on how many processes there are or where a run was resumed: process r of R takes the batches
    with i mod R = r, and a resumed run goes on at the number it stopped at.
    """

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        self.seed = seed
        self._buckets: dict[tuple[object, ...], list[Item]] = defaultdict(list)
        for item in items:
            self._buckets[item.bucket].append(item)
        self.batches_per_epoch = len(self._epoch(0))
        self._cached: tuple[int, list[tuple[Draw, ...]]] | None = None

    def batch(self, number: int) -> tuple[Draw, ...]:
        """The items of batch `number`, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._epoch(epoch))
        return self._cached[1][place]

    def _epoch(self, epoch: int) -> list[tuple[Draw, ...]]:
        shuffler = random.Random(f"{self.seed}|{epoch}")
        batches = []
        for bucket in self._buckets.values():
            draws = [Draw(item, epoch, repeat) for item in bucket for repeat in range(item.spec.num_repeats)]
            shuffler.shuffle(draws)
            size = bucket[0].spec.batch_size
            batches += [tuple(draws[start : start + size]) for start in range(0, len(draws), size)]
        shuffler.shuffle(batches)
        return batches
