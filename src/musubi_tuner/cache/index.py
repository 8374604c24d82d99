"""The index of a dataset's planned clips: written after planning and before encoding, read by training.

A clip that failed to encode is therefore a named hole, and training needs no media.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from musubi_tuner.cache.fingerprint import canonical, text_fingerprint
from musubi_tuner.cache.names import index_name
from musubi_tuner.cache.store import write_bytes
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import quoted


class PlannedDataset(Protocol):
    """What the index needs to know of a dataset: `config.dataset.DatasetSpec` is one."""

    @property
    def label(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def cache_directory(self) -> Path: ...

    def settings(self) -> dict[str, Any]:
        """What shapes planning, as plain JSON values."""
        ...


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
    start_frame: int
    """Counted in frames of the sampled clip."""
    frames: int
    """1 for stills, 0 for sound alone."""
    width: int
    height: int
    original_width: int
    """As displayed: after rotation and the pixels' aspect ratio."""
    original_height: int
    latents: str | None
    """File name in the cache directory; None for sound alone."""
    audio: str | None
    """File name of the sidecar; None for stills."""
    text: str
    has_audio: bool
    """Whether the source has an audio stream."""
    reference: str | None = None
    """File name of what is shown beside it (IC-LoRA); None = nothing. The next six are of it."""
    reference_source: str = ""
    reference_fingerprint: str = ""
    reference_frames: int = 0
    """1 for a picture."""
    reference_fps: float = 0.0
    reference_width: int = 0
    reference_height: int = 0
    mask: str | None = None
    """File name of its mask; None = there is none."""
    mask_source: str = ""
    mask_fingerprint: str = ""
    sound_source: str = ""
    """A video's sound file, where it is not in the video's own."""
    sound_fingerprint: str = ""
    reference_sound: str | None = None
    """File name of what is played beside its sound; None = nothing."""
    reference_sound_source: str = ""
    reference_sound_fingerprint: str = ""
    mirrored: bool = False
    """Its pictures, with references and masks, are flipped left to right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetIndex:
    """What was planned for one dataset."""

    settings: Mapping[str, Any]
    clips: tuple[Clip, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    """(source, reason) of sources without any clip."""


def latents_window(clip: Clip) -> str:
    """What the dataset decided about a clip's pictures, as the metadata entry `window` of its latents records it."""
    window: dict[str, Any] = {"kind": clip.kind, "width": clip.width, "height": clip.height}
    if clip.kind == "video":
        window |= {"start": clip.start_seconds, "end": clip.end_seconds, "fps": clip.fps, "frames": clip.frames}
    return canonical(window | _mirrored(clip))


def reference_window(clip: Clip) -> str:
    """The same for what is shown beside it: the same seconds, at a size and rate of its own."""
    window = {"width": clip.reference_width, "height": clip.reference_height, "frames": clip.reference_frames}
    return canonical(window | {"start": clip.start_seconds, "fps": clip.reference_fps} | _mirrored(clip))


def reference_audio_window(clip: Clip) -> str:
    """Of what is played beside its sound: from its own beginning, as long as the clip at most."""
    return canonical({"longest": clip.end_seconds - clip.start_seconds})


def audio_window(clip: Clip) -> str:
    """The same for its sound: the seconds alone, and the frame rate that says how much may be padded at a stream's end."""
    return canonical({"start": clip.start_seconds, "end": clip.end_seconds, "fps": clip.fps})


def _mirrored(clip: Clip) -> dict[str, Any]:
    """Nothing for other clips, so that their files stay valid."""
    return {"mirrored": True} if clip.mirrored else {}


def index_path(dataset: PlannedDataset) -> Path:
    """One file for each dataset in the directory, told apart by where its media lie and how it cuts them."""
    digest = text_fingerprint(canonical(dataset.settings()))[:8]
    return dataset.cache_directory / index_name(digest)


def write_index(dataset: PlannedDataset, index: DatasetIndex) -> Path:
    """Write the index, the same bytes for the same plan."""
    value = {
        "settings": dict(index.settings),
        "clips": [dataclasses.asdict(clip) for clip in index.clips],
        "dropped": [list(row) for row in index.dropped],
    }
    path = index_path(dataset)
    data = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True).encode("utf-8")
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)
    return path


def read_index(dataset: PlannedDataset, dataset_config: Path) -> DatasetIndex:
    """Read the index that was planned with exactly the dataset's settings.

    Args:
        dataset_config: the TOML, for the command in messages.

    Raises:
        UserError: there is none; where another one is there, the message says which settings differ.
    """
    program = "ltxv2_cache_audio_latents.py" if dataset.kind == "audio" else "ltxv2_cache_latents.py"
    remedy = f"Run: python {program} --dataset_config {quoted(dataset_config)}"
    path = index_path(dataset)
    if not path.is_file():
        others = sorted(dataset.cache_directory.glob(index_name("*")))
        hint = _difference(others, dataset.settings()) if others else "nothing was cached there yet"
        raise UserError(f"{dataset_config}: {dataset.label}: {dataset.cache_directory} holds no index of this dataset ({hint}). {remedy}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        clips = tuple(Clip(**clip) for clip in value["clips"])
        dropped = tuple((source, reason) for source, reason in value["dropped"])
    except (json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged, or of another version ({error}). {remedy}") from error
    return DatasetIndex(settings=value["settings"], clips=clips, dropped=dropped)


def _difference(others: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """How the nearest index that is there differs from the wanted one."""
    best: list[str] | None = None
    for path in others:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (json.JSONDecodeError, KeyError):
            continue
        differing = [key for key in sorted(set(found) | set(settings)) if found.get(key) != settings.get(key)]
        rows = [f"{key} is {settings.get(key)!r}, cached with {found.get(key)!r}" for key in differing]
        if best is None or len(rows) < len(best):
            best = rows
    return "; ".join(best[:4]) if best else "the index there cannot be read"
