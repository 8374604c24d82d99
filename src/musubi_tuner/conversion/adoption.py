"""Caches of other tools, with our names and keys but without our metadata and index -> caches that are trained on.

    sidecars, dataset TOML --plan--> clips and their files --check--> metadata for what is right, an index, a table of what was checked

Where the media are there, clips are planned from them as the caching programs do it, and a sidecar is taken for the clip whose name it
has; where they are gone, sizes and lengths are read from the names. Tensors and keys stay as they are, byte for byte: only the header
gets metadata, and what other tools wrote into it is kept.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from safetensors.torch import load

from musubi_tuner.cache.audit import header_of, reason_to_rebuild, sound_steps
from musubi_tuner.cache.clip import Clip, Sidecar
from musubi_tuner.cache.forms import header_fault, value_fault
from musubi_tuner.cache.index import DatasetIndex, write_index
from musubi_tuner.cache.names import AUDIO_ENDING, LATENTS_ENDING, text_name, training_key
from musubi_tuner.cache.record import note_checked
from musubi_tuner.cache.sidecars import KINDS, SidecarKind
from musubi_tuner.cache.store import (
    FORMAT_VERSION,
    canonical,
    joined,
    read_parts,
    tensors_fingerprint,
    text_fingerprint,
    write_bytes,
)
from musubi_tuner.config.dataset import DatasetConfig, DatasetSpec
from musubi_tuner.encoding.plan import plan_datasets
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.sources.listing import sources_exist

CONTEXT_TOKENS = 1024
_STILL_FPS = 24.0
_WINDOW, _SIZE = r"(?P<start>\d{5,})-(?P<frames>\d{3,})", r"(?P<width>\d{4,})x(?P<height>\d{4,})"
_NAMES = {
    "video": re.compile(rf"(?P<stem>.+)_{_WINDOW}_{_SIZE}{re.escape(LATENTS_ENDING)}"),
    "image": re.compile(rf"(?P<stem>.+)_{_SIZE}{re.escape(LATENTS_ENDING)}"),
    "audio": re.compile(rf"(?P<stem>.+)_(?P<start>\d{{8,}})-(?P<length>\d{{6,}}){re.escape(AUDIO_ENDING)}"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """What the user says of how the files were made, which nothing in them tells."""

    mode: str
    widths: Mapping[str, tuple[int, ...]]
    """{`video`, `av`: widths of a text} of the model."""
    encoders: Mapping[str, str]
    """Fingerprints of the encoders, by `SidecarKind.encoder`."""
    projection: str
    model_version: str
    backend: str
    stage: Literal["context", "features"]
    max_length: int
    source_fps: float | None
    """Of clips whose media are gone, where the dataset gives no rate."""


@dataclass(slots=True)
class Adopted:
    """What became of the files of a dataset."""

    label: str
    media: bool
    """Whether windows were compared with the media."""
    taken: Counter[str] = field(default_factory=Counter)
    """By kind, as the next one."""
    ours: Counter[str] = field(default_factory=Counter)
    """Files that have our metadata already and are right."""
    left: list[tuple[str, str]] = field(default_factory=list)
    """(clip or file, why it was not taken)"""
    clips: int = 0


def adopt(config: DatasetConfig, claims: Claims, group: Processes, *, workers: int, dry_run: bool) -> list[Adopted]:
    """Take over the caches of all datasets.

    Raises:
        UserError: what planning raises; a dataset without any file to take over.
    """
    found = []
    for spec in config.all:
        report = Adopted(spec.label, sources_exist(spec))
        if report.media:
            (plan,) = plan_datasets(DatasetConfig(config.path, (spec,), ()), group, workers)
            planned = [(one.clip, one.caption) for one in plan.clips]
            report.left += plan.index.dropped
        else:
            planned = [(clip, None) for clip in _clips_of_names(spec, claims, report)]
        clips = [clip for clip, caption in planned if _take(spec, clip, caption, claims, report, dry_run=dry_run)]
        if not clips:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in report.left[:5])
            where = f"{spec.label}: {spec.cache_directory}"
            raise UserError(f"{where}: no cache file of this dataset can be taken over ({reasons or 'none is there'}).")
        report.clips = len(clips)
        if not dry_run:
            lost = [row for row in report.left if row[0] not in {clip.key for clip in clips}]
            write_index(spec, DatasetIndex(settings=spec.settings(), clips=tuple(clips), dropped=tuple(lost)))
        found.append(report)
    return found


def _clips_of_names(spec: DatasetSpec, claims: Claims, report: Adopted) -> Iterator[Clip]:
    """Clips whose media are gone, as the names of their files tell them."""
    ending = AUDIO_ENDING if spec.kind == "audio" else LATENTS_ENDING
    for path in sorted(spec.cache_directory.glob(f"*{ending}")):
        match = _NAMES[spec.kind].fullmatch(path.name)
        if match is None:
            if spec.kind == "audio" or _NAMES["video" if spec.kind == "image" else "image"].fullmatch(path.name) is None:
                report.left.append((path.name, "its name does not tell its window"))
            continue
        if spec.kind == "image" and _NAMES["video"].fullmatch(path.name):
            continue
        parts = match.groupdict()
        fps = 25.0 if spec.kind == "audio" else spec.target_fps or spec.source_fps or claims.source_fps
        if fps is None and spec.kind == "image":
            fps = _STILL_FPS
        if fps is None:
            report.left.append((path.name, "its frame rate is not known: give --source_fps, or target_fps in the dataset"))
            continue
        yield _clip_of_name(spec, path, parts, fps)


def _clip_of_name(spec: DatasetSpec, path: Path, parts: Mapping[str, str], fps: float) -> Clip:
    stem, start, frames = parts["stem"], int(parts.get("start", 0)), int(parts.get("frames", spec.kind == "image"))
    beside = KINDS["audio"].name_beside(path.name) if spec.kind == "video" else None
    sidecars = {"audio" if spec.kind == "audio" else "latents": Sidecar(file=path.name), "text": Sidecar(file=text_name(stem))}
    if beside is not None:
        sidecars["audio"] = Sidecar(file=beside)
    first, last = (start / 1000, (start + int(parts["length"])) / 1000) if spec.kind == "audio" else (start / fps, (start + frames) / fps)
    width, height = int(parts.get("width", 0)), int(parts.get("height", 0))
    return Clip(
        key=path.name.removesuffix(".safetensors"),
        kind=spec.kind,
        source=stem,
        stem=stem,
        source_fingerprint=text_fingerprint(path.name),
        start_seconds=first,
        end_seconds=last,
        fps=fps,
        start_frame=0 if spec.kind == "audio" else start,
        frames=frames,
        width=width,
        height=height,
        original_width=width,
        original_height=height,
        has_audio=spec.kind == "audio" or beside is not None and bool(sound_steps(spec.cache_directory / beside)),
        sidecars=sidecars,
    )


def _take(spec: DatasetSpec, clip: Clip, caption: str | None, claims: Claims, report: Adopted, *, dry_run: bool) -> bool:
    """Take over a clip's files; returns whether it may be trained on: its first file is right. Others become named holes."""
    usable = True
    kinds = [kind for kind in KINDS.values() if kind.name in clip.sidecars and claims.mode in kind.modes]
    for place, kind in enumerate(kinds):
        path = spec.cache_directory / clip.sidecars[kind.name].file
        reason = _take_file(path, kind, clip, caption, claims, report, dry_run=dry_run)
        if reason is not None:
            report.left.append((clip.key if place == 0 else f"{clip.key}: {path.name}", reason))
            usable = usable and place > 0
    return usable and bool(kinds)


