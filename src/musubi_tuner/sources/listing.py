"""Listing a dataset's source files and their captions, and which of them are mirrored."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.names import is_cache_name
from musubi_tuner.cache.sidecars import KINDS, OwnFiles
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.config.validation import AnyPath, options, validated
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json_lines, real_path
from musubi_tuner.sources.captions import Caption, listed_captions, name_in, read_caption

EXTENSIONS = {
    "video": (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    "audio": (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus"),
}
_ANY_MEDIA = tuple(ending for endings in EXTENSIONS.values() for ending in endings)
_NOT_MEDIA = ("Thumbs.db", "desktop.ini", "caption_review.html", ".jsonl", ".toml")
"""Names and endings; the page is that of `ltxv2 dataset caption --page`."""
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
    caption_problem: str = ""
    """Why it cannot be read; the caption is empty then."""
    files: Mapping[str, Path]
    """Those that belong to it, by the kind of sidecar that is made of them; all sources of a dataset have one of a kind, or none."""


def list_sources(spec: DatasetSpec, *, require_captions: bool = True) -> tuple[Source, ...]:
    """The sources of a dataset, sorted by name.

    Args:
        require_captions: False for the latent caching programs, which do not use them.

    Raises:
        UserError: no usable file, missing or empty captions (`Source.caption_problem` tells of unreadable ones), a malformed jsonl line
            or one whose path leads nowhere, two sources with one stem, or two files of one kind for a source.
    """
    sources = _from_directory(spec) if spec.directory is not None else _from_jsonl(spec)
    if not sources:
        known = ", ".join(EXTENSIONS[spec.kind])
        raise UserError(f"{spec.label}: {spec.directory or spec.jsonl_file} holds no {spec.kind} file ({known}){_others(spec)}.")
    _refuse_same_stems(spec, sources)
    sources = _with_own_files(spec, sources)
    if require_captions:
        lacking = [source.name for source in sources if not source.caption and not source.caption_problem]
        if lacking:
            raise UserError(
                f"{spec.label}: {spec.directory or spec.jsonl_file}: {len(lacking)} of {len(sources)} sources have a missing or empty "
                f"caption: {', '.join(lacking[:10])}"
                f"{', ...' if len(lacking) > 10 else ''}. Put a '{spec.caption_extension}' file with the same stem beside each, "
                'or a "caption" field into the jsonl.'
            )
    return tuple(sorted(sources, key=lambda source: source.name))


def list_alone(spec: DatasetSpec) -> tuple[Source, ...]:
    """The sources without the files of the dataset's further folders, which may be lacking; captions too.

    Raises:
        UserError: what `list_sources` raises.
    """
    alone = dataclasses.replace(
        spec, reference_directory=None, reference_audio_directory=None, mask_directory=None, separate_audio_directory=None
    )
    return list_sources(alone, require_captions=False)


def list_all_sources(specs: Sequence[DatasetSpec], *, require_captions: bool = True) -> tuple[tuple[Source, ...], ...]:
    """The sources of each dataset.

    Raises:
        UserError: what `list_sources` raises, and two files of one stem in datasets that share a cache directory.
    """
    listed = tuple(list_sources(spec, require_captions=require_captions) for spec in specs)
    owners: dict[tuple[Path, str], tuple[DatasetSpec, Source]] = {}
    for spec, sources in zip(specs, listed, strict=True):
        for source in sources:
            other, first = owners.setdefault((real_path(spec.cache_directory), source.stem.casefold()), (spec, source))
            if real_path(first.path) != real_path(source.path):
                raise UserError(
                    f"{other.label} {first.path} and {spec.label} {source.path} have the same stem and the cache directory "
                    f"{spec.cache_directory}, and would overwrite each other's cache. Rename one, or give each its own cache_directory."
                )
    return listed


def sources_exist(spec: DatasetSpec) -> bool:
    """Whether any of the media are there to be compared with; training goes on without them."""
    if spec.directory is None:
        return spec.listing.is_file() and any((spec.root / path).is_file() for path, _ in listed_captions(spec))
    return spec.directory.is_dir() and any(_is_source(spec, path) for path in _entries(spec, spec.directory))


def _from_directory(spec: DatasetSpec) -> list[Source]:
    assert spec.directory is not None
    sources = []
    for path in _entries(spec, spec.directory):
        if _is_source(spec, path):
            sources.append(_source(spec, path, read_caption(path.with_suffix(spec.caption_extension)), {}))
    return sources


def left_out(spec: DatasetSpec) -> dict[str, tuple[str, ...]]:
    """What lies in a dataset's folder and is not used: names by kind, such as `.gif files` or `folders`. Hidden files and the cache are
    not counted."""
    if spec.directory is None:
        return {}
    entries = _entries(spec, spec.directory)
    used = {path.stem for path in entries if _is_source(spec, path)}
    own = {
        os.path.realpath(folder) for one in _own_files(spec).values() if (folder := getattr(spec, one.directory or "", None)) is not None
    }
    companions = os.path.realpath(spec.directory) in own
    own.add(os.path.realpath(spec.cache_directory))
    found: dict[str, list[str]] = {}
    for path in entries:
        ending, is_caption = path.suffix.lower(), path.suffix == spec.caption_extension
        if path.name.startswith(".") or _is_source(spec, path) or is_caption and path.stem in used or os.path.realpath(path) in own:
            continue
        if path.name in _NOT_MEDIA or ending in _NOT_MEDIA or is_cache_name(path.name) or companions and ending in _ANY_MEDIA:
            continue
        what = "folders" if path.is_dir() else f"{ending} files without a source" if is_caption else f"{ending or 'other'} files"
        found.setdefault(what, []).append(path.name)
    return {what: tuple(names) for what, names in sorted(found.items())}


def _entries(spec: DatasetSpec, folder: Path) -> list[Path]:
    """Of a folder, sorted, without the files beside files (`._...`) in which macOS keeps what another file system cannot."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("._"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{spec.label}: {folder}: no such folder. Correct the path in the dataset file, or put the folder back.") from error
    except OSError as error:
        raise UserError(f"{spec.label}: {folder}: cannot be read: {error.strerror}.") from error


