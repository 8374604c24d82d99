"""Checking every cache before the transformer is loaded: what is missing, stale or of another model, and the command that mends it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache import sidecars as expected
from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.fingerprint import file_fingerprint, text_fingerprint
from musubi_tuner.cache.store import read_metadata
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
        UserError: lists the files and reasons, and for each program the one command that mends them.
    """
    problems = _source_problems(items)
    for item in items:
        problems += _item_problems(item, wanted)
    if not problems:
        return
    rows = "\n".join(f"  {problem.item}: {problem.path.name}: {problem.reason}" for problem in problems[:_MOST_ROWS])
    more = f"\n  ... and {len(problems) - _MOST_ROWS} more" if len(problems) > _MOST_ROWS else ""
    commands = "\n".join(
        f"  python {program} {wanted.arguments[program]}" for program in dict.fromkeys(problem.program for problem in problems)
    )
    raise UserError(f"{len(problems)} cache file(s) cannot be trained on:\n{rows}{more}\nRun, then start training again:\n{commands}")


def _item_problems(item: Item, wanted: Wanted) -> list[_Problem]:
    checks = []
    if item.latent_cache_path is not None:
        checks.append(
            (item.latent_cache_path, expected.latents_of(item.clip) | wanted.latents, expected.LATENT_KEYS, "ltxv2_cache_latents.py")
        )
    if item.audio_latent_cache_path is not None:
        checks.append(
            (item.audio_latent_cache_path, expected.audio_of(item.clip) | wanted.audio, expected.AUDIO_KEYS, "ltxv2_cache_audio_latents.py")
        )
    if item.reference_cache_path is not None:
        checks.append(
            (
                item.reference_cache_path,
                expected.reference_of(item.clip) | wanted.latents,
                expected.REFERENCE_KEYS,
                "ltxv2_cache_latents.py",
            )
        )
    if item.mask_cache_path is not None:
        checks.append((item.mask_cache_path, expected.mask_of(item.clip), expected.MASK_KEYS, "ltxv2_cache_latents.py"))
    if item.reference_audio_cache_path is not None:
        entries = expected.reference_audio_of(item.clip) | wanted.audio
        checks.append((item.reference_audio_cache_path, entries, expected.REFERENCE_AUDIO_KEYS, "ltxv2_cache_audio_latents.py"))
    checks.append((item.text_encoder_output_cache_path, {"kind": "text", **wanted.text}, ("text",), "ltxv2_cache_text_encoder_outputs.py"))
    found = [(path, reason_to_rebuild(path, entries, keys), program) for path, entries, keys, program in checks]
    return [_Problem(item.key, path, reason, program) for path, reason, program in found if reason is not None]


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
        caption = sources[name].caption if name in sources else _cached_caption(item.text_encoder_output_cache_path)
        if caption is None or item.latent_cache_path is None:
            continue
        mirrored = [one for one in clip_items if one.clip.mirrored]
        if is_mirrored(item.spec, caption) != bool(mirrored):
            reason = f"its caption says '{side_named(caption)}', so it must not be mirrored (flip_x)" if mirrored else _NOW_MIRRORED
            first = mirrored[0] if mirrored else item
            problems.append(_Problem(first.key, first.latent_cache_path, reason, "ltxv2_cache_latents.py"))
    return problems


def _cached_caption(path: Path) -> str | None:
    """The caption that a text cache was made from; None where the file itself is at fault."""
    return read_metadata(path).get("caption") if reason_to_rebuild(path, {}, ()) is None else None


def _changed(spec: DatasetSpec, items: Sequence[Item], sources: Mapping[str, Source]) -> list[_Problem]:
    program = "ltxv2_cache_audio_latents.py" if spec.kind == "audio" else "ltxv2_cache_latents.py"
    problems = []
    for name, clip_items in _by_source(items).items():
        item = clip_items[0]
        path = item.latent_cache_path or item.audio_latent_cache_path
        source = sources.get(name)
        if source is None:
            problems.append(_Problem(item.key, path, f"its source '{name}' is gone from {spec.root}", program))
        elif file_fingerprint(source.path) != item.clip.source_fingerprint:
            problems.append(_Problem(item.key, path, f"its source '{name}' has changed since it was cached", program))
        elif changed := _changed_beside(item, source):
            mends = "ltxv2_cache_latents.py" if changed.startswith(("reference '", "mask")) else "ltxv2_cache_audio_latents.py"
            problems.append(_Problem(item.key, path, f"its {changed} has changed since it was cached", mends))
        elif source.caption and item.text_encoder_output_cache_path.is_file():
            entries = {"source_fingerprint": text_fingerprint(source.caption)}
            if reason_to_rebuild(item.text_encoder_output_cache_path, entries, ()) is not None:
                text = "ltxv2_cache_text_encoder_outputs.py"
                problems.append(
                    _Problem(item.key, item.text_encoder_output_cache_path, "the caption has changed since it was cached", text)
                )
    return problems


def _changed_beside(item: Item, source: Source) -> str:
    """Which of the files that belong to a source is not what it was; empty where all are."""
    clip = item.clip
    files = (
        ("reference", source.reference, clip.reference_fingerprint),
        ("mask", source.mask, clip.mask_fingerprint),
        ("sound file", source.sound, clip.sound_fingerprint),
        ("reference sound", source.reference_sound, clip.reference_sound_fingerprint),
    )
    return next((f"{what} '{path.name}'" for what, path, cached in files if path is not None and file_fingerprint(path) != cached), "")


def _by_source(items: Sequence[Item]) -> dict[str, list[Item]]:
    grouped: dict[str, list[Item]] = {}
    for item in items:
        grouped.setdefault(item.clip.source, []).append(item)
    return grouped
