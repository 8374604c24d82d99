"""The official trainer's `.precomputed` tree: which files belong together, and what is in them.

One `.pt` file an item and folder, at the same relative path in each folder. They are pickles, so they are read with
`torch.load(weights_only=True)` alone, which takes tensors and plain values and never runs what a file says.
"""

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.ltxv2.geometry import AUDIO_CHANNELS, AUDIO_LATENTS_PER_SECOND, AUDIO_MEL_BINS, LATENT_CHANNELS
from musubi_tuner.runtime.errors import UserError

FOLDERS = {
    "latents": "latents",
    "audio": "audio_latents",
    "reference": "reference_latents",
    "mask": "video_masks",
    "reference_audio": "reference_audio_latents",
    "text": "conditions",
}
"""By the kinds of sidecars that are made of their files."""
_LARGEST = 1e9
"""No rate, size or duration is as large."""
NOT_IMPORTED = ("audio_masks",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One item's files."""

    name: str
    """Relative path without its ending, with forward slashes."""
    stem: str
    """Names its cache files."""
    files: Mapping[str, Path]
    """By kind of sidecar; those that it lacks are left out."""


@dataclass(frozen=True, slots=True)
class OfficialVideo:
    """Latents of a clip, a still or a reference."""

    latents: Tensor
    """(128, F, H, W), normalized"""
    fps: float | None


@dataclass(frozen=True, slots=True)
class OfficialAudio:
    """Latents of sound."""

    latents: Tensor
    """(8, T, 16), normalized"""
    seconds: float


@dataclass(frozen=True, slots=True)
class OfficialText:
    """Features of a caption before the connectors, of its real tokens alone."""

    video: Tensor
    """(n, Wv)"""
    audio: Tensor | None
    """(n, Wa)"""
    padded: int
    """Tokens with the padding."""


def tree_root(path: Path) -> Path:
    """The folder that holds `latents` and the others.

    Raises:
        UserError: neither `path` nor a `.precomputed` in it is one.
    """
    for root in (path / ".precomputed", path):
        if any((root / FOLDERS[kind]).is_dir() for kind in ("latents", "audio")):
            return root
    raise UserError(
        f"--precomputed_directory {path}: holds neither 'latents' nor 'audio_latents'. Give the folder that the official trainer calls "
        "preprocessed_data_root (.precomputed as a rule)."
    )


def list_samples(root: Path, mode: str) -> tuple[tuple[Sample, ...], tuple[tuple[str, str], ...]]:
    """Items by name, and (name, reason) of those that lack a file that others have; lacking sound alone is no reason.

    Raises:
        UserError: no usable item, a folder that the mode needs and that is not there, or two items with one name for their caches.
    """
    first = "audio" if mode == "audio" else "latents"
    needed = [first, "text"] + (["audio"] if mode == "av" else [])
    for kind in needed:
        if not (root / FOLDERS[kind]).is_dir():
            hint = " Give --ltx_mode video to leave sound out." if kind == "audio" and mode == "av" else ""
            raise UserError(f"{root}: has no folder '{FOLDERS[kind]}', which --ltx_mode {mode} needs.{hint}")
    further = [kind for kind in ("reference", "mask", "reference_audio") if mode in KINDS[kind].modes and (root / FOLDERS[kind]).is_dir()]
    kinds = [*needed, *further]
    start = root / FOLDERS[first]
    paths = {path.relative_to(start) for path in start.rglob("*.pt")}
    samples, lacking = [], []
    for path, stem in _stems(root, sorted(paths)).items():
        name = path.with_suffix("").as_posix()
        files = {kind: file for kind in kinds if (file := _file_of(root, kind, path)).is_file()}
        missing = [kind for kind in kinds if kind not in files and (kind != "audio" or mode == "audio")]
        if missing:
            lacking.append((name, f"has no file in {', '.join(FOLDERS[kind] for kind in missing)}"))
        else:
            samples.append(Sample(name=name, stem=stem, files=files))
    if not samples:
        raise UserError(
            f"{start}: no item with a file in each of {', '.join(FOLDERS[kind] for kind in kinds)}"
            + (f" ({lacking[0][0]}: {lacking[0][1]})." if lacking else ".")
        )
    return tuple(samples), tuple(lacking)


def _file_of(root: Path, kind: str, path: Path) -> Path:
    """Older trees call the captions of `latent_7.pt` `condition_7.pt`."""
    if kind == "text" and path.name.startswith("latent_"):
        path = path.with_name("condition_" + path.name.removeprefix("latent_"))
    return root / FOLDERS[kind] / path


def _stems(root: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """Names for cache files: what tells the paths apart, with `_` between folders."""
    common = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    stems: dict[Path, str] = {}
    owners: dict[str, Path] = {}
    for path in paths:
        stems[path] = "_".join(path.relative_to(common).with_suffix("").parts)
        other = owners.setdefault(stems[path].casefold(), path)
        if other != path:
            raise UserError(
                f"{root}: the caches of '{other}' and '{path}' would have the same name, '{stems[path]}'. Rename one in every folder."
            )
    return stems


def read_video(path: Path) -> OfficialVideo:
    """Raises UserError: not latents of a video, in the present form (128, F, H, W) or the older (F * H * W, 128)."""
    value = _load(path, "latents")
    latents = value["latents"]
    if latents.ndim == 2:
        sizes = [_number(path, value, key) for key in ("num_frames", "height", "width")]
        frames, height, width = (0 if size is None else int(size) for size in sizes)
        if frames * height * width != latents.shape[0]:
            raise UserError(f"{path}: {latents.shape[0]} tokens are not num_frames x height x width = {frames} x {height} x {width}.")
        latents = latents.unflatten(0, (frames, height, width)).permute(3, 0, 1, 2)
    if latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS or not latents.numel():
        raise UserError(
            f"{path}: latents of shape {tuple(latents.shape)}; ({LATENT_CHANNELS}, frames, height, width) in cells is expected."
        )
    return OfficialVideo(latents, _number(path, value, "fps"))


def read_audio(path: Path) -> OfficialAudio:
    """Raises UserError: not latents of sound (8, T, 16)."""
    value = _load(path, "latents")
    latents = value["latents"]
    if latents.ndim != 3 or (latents.shape[0], latents.shape[2]) != (AUDIO_CHANNELS, AUDIO_MEL_BINS) or not latents.shape[1]:
        raise UserError(f"{path}: latents of shape {tuple(latents.shape)}; ({AUDIO_CHANNELS}, steps, {AUDIO_MEL_BINS}) is expected.")
    return OfficialAudio(latents, _number(path, value, "duration") or latents.shape[1] / AUDIO_LATENTS_PER_SECOND)


def read_text(path: Path) -> OfficialText:
    """Both forms: features by stream, and the older `prompt_embeds`, which both streams read.

    Raises:
        UserError: no features, or a mask that does not fit them or is empty.
    """
    value = _load(path, "prompt_attention_mask")
    older = value.get("prompt_embeds")
    video, audio = value.get("video_prompt_embeds", older), value.get("audio_prompt_embeds", older)
    mask = value["prompt_attention_mask"]
    for features in (video, audio):
        if features is not None and (not isinstance(features, Tensor) or features.ndim != 2 or mask.shape != features.shape[:1]):
            raise UserError(f"{path}: features are (tokens, width) with a mask of (tokens,); found {_shape(features)} and {_shape(mask)}.")
    if video is None:
        raise UserError(f"{path}: holds neither 'video_prompt_embeds' nor 'prompt_embeds', but {', '.join(map(str, value))}.")
    mask = mask.bool()
    if not bool(mask.any()):
        raise UserError(f"{path}: its prompt_attention_mask has no real token. Make this file again.")
    return OfficialText(video[mask], None if audio is None else audio[mask], len(mask))


def read_mask(path: Path) -> Tensor:
    """(F, H, W) float32 in latent cells, 1 where it counts: the official masks say 1 where a cell is conditioning.

    Raises:
        UserError: another form.
    """
    mask = _load(path, "mask")["mask"]
    if mask.ndim != 3:
        raise UserError(f"{path}: a mask of shape {tuple(mask.shape)}; (frames, height, width) in latent cells is expected.")
    return 1 - (mask.float() > 0.5).float()


def _load(path: Path, key: str) -> dict[str, Any]:
    """A file's dict, which has a tensor under `key`; its tensors are mapped and not read, where the file allows it."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes may end in any error of unpickling, struct.error and KeyError among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: torch.load(weights_only=True) does not read it ({reason}). Files that hold more than tensors and plain values are "
            "refused, as reading them could run code; damaged ones have to be made again."
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get(key), Tensor):
        found = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{path}: a dict with a tensor '{key}' is expected; found {found}.")
    return value


def _number(path: Path, value: Mapping[str, Any], key: str) -> float | None:
    found = value.get(key)
    if found is None:
        return None
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < _LARGEST:
        raise UserError(f"{path}: {key} = {found!r:.100}: must be a number above 0 and below {_LARGEST:g}.")
    return float(found)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
