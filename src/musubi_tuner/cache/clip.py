"""A planned item, and the cache files that belong to it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """One cache file of a clip, and what it is made from."""

    file: str
    """Name in the cache directory."""
    source: str = ""
    """Path of the file it is made from, where that is not the clip's own source."""
    fingerprint: str = ""
    """Of that file."""
    frames: int = 0
    """Size and rate of its pictures, where they are not the clip's; 1 frame for a picture."""
    fps: float = 0.0
    width: int = 0
    height: int = 0
    colors: str = ""
    """By which rule its pictures are read, where that is not their tags alone (`media.probe.VideoInfo.rule`)."""
    from_pictures: bool = False
    """Its sound is that of a film whose sound and pictures begin apart: its time is counted from the film's first frame."""
    at: tuple[int, ...] = ()
    """Which of the clip's frames its pictures are, where each stands alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One planned item: one window of one source."""

    key: str
    """Unique in its dataset and stable."""
    kind: str
    """`video`, `image` or `audio`."""
    source: str
    """Path for people and for finding it again, relative to the dataset's media folder, with forward slashes."""
    stem: str
    source_fingerprint: str
    start_seconds: float
    """Counted from the first frame (of sound alone: from the first sample)."""
    end_seconds: float
    fps: float
    """Frame rate of the sampled clip: true, or the dataset's target; stills sit at their config's clip rate."""
    start_frame: int = 0
    """Counted in frames of the sampled clip."""
    frames: int
    """1 for stills, 0 for sound alone."""
    width: int = 0
    """0 for sound alone, as the next three."""
    height: int = 0
    original_width: int = 0
    """As displayed: after rotation and the pixels' aspect ratio."""
    original_height: int = 0
    has_audio: bool
    """Whether there is sound: an audio stream in the source, or a file of its own."""
    sidecars: Mapping[str, Sidecar]
    """By the names of their kinds (`cache.sidecars.KINDS`)."""
    mirrored: bool = False
    """Its pictures, with references and masks, are flipped left to right."""
    colors: str = ""
    """As of `Sidecar`, of the source itself."""
    source_fps: float = 0.0
    """Rate that the dataset gives the source in place of its file's own; 0: none."""

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds
