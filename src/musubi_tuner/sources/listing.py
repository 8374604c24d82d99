"""Listing a dataset's source files and their captions."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.sidecars import KINDS, OwnFiles
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.config.flags import nearest
from musubi_tuner.runtime.errors import UserError

EXTENSIONS = {
    "video": (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    "audio": (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus"),
}
_OF_MEDIA = {"pictures": EXTENSIONS["video"] + EXTENSIONS["image"], "sounds": EXTENSIONS["audio"] + EXTENSIONS["video"]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One source file."""

    path: Path
    name: str
    """Relative to the dataset's root, with forward slashes."""
    stem: str
    """Names its cache files."""
    caption: str
    """Empty where captions were not asked for and there is none."""
    files: Mapping[str, Path]
    """Those that belong to it, by the kind of sidecar that is made of them; all sources of a dataset have one of a kind, or none."""


def own_files(spec: DatasetSpec) -> dict[str, OwnFiles]:
    """The kinds of files that may belong to the sources of a dataset."""
    return {kind.name: kind.files for kind in KINDS.values() if kind.files is not None and spec.kind in kind.files.of}


def list_sources(spec: DatasetSpec, *, require_captions: bool = True) -> tuple[Source, ...]:
    """The sources of a dataset, sorted by name.

    Args:
        require_captions: False for the latent caching programs, which do not use them.

    Raises:
        UserError: no usable file, missing or empty captions, a malformed jsonl line or one whose path leads nowhere, or two sources
            with one stem.
    """
    sources = _from_directory(spec) if spec.directory is not None else _from_jsonl(spec)
    if not sources:
        known = ", ".join(EXTENSIONS[spec.kind])
        raise UserError(f"{spec.label}: {spec.directory or spec.jsonl_file} holds no {spec.kind} file ({known}){_others(spec)}.")
    _refuse_same_stems(spec, sources)
    sources = _with_own_files(spec, sources)
    if require_captions:
        lacking = [source.name for source in sources if not source.caption.strip()]
        if lacking:
            raise UserError(
                f"{spec.label}: {len(lacking)} of {len(sources)} sources have a missing or empty caption: {', '.join(lacking[:10])}"
                f"{', ...' if len(lacking) > 10 else ''}. Put a '{spec.caption_extension}' file with the same stem beside each, "
                'or a "caption" field into the jsonl.'
            )
    return tuple(sorted(sources, key=lambda source: source.name))


def list_all_sources(specs: Sequence[DatasetSpec], *, require_captions: bool = True) -> tuple[tuple[Source, ...], ...]:
    """The sources of each dataset.

    Raises:
        UserError: what `list_sources` raises, and two files of one stem in datasets that share a cache directory.
    """
    listed = tuple(list_sources(spec, require_captions=require_captions) for spec in specs)
    owners: dict[tuple[Path, str], tuple[DatasetSpec, Source]] = {}
    for spec, sources in zip(specs, listed, strict=True):
        for source in sources:
            other, first = owners.setdefault((spec.cache_directory.resolve(), source.stem.casefold()), (spec, source))
            if first.path.resolve() != source.path.resolve():
                raise UserError(
                    f"{other.label} {first.path} and {spec.label} {source.path} have the same stem and the cache directory "
                    f"{spec.cache_directory}, and would overwrite each other's cache. Rename one, or give each its own cache_directory."
                )
    return listed


def sources_exist(spec: DatasetSpec) -> bool:
    """Whether the media are there to be compared with; training goes on without them."""
    return spec.directory.is_dir() if spec.directory is not None else spec.jsonl_file.is_file()


def _from_directory(spec: DatasetSpec) -> list[Source]:
    if not spec.directory.is_dir():
        raise UserError(f"{spec.label}: {spec.directory}: no such folder.")
    sources = []
    for path in sorted(spec.directory.iterdir()):
        if path.is_file() and path.suffix.lower() in EXTENSIONS[spec.kind]:
            caption = path.with_suffix(spec.caption_extension)
            sources.append(_source(spec, path, _read_text(caption).strip() if caption.is_file() else None, {}))
    return sources


