"""What the captions of a dataset say now, whether or not its media are still there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json_lines, read_text


@dataclass(frozen=True, slots=True)
class Caption:
    """Of one source."""

    text: str | None
    """Without blanks around it; None: there is none."""
    problem: str = ""
    """Why it cannot be read."""


def captions_now(spec: DatasetSpec, sources: Sequence[str]) -> Mapping[str, Caption]:
    """Captions by the names of the sources; nothing where neither the dataset's folder or jsonl nor any caption is there."""
    if spec.directory is None:
        if not spec.listing.is_file():
            return {}
        listed = {name_in(spec, spec.root / path): caption for path, caption in listed_captions(spec)}
        return {name: listed.get(name, Caption(None)) for name in sources}
    paths = {name: (spec.directory / name).with_suffix(spec.caption_extension) for name in sources}
    found = {name: read_caption(path) for name, path in paths.items()}
    return found if any(caption.text is not None or caption.problem for caption in found.values()) else {}


def read_caption(path: Path) -> Caption:
    """The caption in a file of its own."""
    try:
        return Caption(read_text(path).strip() if path.is_file() else None)
    except UserError as error:
        return Caption(None, str(error))
    except OSError:  # a name that is too long
        return Caption(None)


def listed_captions(spec: DatasetSpec) -> Iterator[tuple[str, Caption]]:
    """(path as it is written, caption) of a dataset's jsonl; lines of another form are passed over.

    Raises:
        UserError: a line that is no JSON.
    """
    for _, line in read_json_lines(spec.listing, named=f"{spec.label}:"):
        path, text = (line.get(key) if isinstance(line, dict) else None for key in (f"{spec.kind}_path", "caption"))
        if isinstance(path, str):
            yield path, Caption(text.strip() if isinstance(text, str) else None)


def name_in(spec: DatasetSpec, path: Path) -> str:
    """The name of a source: its path relative to the dataset's root, where it lies below."""
    return (path.relative_to(spec.root) if path.is_relative_to(spec.root) else path).as_posix()
