"""What became of a dataset's sources and captions since they were cached, as far as they are still there, and whose captions are cached."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from musubi_tuner.cache.names import text_name
from musubi_tuner.cache.sidecars import AUDIO_PROGRAM, KINDS, LATENT_PROGRAM, TEXT_PROGRAM, SidecarKind
from musubi_tuner.cache.store import file_fingerprint, read_metadata, text_fingerprint
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.dataset.items import Item
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.sources.captions import Caption, captions_now
from musubi_tuner.sources.listing import Source, is_mirrored, list_sources, side_named, sources_exist

log = logging.getLogger(__name__)

_MOST_NAMES = 20
_NOW_MIRRORED = "its mirror image (flip_x) is not cached: its caption said left or right when the clips were planned"


@dataclass(frozen=True, slots=True)
class Problem:
    """A cache file that cannot be trained on."""

    item: str
    path: Path
    reason: str
    program: str
    """That makes it again."""


def source_problems(items: Sequence[Item]) -> list[Problem]:
    """Sources that changed, came or went since they were cached, captions that were edited, and texts of other sources.

    Captions that are empty now, gone or unreadable are told of by a warning: the cached ones are still good.
    """
    problems: list[Problem] = []
    by_spec: dict[str, list[Item]] = {}
    for item in items:
        by_spec.setdefault(item.spec.label, []).append(item)
    for group in by_spec.values():
        spec = group[0].spec
        sources = {source.name: source for source in list_sources(spec, require_captions=False)} if sources_exist(spec) else {}
        if sources:
            problems += _changed(spec, group, sources)
        problems += _caption_problems(spec, group, gone=[] if not sources else [name for name in _by_source(group) if name not in sources])
        if spec.flip_x:
            problems += _mirror_problems(group, sources)
    return problems


def _changed(spec: DatasetSpec, items: Sequence[Item], sources: Mapping[str, Source]) -> list[Problem]:
    """All files of a source that changed, whichever program makes them."""
    problems = []
    for name, clip_items in _by_source(items).items():
        item, source = clip_items[0], sources.get(name)
        if source is None:
            kind = KINDS["latents" if "latents" in item.paths else "audio"]
            program = AUDIO_PROGRAM if spec.kind == "audio" else LATENT_PROGRAM
            problems.append(Problem(item.key, item.paths[kind.name], f"its source '{name}' is gone from {spec.root}", program))
        elif file_fingerprint(source.path) != item.clip.source_fingerprint:
            reason = f"its source '{name}' has changed since it was cached"
            problems += _files_of(clip_items, reason, [kind for kind in KINDS.values() if kind.window is not None], own=True)
        for kind, path in () if source is None else _changed_files(item, source):
            reason = f"its {kind.own_files.what} '{path.name}' has changed since it was cached"
            problems += _files_of(clip_items, reason, [kind])
    return problems


def _files_of(items: Iterable[Item], reason: str, kinds: Iterable[SidecarKind], *, own: bool = False) -> list[Problem]:
    """A problem for each file of such kinds, or of each item where it has none of them yet.

    Args:
        own: only those that are made from the items' own source.
    """
    problems = []
    for kind in kinds:
        files = {item.paths[kind.name]: item.key for item in items if kind.name in item.paths}
        if own:
            files = {item.paths[kind.name]: item.key for item in items if kind.name in item.paths and not _has_own_file(item, kind)}
        elif not files:
            files = {next(iter(item.paths.values())): item.key for item in items}
        problems += [Problem(key, path, reason, kind.program) for path, key in files.items()]
    return problems


def _has_own_file(item: Item, kind: SidecarKind) -> bool:
    return bool(item.clip.sidecars[kind.name].source)


def _changed_files(item: Item, source: Source) -> list[tuple[SidecarKind, Path]]:
    """Of the files that belong to a source, those that are not what they were."""
    return [
        (KINDS[name], path)
        for name, path in source.files.items()
        if (cached := item.clip.sidecars.get(name)) is None or file_fingerprint(path) != cached.fingerprint
    ]


def _caption_problems(spec: DatasetSpec, items: Sequence[Item], gone: Sequence[str]) -> list[Problem]:
    """Texts of other sources, and captions that were edited; a warning names those that are no more.

    Args:
        gone: sources that are no longer in a dataset of which others are, which have been told of.
    """
    problems, lost = [], []
    by_source = _by_source(items)
    now = captions_now(spec, list(by_source))
    for name, clip_items in by_source.items():
        item = clip_items[0]
        path = item.paths["text"]
        metadata = _metadata(path)
        if metadata is None:  # the file itself is at fault
            continue
        found = metadata.get("source", "")
        if found and not _is_of(found, name, path.name):
            problems.append(Problem(item.key, path, f"it is the text of '{found}', not of '{name}'", TEXT_PROGRAM))
        elif name in now and name not in gone:
            caption = now[name]
            if caption.text:
                problems += _edited(item, path, metadata, caption.text)
            else:
                lost.append(f"{name}: {_what_is_lost(caption)}; the cached one is {_quoted(metadata.get('caption', ''))}")
    if lost:
        rows = "\n".join(f"  {row}" for row in lost[:_MOST_NAMES])
        more = f"\n  ... and {len(lost) - _MOST_NAMES} more" if len(lost) > _MOST_NAMES else ""
        log.warning("WARNING: %s: captions are no more, and the cached ones are trained on:\n%s%s", spec.label, rows, more)
    return problems


def _is_of(found: str, source: str, file: str) -> bool:
    """Whether a text that is of the source `found` is that of `source`: two datasets may name one source from different folders."""
    path = PurePosixPath(found)
    return found == source or path.name == PurePosixPath(source).name and file == text_name(path.stem)


def _edited(item: Item, path: Path, metadata: Mapping[str, str], caption: str) -> list[Problem]:
    cached = metadata.get("caption", "")
    same = metadata["source_fingerprint"] == text_fingerprint(caption) if "source_fingerprint" in metadata else cached in ("", caption)
    start = len(os.path.commonprefix([cached, caption])) // 40 * 40  # so that the difference is in what is shown
    reason = f"the caption has changed since it was cached ({_quoted(cached, start)} then, {_quoted(caption, start)} now)"
    return [] if same else [Problem(item.key, path, reason, TEXT_PROGRAM)]


def _what_is_lost(caption: Caption) -> str:
    return "its caption is gone" if caption.text is None and not caption.problem else caption.problem or "its caption is empty now"


def _quoted(text: str, start: int = 0) -> str:
    part = text[start : start + 60]
    return f"'{'...' if start else ''}{part}{'...' if len(text) > start + 60 else ''}'"


def _metadata(path: Path) -> dict[str, str] | None:
    try:
        return read_metadata(path)
    except UserError:
        return None


def _mirror_problems(items: Sequence[Item], sources: Mapping[str, Source]) -> list[Problem]:
    """Captions that came to tell left from right, or ceased to, after the clips were planned."""
    problems = []
    for name, clip_items in _by_source(items).items():
        item = clip_items[0]
        caption = sources[name].caption if name in sources else (_metadata(item.paths["text"]) or {}).get("caption")
        if caption is None or "latents" not in item.paths:
            continue
        mirrored = [one for one in clip_items if one.clip.mirrored]
        if is_mirrored(item.spec, caption) != bool(mirrored):
            reason = f"its caption says '{side_named(caption)}', so it must not be mirrored (flip_x)" if mirrored else _NOW_MIRRORED
            first = mirrored[0] if mirrored else item
            problems.append(Problem(first.key, first.paths["latents"], reason, LATENT_PROGRAM))
    return problems


def _by_source(items: Sequence[Item]) -> dict[str, list[Item]]:
    grouped: dict[str, list[Item]] = {}
    for item in items:
        grouped.setdefault(item.clip.source, []).append(item)
    return grouped
