"""Files of an official tree -> our cache files. Tensors are taken as they are, but for captions, which go through the connectors."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.cache import store
from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.forms import text_forms
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.cache.store import canonical, file_fingerprint
from musubi_tuner.conversion.official_dataset.files import OfficialText, Sample, read_audio, read_mask, read_text, read_video
from musubi_tuner.conversion.official_dataset.plan import ImportedItem
from musubi_tuner.ltxv2.geometry import AUDIO_CHANNELS, AUDIO_MEL_BINS
from musubi_tuner.ltxv2.text.pipeline import Features, TextRecipe, load_finish_stage, text_widths
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.progress import counted

STORED_DTYPE = torch.bfloat16
_ENCODING = canonical({"imported": "official .precomputed", "stored": str(STORED_DTYPE).removeprefix("torch.")})
_TEXTS_TOGETHER = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoders:
    """Fingerprints of what the tree was made with, as the user says."""

    latents: str
    """Empty in audio mode."""
    audio: str
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
    made_by = {"video_vae": {"encoder_fingerprint": encoders.latents}, "audio_vae": {"encoder_fingerprint": encoders.audio}, None: {}}
    for item in counted(items, "Import", unit="item"):
        clip = item.clip
        for name, read in _READERS.items():
            kind = KINDS[name]
            if name not in clip.sidecars or mode not in kind.modes:
                continue
            path, what = cache / clip.sidecars[name].file, name.replace("_", " ")
            metadata = kind.expected(clip) | made_by[kind.encoder] | {"encoding": _ENCODING, "source": clip.source}
            metadata["model_version"] = encoders.model_version
            if name == "audio":
                metadata["audio"] = "present" if clip.has_audio else "absent"
                what = "audio" if clip.has_audio else "no audio"
            if reason_to_rebuild(path, metadata, (), kind.forms(clip)) is None:
                written.kept[what] += 1
            else:
                store.write(path, kind.pack(read(item.sample)), metadata, kind.forms(clip))
                written.made[what] += 1


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
        metadata = common | {"source": item.clip.source, "source_fingerprint": file_fingerprint(item.sample.files["text"])}
        if reason_to_rebuild(cache / item.clip.sidecars["text"].file, metadata, KINDS["text"].keys, text_forms) is None:
            written.kept["captions"] += 1
        else:
            todo.append((item, metadata))
    if not todo:
        return
    stage = load_finish_stage(recipe)
    for start in counted(range(0, len(todo), _TEXTS_TOGETHER), "Captions", unit="round"):
        batch = todo[start : start + _TEXTS_TOGETHER]
        texts = [read_text(item.sample.files["text"]) for item, _ in batch]
        features = [_features(item, text, recipe) for (item, _), text in zip(batch, texts, strict=True)]
        for (item, metadata), text, (tensor, mask) in zip(batch, texts, stage.finish(features), strict=True):
            tensors = KINDS["text"].pack(tensor.to(STORED_DTYPE), mask)
            store.write(cache / item.clip.sidecars["text"].file, tensors, metadata | {"max_length": str(text.padded)}, text_forms)
            written.made["captions"] += 1


def _features(item: ImportedItem, text: OfficialText, recipe: TextRecipe) -> Features:
    """The features of both streams; zeros for the sound's where there are none and none are kept.

    Raises:
        UserError: widths that are not the model's, or no features for sound where it is to be trained.
    """
    path = item.sample.files["text"]
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


def _mask(sample: Sample) -> Tensor:
    path = sample.files["mask"]
    mask, latents = read_mask(path), read_video(sample.files["latents"]).latents
    if mask.shape != latents.shape[1:]:
        raise UserError(f"{path}: a mask of {tuple(mask.shape)} cells for latents of {tuple(latents.shape[1:])}.")
    if not bool(mask.any()):
        raise UserError(f"{path}: marks all of the clip as conditioning, so nothing of it would be learned.")
    return mask


_READERS: dict[str, Callable[[Sample], Tensor]] = {
    "latents": lambda sample: read_video(sample.files["latents"]).latents.to(STORED_DTYPE),
    "reference": lambda sample: read_video(sample.files["reference"]).latents.to(STORED_DTYPE),
    "mask": _mask,
    "audio": lambda sample: (
        read_audio(sample.files["audio"]).latents if "audio" in sample.files else torch.zeros(AUDIO_CHANNELS, 0, AUDIO_MEL_BINS)
    ).to(STORED_DTYPE),
    "reference_audio": lambda sample: read_audio(sample.files["reference_audio"]).latents.to(STORED_DTYPE),
}
"""By kind of sidecar: what its file holds."""