def _take_file(
    path: Path, kind: SidecarKind, clip: Clip, caption: str | None, claims: Claims, report: Adopted, *, dry_run: bool
) -> str | None:
    """Check a file and give it metadata; returns why it cannot be taken over."""
    opened = header_of(path)
    if isinstance(opened, str):
        return opened
    metadata, found = opened
    if "ltxv2_cache" in metadata:
        reason = reason_to_rebuild(path, kind.expected(clip), kind.keys, kind.forms(clip))
        report.ours[kind.name] += reason is None
        return None if reason is None else f"it has metadata of ours, and {reason}"
    headers = {training_key(key): header for key, header in found.items()}
    lacking = [key for key in kind.keys if key not in headers]
    if lacking:
        return f"it lacks {', '.join(lacking)} (it holds {', '.join(found) or 'nothing'})"
    entries = _text_entries(clip, caption, metadata, headers["text"].shape, claims) if kind.name == "text" else kind.expected(clip)
    if isinstance(entries, str):
        return entries
    forms = kind.forms(clip)(entries)
    if fault := header_fault(headers, forms):
        return fault
    _, header, body = read_parts(path)
    tensors = {training_key(key): tensor for key, tensor in load(joined(header, body, {})).items()}
    if fault := value_fault(tensors, forms):
        return fault
    encoder = {} if kind.encoder is None else {"encoder_fingerprint": claims.encoders[kind.encoder]}
    if kind.name == "audio":
        encoder["audio"] = "present" if tensors["audio_latents"].shape[1] else "absent"
    stored = headers[kind.keys[0]].dtype
    told = {"encoding": canonical({"adopted": True, "stored": stored}), "source": clip.source, "model_version": claims.model_version}
    report.taken[kind.name] += 1
    if not dry_run:
        write_bytes(path, joined(header, body, metadata | told | entries | encoder | {"ltxv2_cache": FORMAT_VERSION}))
        note_checked({path: tensors_fingerprint(header, body)})
    return None


def _text_entries(
    clip: Clip, caption: str | None, metadata: Mapping[str, str], shape: Sequence[int], claims: Claims
) -> dict[str, str] | str:
    """Metadata of a text, or why it does not fit the model."""
    widths = [one for one in claims.widths.values() if len(shape) == 2 and shape[1] == sum(one)]
    if not widths:
        known = ", or ".join(f"{' + '.join(map(str, one))} ({mode})" for mode, one in claims.widths.items())
        return f"its text has the shape {tuple(shape)}, and the model takes texts of the width {known}"
    if claims.stage == "context" and claims.backend == "gemma" and shape[0] != CONTEXT_TOKENS:
        return f"its text has {shape[0]} rows, and a context has {CONTEXT_TOKENS}; give --text_cache_stage features where it is features"
    text = (caption if caption is not None else metadata.get("caption", "")).strip()
    return {
        "kind": "text",
        "caption": text,
        "source_fingerprint": text_fingerprint(text),
        "projection_fingerprint": claims.projection,
        "stage": claims.stage,
        "backend": claims.backend,
        "max_length": str(shape[0] if claims.backend == "t5" else claims.max_length),
        "widths": "+".join(map(str, widths[0])),
    }
