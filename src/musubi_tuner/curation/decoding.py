"""Cached clips back into files, so that people see and hear what will be trained: mp4 with sound, png of stills, wav of sound alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.clip import Clip
from musubi_tuner.cache.index import read_index
from musubi_tuner.cache.names import training_key
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.cache.store import read
from musubi_tuner.config.dataset import DatasetConfig, DatasetSpec
from musubi_tuner.generation.decode import decode_samples
from musubi_tuner.generation.denoise import SampledLatents
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.media.audio import Waveform
from musubi_tuner.media.write import write_image, write_video, write_wav
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.tables import names_of

_TOGETHER = 16
"""Clips for which each decoder is loaded once."""
_NOT_IN_NAMES = '/\\:*?"<>|'


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file that is to be made."""

    label: str
    clip: Clip
    kind: str
    """`latents`, or `reference`: whose pictures they are."""
    stem: Path


@dataclass(frozen=True, slots=True)
class Decoded:
    """One file."""

    clip: str
    path: Path | None
    """None where the cache has a hole."""
    what: str


def choose(datasets: DatasetConfig, folder: Path, *, clips: Sequence[str], most: int | None, references: bool) -> list[Wanted]:
    """What of the datasets, validation among them, is to be decoded.

    Args:
        clips: patterns such as `dance*` over the names of clips or of their sources; none = all of them.
        most: of each dataset.

    Raises:
        UserError: no index, or a pattern that nothing matches.
    """
    found, idle, known = [], dict.fromkeys(clips), []
    for spec in (*datasets.datasets, *datasets.validation_datasets):
        index = read_index(spec, datasets.path)
        own = []
        for clip in index.clips:
            matching = [pattern for pattern in clips if any(fnmatchcase(name, pattern) for name in (clip.key, clip.source))]
            for pattern in matching:
                idle.pop(pattern, None)
            if matching or not clips:
                own.append(clip)
        known += [clip.key for clip in index.clips]
        for clip in own[:most]:
            kinds = ["latents", *(["reference"] if references and "reference" in clip.sidecars else [])]
            found += [Wanted(spec.label, clip, kind, _stem(folder, spec, clip, kind)) for kind in kinds]
    if idle:
        raise UserError(f"--clips {' '.join(idle)}: no clip of {datasets.path} is called so. Its clips: {names_of(known, 5)}.")
    if not found:
        raise UserError(f"{datasets.path}: no clips.")
    return found


def decode(
    wanted: Sequence[Wanted],
    datasets: DatasetConfig,
    vae: Checkpoint,
    audio_vae: Checkpoint,
    device: torch.device,
    advance: Callable[[], object],
) -> Iterator[Decoded]:
    """Decode and write, some clips at a time; files that are there are written over.

    Args:
        advance: called after each of `wanted`.

    Raises:
        UserError: a cache file that cannot be read, a checkpoint without the decoder, or a file that cannot be written.
    """
    folders = {spec.label: spec.cache_directory for spec in (*datasets.datasets, *datasets.validation_datasets)}
    for start in range(0, len(wanted), _TOGETHER):
        some = wanted[start : start + _TOGETHER]
        latents = [_latents(one, folders[one.label]) for one in some]
        whole = [one for one in latents if one is not None]
        decoded = iter(decode_samples(whole, vae, audio_vae, device) if whole else ())
        for one, own in zip(some, latents, strict=True):
            if own is None:
                yield Decoded(one.clip.key, None, "not cached")
            else:
                frames, sound = next(decoded)
                yield _write(one, frames, sound)
            advance()


def _latents(wanted: Wanted, folder: Path) -> SampledLatents | None:
    """None where a file is missing that the clip should have."""
    clip = wanted.clip
    video, audio = (_tensor(clip, kind, folder) for kind in (wanted.kind, "audio"))
    if wanted.kind == "reference":
        audio = None
    if video is None and (clip.frames or audio is None):
        return None
    return SampledLatents(video=video, audio=None if audio is None or not audio.shape[2] else audio)


def _tensor(clip: Clip, kind: str, folder: Path) -> Tensor | None:
    """(1, C, ...) float32 of one sidecar."""
    if kind not in clip.sidecars or not (path := folder / clip.sidecars[kind].file).is_file():
        return None
    name = {"latents": "latents", "reference": "ref_latents", "audio": "audio_latents"}[kind]
    row = KINDS[kind]
    if fault := reason_to_rebuild(path, {}, row.keys, row.forms(clip), to_read=True):
        raise UserError(f"{path}: {fault}. It is of another tool or damaged; run {row.program} again.")
    tensors = {training_key(key): value for key, value in read(path).items()}
    return tensors[name].float()[None]


def _write(wanted: Wanted, frames: Tensor | None, sound: Waveform | None) -> Decoded:
    clip, stem = wanted.clip, wanted.stem
    if frames is None:
        assert sound is not None
        path = stem.with_name(f"{stem.name}.wav")
        write_wav(path, sound)
        return Decoded(clip.key, path, f"sound, {sound.samples.shape[1] / sound.rate:.2f} s")
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    if len(frames) == 1:
        path = stem.with_name(f"{stem.name}.png")
        write_image(path, frames[0])
        return Decoded(clip.key, path, f"still, {size}")
    fps = clip.sidecars[wanted.kind].fps or clip.fps
    path = stem.with_name(f"{stem.name}.mp4")
    write_video(path, frames, fps, sound)
    return Decoded(clip.key, path, f"{len(frames)} frames, {size}, {'with sound' if sound else 'silent'}")


def _stem(folder: Path, spec: DatasetSpec, clip: Clip, kind: str) -> Path:
    name = "".join("_" if sign in _NOT_IN_NAMES else sign for sign in clip.key)
    label = "".join("_" if sign in _NOT_IN_NAMES + "[]" else sign for sign in spec.label).strip("_")
    return folder / label / f"{name}{'_mirrored' * clip.mirrored}{'_reference' * (kind == 'reference')}"
