"""Looking into the files of a source: what they are, before anything is cut from them. What cannot be read is named, and no more."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from musubi_tuner.cache.index import printable
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.cache.store import file_fingerprint
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.media.picture import picture_size
from musubi_tuner.media.probe import AudioInfo, VideoInfo, probe_audio, probe_video
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.sources.listing import EXTENSIONS, Source


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A file that was looked into."""

    path: Path
    found: VideoInfo | AudioInfo | tuple[int, int]
    """A picture has its size as displayed."""
    fingerprint: str

    @property
    def video(self) -> VideoInfo:
        """`found` of a video."""
        assert isinstance(self.found, VideoInfo)
        return self.found

    @property
    def audio(self) -> AudioInfo:
        """`found` of a sound file."""
        assert isinstance(self.found, AudioInfo)
        return self.found

    @property
    def shown(self) -> tuple[int, int]:
        """`found` of a picture."""
        assert isinstance(self.found, tuple)
        return self.found


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """A source and what was found in it."""

    source: Source
    media: MediaFile
    files: Mapping[str, MediaFile]
    """Those that belong to it, by kind of sidecar."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A source of which a file cannot be read, and why."""

    source: Source
    problem: str


def look_into(spec: DatasetSpec, source: Source) -> Probed | Unreadable:
    """A source's own file and those that belong to it; where the dataset gives the source's rate, all of their pictures at that."""
    try:
        _check_name(source)
        media, files = _media_file(source.path, spec.kind), {}
        for name, path in source.files.items():
            is_picture = path.suffix.lower() in EXTENSIONS["image"]
            files[name] = _media_file(path, "audio" if KINDS[name].own_files.media == "sounds" else "image" if is_picture else "video")
        if isinstance(own := media.found, VideoInfo) and spec.source_fps is not None:
            files = {name: _moved_along(file, own, spec.source_fps) for name, file in files.items()}
            times = tuple(i / spec.source_fps for i in range(len(own.times)))
            media = dataclasses.replace(media, found=dataclasses.replace(own, times=times, fps=spec.source_fps, is_variable=False))
        return Probed(source=source, media=media, files=files)
    except UserError as error:
        return Unreadable(source, str(error))


def _moved_along(file: MediaFile, own: VideoInfo, fps: float) -> MediaFile:
    """A video that belongs to a source, with its frames beside the same frames of the source once these follow each other at `fps`.

    Args:
        own: the source by its own time stamps.
    """
    if not isinstance(file.found, VideoInfo):
        return file
    times = np.asarray(file.found.times)
    places = np.interp(times, own.times, np.arange(len(own.times))) + np.maximum(times - own.times[-1], 0.0) * own.fps
    found = dataclasses.replace(file.found, times=tuple((places / fps).tolist()), fps=file.found.fps * fps / own.fps)
    return dataclasses.replace(file, found=found)


def _check_name(source: Source) -> None:
    """
    Raises:
        UserError: a name that the index, which is UTF-8, cannot hold.
    """
    for path in (source.path, *source.files.values()):
        if str(path) != printable(str(path)):
            raise UserError(f"{path}: its name is not UTF-8. Rename it.")


def _media_file(path: Path, kind: str) -> MediaFile:
    look = {"video": probe_video, "image": picture_size, "audio": probe_audio}[kind]
    return MediaFile(path, look(path), file_fingerprint(path))