def _is_source(spec: DatasetSpec, path: Path) -> bool:
    """Links that lead nowhere count: they are named when they are looked into."""
    return path.suffix.lower() in EXTENSIONS[spec.kind] and not path.is_dir()


def _source(spec: DatasetSpec, path: Path, caption: Caption, files: Mapping[str, Path]) -> Source:
    name = name_in(spec, path)
    return Source(path=path, name=name, stem=path.stem, caption=caption.text or "", caption_problem=caption.problem, files=files)


def _own_files(spec: DatasetSpec) -> dict[str, OwnFiles]:
    """What may belong to the sources of a dataset, by kind of sidecar."""
    return {kind.name: kind.files for kind in KINDS.values() if kind.files is not None and spec.kind in kind.files.of}


def _with_own_files(spec: DatasetSpec, sources: list[Source]) -> list[Source]:
    """Each source with the files of its stem in the dataset's further folders."""
    for name, own in _own_files(spec).items():
        folder: Path | None = None if own.directory is None else getattr(spec, own.directory)
        extensions = _OF_MEDIA[own.media]
        if folder is not None:
            if not folder.is_dir():
                raise UserError(f"{spec.label}: {own.directory} {folder}: no such folder. Correct the path in the dataset file.")
            found = files_by_stem(spec, name, sources)
            sources = [
                dataclasses.replace(source, files={name: found[source.name], **source.files}) if source.name in found else source
                for source in sources
            ]
        lacking = [source.name for source in sources if name not in source.files]
        if lacking and (folder is not None or len(lacking) < len(sources)):
            by_folder = f"Put a file with the same stem ({', '.join(extensions)}) into {folder or 'a folder'} ({own.directory}), or a"
            raise UserError(
                f"{spec.label}: {len(lacking)} of {len(sources)} sources have no {own.what}: {', '.join(lacking[:10])}"
                f"{', ...' if len(lacking) > 10 else ''}. {'Put a' if own.directory is None else by_folder} "
                f'"{own.path}" into each line of the jsonl.'
            )
    return sources


