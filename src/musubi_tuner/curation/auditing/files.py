"""What the files say: the index against the cache, the sources against the index, companions against the sources."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.index import DatasetIndex, printable
from musubi_tuner.cache.names import index_name, is_cache_name, text_name
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.curation.auditing.findings import Finding
from musubi_tuner.dataset.changes import source_problems
from musubi_tuner.dataset.items import Item, has_sound
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json, real_path
from musubi_tuner.sources.listing import EXTENSIONS, Source, files_by_stem, left_out, list_alone, list_sources, sources_exist

_COMPANION_KEYS = {kind.files.directory: kind for kind in KINDS.values() if kind.files is not None and kind.files.directory is not None}


def items_of(spec: DatasetSpec, index: DatasetIndex) -> list[Item]:
    """Every clip with all its cache files, whatever the mode that would read them."""
    return [
        Item(
            key=f"{spec.label}/{clip.key}",
            spec=spec,
            clip=clip,
            paths={name: spec.cache_directory / sidecar.file for name, sidecar in clip.sidecars.items()},
            has_sound=has_sound(spec, clip),
        )
        for clip in index.clips
    ]


def holes(items: Iterable[Item]) -> Iterator[Finding]:
    """Cache files that cannot be trained on, as far as their headers tell."""
    for item in items:
        for name, path in item.paths.items():
            kind = KINDS[name]
            expected, unwanted = kind.expected(item.clip), kind.unwanted_note(item.spec.supervise_silence)
            reason = reason_to_rebuild(path, expected, kind.keys, kind.forms(item.clip), to_read=True, unwanted_note=unwanted)
            if reason is not None:
                text = f"{name}: {path.name}: {reason}; python {kind.program}"
                yield Finding(kind="hole", dataset=item.spec.label, name=item.clip.key, text=text, clip=item.clip.key)


def listed(spec: DatasetSpec) -> tuple[dict[str, Source], list[Finding]]:
    """The sources by name, with their companions, and what is wrong with these; nothing where the media are gone.

    Raises:
        UserError: what listing sources raises, but for companions that are lacking.
    """
    if not sources_exist(spec):
        return {}, []
    try:
        return {source.name: source for source in list_sources(spec, require_captions=False)}, []
    except UserError:
        pass  # told of below, one by one; whatever else is wrong is raised again
    sources = {source.name: source for source in list_alone(spec)}
    findings = []
    for key, kind in _COMPANION_KEYS.items():
        folder: Path | None = getattr(spec, key)
        if folder is None or spec.kind not in kind.own_files.of:
            continue
        found = files_by_stem(spec, kind.name, sources.values()) if folder.is_dir() else {}
        for name, source in sources.items():
            if name in found:
                sources[name] = dataclasses.replace(source, files={kind.name: found[name], **source.files})
            elif kind.name not in source.files:
                text = f"no {kind.own_files.what} of its stem in {folder} ({key})"
                findings.append(Finding(kind="companion", dataset=spec.label, name=name, text=text))
    if not findings:
        list_sources(spec, require_captions=False)  # raises what else is wrong
    return sources, findings


def new(spec: DatasetSpec, index: DatasetIndex, sources: Mapping[str, Source]) -> Iterator[Finding]:
    """Sources that came after caching."""
    known = {clip.source for clip in index.clips} | {source for source, _ in index.dropped}
    for name in sources:
        if printable(name) not in known:
            yield Finding(kind="new", dataset=spec.label, name=name, text="came after caching, and is not trained on")


def dropped(spec: DatasetSpec, index: DatasetIndex) -> Iterator[Finding]:
    """Sources of which no clip was cut."""
    for name, reason in index.dropped:
        yield Finding(kind="dropped", dataset=spec.label, name=name, text=reason)


def changes(spec: DatasetSpec, items: list[Item]) -> Iterator[Finding]:
    """Sources and captions that are not what was cached; one finding for each clip and reason."""
    whole = [item for item in items if "text" in item.paths]
    told = set()
    for problem in source_problems(whole):
        key = problem.item.removeprefix(f"{spec.label}/")
        if (key, problem.reason) not in told:
            told.add((key, problem.reason))
            yield Finding(kind="changed", dataset=spec.label, name=key, text=f"{problem.reason}; python {problem.program}", clip=key)


def orphans(spec: DatasetSpec, sources: Mapping[str, Source]) -> Iterator[Finding]:
    """Companions and captions without a source."""
    stems = {source.stem.casefold() for source in sources.values()}
    for key, kind in _COMPANION_KEYS.items():
        folder: Path | None = getattr(spec, key)
        if folder is None or spec.directory is not None and real_path(folder) == real_path(spec.directory):
            continue
        for path in _media_in(folder):
            if path.stem.casefold() not in stems:
                yield Finding(kind="orphan", dataset=spec.label, name=path.name, text=f"{kind.own_files.what} in {folder} of no source")
    for what, names in left_out(spec).items() if spec.directory is not None and spec.directory.is_dir() else ():
        if what.endswith("without a source"):
            for name in names:
                yield Finding(kind="orphan", dataset=spec.label, name=name, text="caption of no source")


def cache_orphans(specs: Iterable[DatasetSpec]) -> Iterator[Finding]:
    """Cache files that no index of their folder names, whichever dataset file it is of."""
    folders = {real_path(spec.cache_directory): spec for spec in specs}
    for folder, spec in folders.items():
        if not folder.is_dir():
            continue
        named = {value for path in folder.glob(index_name("*")) for value in _texts(_json(path))}
        named |= {text_name(PurePosixPath(value).stem) for value in named}  # of sources without a clip too
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_file() and is_cache_name(entry.name) and entry.name not in named and entry.name.endswith(".safetensors"):
                yield Finding(kind="orphan", dataset=spec.label, name=entry.name, text=f"cache file in {folder} that no index names")


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except UserError:
        return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _media_in(folder: Path) -> list[Path]:
    known = tuple(ending for endings in EXTENSIONS.values() for ending in endings)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in known and not path.name.startswith("._"))
