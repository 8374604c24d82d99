"""Checking every cache before the transformer is loaded: what is missing, stale or of another model, and the command that fixes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.sidecars import AUDIO_PROGRAM, KINDS, LATENT_PROGRAM, TEXT_PROGRAM, SidecarKind
from musubi_tuner.cache.store import file_fingerprint, read_metadata, text_fingerprint
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.dataset.items import Item
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.sources.listing import Source, is_mirrored, list_sources, side_named, sources_exist

_MOST_ROWS = 12
_NOW_MIRRORED = "its mirror image (flip_x) is not cached: its caption said left or right when the clips were planned"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What this run knows of the encoders that its caches must come from; entries that cannot be known are left out."""

    latents: Mapping[str, str]
    audio: Mapping[str, str]
    text: Mapping[str, str]
    arguments: Mapping[str, str]
    """{program: its arguments}, for the command in messages."""

    def of(self, kind: SidecarKind) -> Mapping[str, str]:
        """Of the encoder that makes such files."""
        return {"video_vae": self.latents, "audio_vae": self.audio, "text": self.text, None: {}}[kind.encoder]


@dataclass(frozen=True, slots=True)
class _Problem:
    item: str
    path: Path
    reason: str
    program: str


def verify_caches(items: Sequence[Item], wanted: Wanted) -> None:
    """Check headers and fingerprints of every file that the items will read.

    Sources that are still there are compared with what was cached; training goes on without them where they are gone.

    Raises:
        UserError: lists the files and reasons, and for each program the one command that fixes them.
    """
    problems = _source_problems(items)
    for item in items:
        for name, path in item.paths.items():
            kind = KINDS[name]
            reason = reason_to_rebuild(path, {**kind.expected(item.clip), **wanted.of(kind)}, kind.keys)
            if reason is not None:
                problems.append(_Problem(item.key, path, reason, kind.program))
    if not problems:
        return
    rows = "\n".join(f"  {problem.item}: {problem.path.name}: {problem.reason}" for problem in problems[:_MOST_ROWS])
    more = f"\n  ... and {len(problems) - _MOST_ROWS} more" if len(problems) > _MOST_ROWS else ""
    commands = "\n".join(
        f"  python {program} {wanted.arguments[program]}" for program in dict.fromkeys(problem.program for problem in problems)
    )
    raise UserError(f"{len(problems)} cache file(s) cannot be trained on:\n{rows}{more}\nRun, then start training again:\n{commands}")


def _source_problems(items: Sequence[Item]) -> list[_Problem]:
    """Sources that changed, came or went since they were cached, and captions that were edited."""
    problems: list[_Problem] = []
    by_spec: dict[str, list[Item]] = {}
    for item in items:
        by_spec.setdefault(item.spec.label, []).append(item)
    for group in by_spec.values():
        spec = group[0].spec
        sources = {source.name: source for source in list_sources(spec, require_captions=False)} if sources_exist(spec) else {}
        if sources:
            problems += _changed(spec, group, sources)
        if spec.flip_x:
            problems += _mirror_problems(group, sources)
    return problems


def _mirror_problems(items: Sequence[Item], sources: Mapping[str, Source]) -> list[_Problem]:
    """Captions that came to tell left from right, or ceased to, after the clips were planned."""
    problems = []
    for name, clip_items in _by_source(items).items():
        item = clip_items[0]
        text = item.paths["text"]
        if name in sources:
            caption = sources[name].caption
        elif reason_to_rebuild(text, {}, ()) is None:
            caption = read_metadata(text).get("caption")  # that the cache was made from
        else:
            continue  # the file itself is at fault
        if caption is None or "latents" not in item.paths:
            continue
        mirrored = [one for one in clip_items if one.clip.mirrored]
        if is_mirrored(item.spec, caption) != bool(mirrored):
            reason = f"its caption says '{side_named(caption)}', so it must not be mirrored (flip_x)" if mirrored else _NOW_MIRRORED
            first = mirrored[0] if mirrored else item
            problems.append(_Problem(first.key, first.paths["latents"], reason, LATENT_PROGRAM))
    return problems


def _changed(spec: DatasetSpec, items: Sequence[Item], sources: Mapping[str, Source]) -> list[_Problem]:
    program = AUDIO_PROGRAM if spec.kind == "audio" else LATENT_PROGRAM
    problems = []
    for name, clip_items in _by_source(items).items():
        item = clip_items[0]
        path = item.paths["latents"] if "latents" in item.paths else item.paths["audio"]
        source = sources.get(name)
        if source is None:
            problems.append(_Problem(item.key, path, f"its source '{name}' is gone from {spec.root}", program))
        elif file_fingerprint(source.path) != item.clip.source_fingerprint:
            problems.append(_Problem(item.key, path, f"its source '{name}' has changed since it was cached", program))
        elif changed := _changed_file(item, source):
            kind, file = changed
            reason = f"its {kind.own_files.what} '{file.name}' has changed since it was cached"
            problems.append(_Problem(item.key, path, reason, kind.program))
        elif source.caption and item.paths["text"].is_file():
            entries = {"source_fingerprint": text_fingerprint(source.caption)}
            if reason_to_rebuild(item.paths["text"], entries, ()) is not None:
                problems.append(_Problem(item.key, item.paths["text"], "the caption has changed since it was cached", TEXT_PROGRAM))
    return problems


def _changed_file(item: Item, source: Source) -> tuple[SidecarKind, Path] | None:
    """The first of the files that belong to a source that is not what it was."""
    for name, path in source.files.items():
        cached = item.clip.sidecars.get(name)
        if cached is None or file_fingerprint(path) != cached.fingerprint:
            return KINDS[name], path
    return None


def _by_source(items: Sequence[Item]) -> dict[str, list[Item]]:
    grouped: dict[str, list[Item]] = {}
    for item in items:
        grouped.setdefault(item.clip.source, []).append(item)
    return grouped