def _source(spec: DatasetSpec, path: Path, caption: str | None, files: Mapping[str, Path]) -> Source:
    return Source(path=path, name=_relative(path, spec.root), stem=path.stem, caption=caption or "", files=files)


def _with_own_files(spec: DatasetSpec, sources: list[Source]) -> list[Source]:
    """Each source with the files of its stem in the dataset's further folders."""
    for name, own in own_files(spec).items():
        folder: Path | None = None if own.directory is None else getattr(spec, own.directory)
        extensions = _OF_MEDIA[own.media]
        if folder is not None:
            if not folder.is_dir():
                raise UserError(f"{spec.label}: {own.directory} {folder}: no such folder.")
            found = {path.stem.casefold(): path for path in sorted(folder.iterdir()) if path.suffix.lower() in extensions}
            named = [source.files.get(name) or found.get(source.stem.casefold()) for source in sources]
            sources = [
                source if file is None else dataclasses.replace(source, files={**source.files, name: file})
                for source, file in zip(sources, named, strict=True)
            ]
        lacking = [source.name for source in sources if name not in source.files]
        if lacking and (folder is not None or len(lacking) < len(sources)):
            raise UserError(
                f"{spec.label}: {len(lacking)} of {len(sources)} sources have no {own.what}: {', '.join(lacking[:10])}"
                f"{', ...' if len(lacking) > 10 else ''}. Put a file with the same stem ({', '.join(extensions)}) into "
                f'{folder or "a folder"} ({own.directory}), or a "{own.path}" into each line of the jsonl.'
            )
    return sources


def _others(spec: DatasetSpec) -> str:
    """What lies there instead."""
    found = sorted(path.name for path in spec.directory.iterdir() if path.is_file()) if spec.directory is not None else []
    return f"; it holds {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}" if found else ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Save the file as UTF-8.") from error


def _from_jsonl(spec: DatasetSpec) -> list[Source]:
    if not spec.jsonl_file.is_file():
        raise UserError(f"{spec.label}: {spec.jsonl_file}: no such file.")
    lines = _read_text(spec.jsonl_file).split("\n")
    return [_from_line(spec, f"{spec.jsonl_file}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def _from_line(spec: DatasetSpec, where: str, line: str) -> Source:
    field = f"{spec.kind}_path"
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error}).") from error
    if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
        raise UserError(f'{where}: must be an object with a text field "{field}" (and "caption").')
    own = {files.path: (name, files) for name, files in own_files(spec).items()}
    fields = [field, "caption", *own]
    if unknown := sorted(set(entry) - set(fields)):
        raise UserError(f"{where}: unknown field '{unknown[0]}'.{nearest(unknown[0], fields)} Fields are {', '.join(fields)}.")
    caption = entry.get("caption")
    if not isinstance(caption, str | None):
        raise UserError(f"{where}: caption = {caption!r}: must be text.")
    path = _named_file(spec, where, entry[field], EXTENSIONS[spec.kind], spec.kind)
    files = {}
    for key in (key for key in own if key in entry):
        if not isinstance(entry[key], str):
            raise UserError(f"{where}: {key} = {entry[key]!r}: must be text.")
        name, kind = own[key]
        files[name] = _named_file(spec, where, entry[key], _OF_MEDIA[kind.media], kind.what)
    return _source(spec, path, caption.strip() if caption else None, files)


def _named_file(spec: DatasetSpec, where: str, text: str, extensions: Sequence[str], kind: str) -> Path:
    path = Path(text)
    path = path if path.is_absolute() else spec.jsonl_file.parent / path
    if path.suffix.lower() not in extensions:
        raise UserError(f"{where}: {path}: no {kind} file of a known kind ({', '.join(extensions)}).")
    if not path.is_file():
        raise UserError(f"{where}: {path}: no such file.")
    return path


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _refuse_same_stems(spec: DatasetSpec, sources: list[Source]) -> None:
    seen: dict[str, Source] = {}
    for source in sources:
        key = source.stem.casefold()
        if key in seen:
            raise UserError(
                f"{spec.label}: '{seen[key].name}' and '{source.name}' have the same stem, and would overwrite each other's cache. "
                "Rename one, or put them into two datasets with a cache_directory each."
            )
        seen[key] = source