def files_by_stem(spec: DatasetSpec, name: str, sources: Iterable[Source]) -> dict[str, Path]:
    """What the dataset's further folder of a kind of sidecar has for its sources, by their names. A source that lies there itself does
    not count, nor does one count that names its file already.

    Raises:
        UserError: more than one file for a source, or a folder that cannot be read.
    """
    own = KINDS[name].own_files
    folder, extensions = getattr(spec, own.directory or ""), _OF_MEDIA[own.media]
    by_stem: dict[str, list[Path]] = {}
    for path in _entries(spec, folder):
        if path.suffix.lower() in extensions:
            by_stem.setdefault(path.stem.casefold(), []).append(path)
    found = {}
    for source in sources:
        if name in source.files:
            continue
        there = [path for path in by_stem.get(source.stem.casefold(), ()) if not _is_same_entry(path, source.path)]
        if len(there) > 1:
            raise UserError(
                f"{spec.label}: {folder} ({own.directory}) holds more than one {own.what} of {source.name}: "
                f"{', '.join(path.name for path in there)}. Keep one of them there."
            )
        if there:
            found[source.name] = there[0]
    return found


def _is_same_entry(one: Path, other: Path) -> bool:
    """Of the same folder; a link in another folder was put there to be used."""
    return one.name == other.name and real_path(one.parent) == real_path(other.parent)


def _others(spec: DatasetSpec) -> str:
    """What lies there instead."""
    found = [path.name for path in _entries(spec, spec.directory) if path.is_file()] if spec.directory is not None else []
    return f"; it holds {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}" if found else ""


def _from_jsonl(spec: DatasetSpec) -> list[Source]:
    sources, own = [], _own_files(spec)
    types = {f"{spec.kind}_path": AnyPath, "caption": str | None} | {files.path: AnyPath | None for files in own.values()}
    optional = dict.fromkeys(["caption", *(files.path for files in own.values())])
    line_class = options(type("Line", (), {"__annotations__": types, **optional}))
    for where, values in read_json_lines(spec.listing, named=f"{spec.label}:"):
        line = dataclasses.asdict(validated(line_class, values, where=where))
        path = _named_file(spec, where, line[f"{spec.kind}_path"], EXTENSIONS[spec.kind], spec.kind)
        named = {
            name: _named_file(spec, where, line[files.path], _OF_MEDIA[files.media], files.what)
            for name, files in own.items()
            if line[files.path] is not None
        }
        sources.append(_source(spec, path, Caption((line["caption"] or "").strip()), named))
    return sources


def _named_file(spec: DatasetSpec, where: str, path: Path, extensions: Sequence[str], kind: str) -> Path:
    path = path if path.is_absolute() else spec.listing.parent / path
    if path.suffix.lower() not in extensions:
        raise UserError(f"{where}: {path}: no {kind} file of a known kind ({', '.join(extensions)}).")
    if not path.is_file():
        raise UserError(f"{where}: {path}: no such file.")
    return path


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


_SIDES = re.compile(r"\b(?:left|right)(?:most|wards?|hand(?:ed)?)?\b", re.IGNORECASE)


def side_named(caption: str) -> str | None:
    """The first word of a caption that tells left from right, such as `left` or `Rightmost`; None where there is none."""
    found = _SIDES.search(caption)
    return found.group() if found else None


def is_mirrored(spec: DatasetSpec, caption: str) -> bool:
    """Whether `flip_x` adds mirror images of a source: where its caption, if there is one yet, would still be true of them."""
    return spec.flip_x == "force" or bool(spec.flip_x) and side_named(caption) is None
