"""Files of an official tree -> our cache files. Tensors are taken as they are, but for captions, which go through the connectors."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from musubi_tuner.cache import keys, store
from musubi_tuner.cache import sidecars as expected
from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.fingerprint import canonical, file_fingerprint
from musubi_tuner.conversion.official_dataset.files import (
    LATENTS,
    MASK,
    REFERENCE,
    REFERENCE_SOUND,
    SOUND,
    TEXT,
    OfficialText,
    read_mask,
    read_sound,
    read_text,
    read_video,
)
from musubi_tuner.conversion.official_dataset.plan import ImportedItem
from musubi_tuner.ltxv2.geometry import AUDIO_CHANNELS, AUDIO_MEL_BINS
from musubi_tuner.ltxv2.text.pipeline import Features, TextRecipe, load_finish_stage, text_widths
from musubi_tuner.runtime.errors import UserError

STORED_DTYPE = torch.bfloat16
_ENCODING = canonical({"imported": "official .precomputed", "stored": str(STORED_DTYPE).removeprefix("torch.")})
_TEXTS_TOGETHER = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoders:
    """Fingerprints of what the tree was made with, as the user says."""

    latents: str
    """Empty in audio mode."""
    sound: str
    """Empty in video mode."""
    text: str
    projection: str
    model_version: str


@dataclass(slots=True)
class Written:
    """Counts of files by kind."""

    made: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)


def import_tensors(items: Sequence[ImportedItem], cache: Path, mode: str, encoders: Encoders, written: Written) -> None:
    """Latents, sound, references and masks of all items; files that are right already are kept.

    Raises:
        UserError: a file that cannot be taken over, by name; what was written before stays good.
    """
    for item in tqdm(items, desc="Import", unit="item"):
        _import_one(item, cache, mode, encoders, written)


def import_texts(items: Sequence[ImportedItem], cache: Path, recipe: TextRecipe, encoders: Encoders, written: Written) -> None:
    """Captions, through the connectors where the recipe says so; these are loaded only where there is something to do.

    Raises:
        UserError: as `import_tensors`, and features of another model's width.
    """
    common = {
        "kind": "text",
        "caption": "",
        "encoder_fingerprint": encoders.text,
        "projection_fingerprint": encoders.projection,
        "encoding": _ENCODING,
        "stage": recipe.stage,
        "backend": recipe.options.backend,
        "widths": "+".join(map(str, text_widths(recipe.config, recipe.mode))),
        "model_version": encoders.model_version,
    }
    todo = []
    for item in items:
        metadata = common | {"source": item.clip.source, "source_fingerprint": file_fingerprint(item.sample.files[TEXT])}
        if reason_to_rebuild(cache / item.clip.text, metadata, expected.TEXT_KEYS) is None:
            written.kept["captions"] += 1
        else:
            todo.append((item, metadata))
    stage = load_finish_stage(recipe) if todo else None
    for start in tqdm(range(0, len(todo), _TEXTS_TOGETHER), desc="Captions", unit="batch", disable=not todo):
        batch = todo[start : start + _TEXTS_TOGETHER]
        texts = [read_text(item.sample.files[TEXT]) for item, _ in batch]
        features = [_features(item, text, recipe) for (item, _), text in zip(batch, texts, strict=True)]
        for (item, metadata), text, (tensor, mask) in zip(batch, texts, stage.finish(features), strict=True):
            tensor = tensor.to(STORED_DTYPE)
            tensors = {keys.text_key(tensor.dtype): tensor, keys.TEXT_MASK_KEY: mask}
            store.write(cache / item.clip.text, tensors, metadata | {"max_length": str(text.padded)})
            written.made["captions"] += 1


def _features(item: ImportedItem, text: OfficialText, recipe: TextRecipe) -> Features:
    """The features of both streams; zeros for the sound's where there are none and none are kept.

    Raises:
        UserError: widths that are not the model's, or no features for sound where it is to be trained.
    """
    path = item.sample.files[TEXT]
    wanted = text_widths(recipe.config, "av")
    audio = text.audio
    if audio is None:
        if recipe.mode != "video":
            raise UserError(f"{path}: has no 'audio_prompt_embeds', which --ltx_mode {recipe.mode} needs. Make it with an AV checkpoint.")
        audio = torch.zeros(text.video.shape[0], wanted[1])
    found = (text.video.shape[1], audio.shape[1])
    if found != wanted:
        raise UserError(
            f"{path}: features of width {found[0]} (video) and {found[1]} (sound); {recipe.checkpoint.path.name} takes {wanted[0]} and "
            f"{wanted[1]}. They are of another model: give the --ltxv2_model that they were made with."
        )
    return text.video.to(recipe.options.dtype), audio.to(recipe.options.dtype)


def _import_one(item: ImportedItem, cache: Path, mode: str, encoders: Encoders, written: Written) -> None:
    clip, files = item.clip, item.sample.files
    writer = _Writer(item, cache, encoders.model_version, written)
    latents, sound = {"encoder_fingerprint": encoders.latents}, {"encoder_fingerprint": encoders.sound}
    if clip.latents is not None:
        writer.write(
            "latents", clip.latents, expected.latents_of(clip) | latents, lambda: _picture_tensors(files[LATENTS], keys.latents_key)
        )
    if clip.reference is not None:
        entries = expected.reference_of(clip) | latents
        writer.write("references", clip.reference, entries, lambda: _picture_tensors(files[REFERENCE], keys.reference_latents_key))
    if clip.mask is not None:
        writer.write("masks", clip.mask, expected.mask_of(clip), lambda: _mask_tensors(item))
    if mode != "video" and clip.audio is not None:
        entries = expected.audio_of(clip) | sound | {"audio": "present" if clip.has_audio else "absent"}
        writer.write("sound" if clip.has_audio else "no sound", clip.audio, entries, lambda: _sound_tensors(files.get(SOUND)))
    if mode != "video" and clip.reference_sound is not None:
        entries = expected.reference_audio_of(clip) | sound
        writer.write("reference sound", clip.reference_sound, entries, lambda: _reference_sound_tensors(files[REFERENCE_SOUND]))


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes the files of one item that are not right already."""

    item: ImportedItem
    cache: Path
    model_version: str
    written: Written

    def write(self, what: str, name: str, entries: Mapping[str, str], tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        path = self.cache / name
        metadata = {**entries, "encoding": _ENCODING, "source": self.item.clip.source, "model_version": self.model_version}
        if reason_to_rebuild(path, metadata, ()) is None:
            self.written.kept[what] += 1
            return
        store.write(path, tensors(), metadata)
        self.written.made[what] += 1


def _picture_tensors(path: Path, key_of: Callable[[int, int, int, torch.dtype], str]) -> dict[str, Tensor]:
    latents = read_video(path).latents.to(STORED_DTYPE)
    _, frames, height, width = latents.shape
    return {key_of(frames, height, width, latents.dtype): latents}


def _mask_tensors(item: ImportedItem) -> dict[str, Tensor]:
    path = item.sample.files[MASK]
    mask, latents = read_mask(path), read_video(item.sample.files[LATENTS]).latents
    if mask.shape != latents.shape[1:]:
        raise UserError(f"{path}: a mask of {tuple(mask.shape)} cells for latents of {tuple(latents.shape[1:])}.")
    if not bool(mask.any()):
        raise UserError(f"{path}: gives all of the clip, so nothing of it would be learned.")
    return {keys.VIDEO_MASK_KEY: mask}


def _sound_tensors(path: Path | None) -> dict[str, Tensor]:
    latents = torch.zeros(AUDIO_CHANNELS, 0, AUDIO_MEL_BINS) if path is None else read_sound(path).latents
    latents = latents.to(STORED_DTYPE)
    steps = latents.shape[1]
    return {keys.audio_latents_key(steps, latents.dtype): latents, keys.AUDIO_LENGTHS_KEY: torch.tensor(steps, dtype=torch.int32)}


def _reference_sound_tensors(path: Path) -> dict[str, Tensor]:
    latents = read_sound(path).latents.to(STORED_DTYPE)
    steps = latents.shape[1]
    key = keys.reference_audio_latents_key(steps, latents.dtype)
    return {key: latents, keys.REFERENCE_AUDIO_LENGTHS_KEY: torch.tensor(steps, dtype=torch.int32)}
