"""What is to be captioned, and what of it a captioner sees and hears."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from musubi_tuner.config.dataset import DatasetSpec, load_dataset_config
from musubi_tuner.media.audio import Waveform, read_audio, resample
from musubi_tuner.media.picture import cover_and_crop, read_picture
from musubi_tuner.media.probe import AudioInfo, probe_audio, probe_video
from musubi_tuner.media.video import read_frames
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.sources.listing import EXTENSIONS, Source, list_sources

SOUND_RATE = 16_000
"""Samples a second: what speech models hear."""


@dataclass(frozen=True, slots=True)
class Medium:
    """One file to be captioned."""

    spec: DatasetSpec
    source: Source

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def caption_file(self) -> Path | None:
        """Where its caption lies; None: in a jsonl."""
        return None if self.spec.directory is None else self.path.with_suffix(self.spec.caption_extension)


@dataclass(frozen=True, slots=True)
class Looking:
    """How media are looked at."""

    frames: int
    longest_side: int
    sound: bool
    """Of videos; that of sound files is always heard."""
    sound_seconds: float


@dataclass(frozen=True, slots=True)
class Look:
    """What a captioner gets."""

    kind: str
    pictures: tuple[Tensor, ...]
    """(H, W, 3) uint8"""
    times: tuple[float, ...]
    """Seconds of a video's frames."""
    seconds: float
    """Of the whole file; 0 for a picture."""
    sound: Tensor | None
    """(n,) float32, one channel of `SOUND_RATE`."""
    sound_is_cut: bool = False
    """There is more of it than is heard."""


def media_specs(path: Path, caption_extension: str | None) -> tuple[DatasetSpec, ...]:
    """The datasets of a TOML, validation among them; or one for each kind of media in a folder.

    Raises:
        UserError: a TOML with a fault, a folder without media, or neither.
    """
    if not path.is_dir():
        if path.suffix.lower() != ".toml":
            what = "no such folder or file" if not path.exists() else "is a file"
            raise UserError(f"--media {path}: {what}. Give a dataset TOML, or the folder in which the media are.")
        return tuple(_spec_of_toml(spec, caption_extension) for spec in load_dataset_config(path).all)
    endings = {one.suffix.lower() for one in path.iterdir() if one.is_file() and not one.name.startswith("._")}
    kinds: tuple[Literal["video", "image", "audio"], ...] = ("video", "image", "audio")
    found = [kind for kind in kinds if not endings.isdisjoint(EXTENSIONS[kind])]
    if not found:
        known = ", ".join(ending for endings in EXTENSIONS.values() for ending in endings)
        raise UserError(f"--media {path}: holds no media ({known}). Folders in it are not looked into; give the one with the files.")
    return tuple(_spec_of_folder(path, kind, caption_extension or ".txt") for kind in found)


def _spec_of_toml(spec: DatasetSpec, caption_extension: str | None) -> DatasetSpec:
    """Without companions that nobody looks at; they may still be missing."""
    return dataclasses.replace(
        spec,
        caption_extension=caption_extension or spec.caption_extension,
        reference_directory=None,
        reference_audio_directory=None,
        mask_directory=None,
    )


def _spec_of_folder(path: Path, kind: Literal["video", "image", "audio"], caption_extension: str) -> DatasetSpec:
    return DatasetSpec(
        label=str(path), kind=kind, directory=path, jsonl_file=None, cache_directory=path, caption_extension=caption_extension
    )


def list_media(specs: Sequence[DatasetSpec]) -> tuple[list[Medium], list[tuple[Medium, Medium]]]:
    """Each file once, in the order of the datasets; and those left out, each with the file whose caption theirs would be.

    Raises:
        UserError: what `list_sources` raises.
    """
    media, shared = [], []
    owners: dict[object, Medium] = {}
    for spec in specs:
        for source in list_sources(spec, require_captions=False):
            medium = Medium(spec, source)
            place = medium.caption_file or (spec.jsonl_file, source.name)
            owner = owners.setdefault(place, medium)
            if owner is medium:
                media.append(medium)
            elif owner.path != medium.path:
                shared.append((medium, owner))
    return media, shared


def look_at(medium: Medium, how: Looking) -> Look:
    """Decode what the captioner gets.

    Raises:
        UserError: a file that does not decode.
    """
    if medium.kind == "image":
        return Look("image", (_scaled(read_picture(medium.path), how.longest_side),), (), 0.0, None)
    if medium.kind == "audio":
        info = probe_audio(medium.path)
        sound, cut = _heard(medium.path, info, info.start, how)
        return Look("audio", (), (), info.end - info.start, sound, cut)
    video = probe_video(medium.path)
    count = min(how.frames, len(video.times))
    places = tuple((2 * number + 1) * len(video.times) // (2 * count) for number in range(count))
    width, height = _fitted(video.width, video.height, how.longest_side)
    pictures = tuple(read_frames(video, places, width, height))
    seconds = video.times[-1] + 1 / video.fps
    sound, cut = None, False
    if how.sound:
        if own := medium.source.files.get("audio"):
            info = probe_audio(own)
            sound, cut = _heard(own, info, info.origin, how)
        elif video.audio is not None:
            sound, cut = _heard(medium.path, video.audio, video.start, how)
    return Look("video", pictures, tuple(video.times[place] for place in places), seconds, sound, cut)


def _heard(path: Path, info: AudioInfo, start: float, how: Looking) -> tuple[Tensor | None, bool]:
    """One channel, and whether there is more; None where nothing is left to hear."""
    end = min(info.end, start + how.sound_seconds)
    if end <= start:
        return None, False
    waveform = read_audio(path, info, start, end)
    if not waveform.samples.shape[1]:
        return None, False
    return resample(waveform.samples.mean(dim=0), waveform.rate, SOUND_RATE), info.end > end + 0.05


def as_waveform(sound: Tensor) -> Waveform:
    return Waveform(sound[None], SOUND_RATE)


def _fitted(width: int, height: int, longest: int) -> tuple[int, int]:
    scale = min(1.0, longest / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _scaled(picture: Tensor, longest: int) -> Tensor:
    height, width, _ = picture.shape
    size = _fitted(width, height, longest)
    return picture if size == (width, height) else cover_and_crop(picture, *size)
