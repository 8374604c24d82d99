"""What goes into a pack: the files that training reads, with index and TOML rewritten for folders that move together."""

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from musubi_tuner.cache.audit import sound_steps
from musubi_tuner.cache.clip import Clip
from musubi_tuner.cache.index import DatasetIndex, index_bytes, index_path, read_index
from musubi_tuner.cache.looks import LOOK_ENDINGS, look_path
from musubi_tuner.cache.names import PROMPT_FOLDER
from musubi_tuner.cache.receipts import read_receipts, receipts_bytes, receipts_path
from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.cache.store import read_metadata
from musubi_tuner.config.dataset import DatasetConfig, DatasetSpec, load_dataset_config
from musubi_tuner.curation.packing.lock import TOML_NAME, paths_fault
from musubi_tuner.curation.packing.toml import dataset_toml
from musubi_tuner.dataset.items import Item, list_items
from musubi_tuner.dataset.verify import Wanted, verify_caches
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import real_path
from musubi_tuner.runtime.program import quoted
from musubi_tuner.sources.captions import captions_now

_ROOT = Path("pack").absolute()
"""Stands for the folder of a pack, wherever it will lie: its paths are all taken relative to it."""
_OF_ENCODERS = ("encoder_fingerprint", "projection_fingerprint", "model_version", "backend", "stage", "max_length")
_JSONL = "captions.jsonl"


@dataclass(frozen=True, slots=True)
class Content:
    """One file of a pack."""

    path: str
    """In the pack."""
    source: Path | bytes
    """Where its bytes are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """All of a pack but its lock."""

    files: tuple[Content, ...]
    datasets: tuple[Mapping[str, Any], ...]
    """As in `Lock`, as are the next ones."""
    encoders: tuple[Mapping[str, Any], ...]


def gather(config: DatasetConfig, mode: str) -> Contents:
    """What training from the caches of these datasets reads.

    Raises:
        UserError: caches that training would refuse, or names that cannot be packed.
    """
    items = [item for specs in (config.datasets, config.validation_datasets) if specs for item in list_items(specs, mode, config.path)]
    common = f"--dataset_config {quoted(config.path)} --ltx_mode {mode}"
    programs = dict.fromkeys(kind.program for kind in KINDS.values())
    verify_caches(items, Wanted(latents={}, audio={}, text={}, arguments=dict.fromkeys(programs, common)))
    moved = _moved(config.all)
    files: dict[str, Path | bytes] = {}
    for spec in config.all:
        files |= _of_dataset(spec, moved[spec.label], config, [item for item in items if item.spec.label == spec.label], mode)
    groups = ([moved[spec.label] for spec in specs] for specs in (config.datasets, config.validation_datasets))
    toml = dataset_toml(_ROOT, *groups)
    _check_toml(toml, tuple(moved.values()))
    whole = {TOML_NAME: toml.encode("utf-8"), **dict(sorted(files.items()))}
    if fault := paths_fault(list(whole)):
        raise UserError(f"{config.path}: cannot be packed: {fault}. Rename the media and cache them again.")
    clips = Counter(item.spec.label for item in items)
    return Contents(
        files=tuple(Content(path, source) for path, source in whole.items()),
        datasets=tuple({"label": spec.label, "clips": clips[spec.label]} for spec in config.all),
        encoders=_encoders(items),
    )


def _moved(specs: Sequence[DatasetSpec]) -> dict[str, DatasetSpec]:
    """By label, the datasets as they are in the pack. What shares a folder still does."""
    folders: dict[tuple[str, Path], Path] = {}

    def folder(what: str, path: Path, label: str) -> Path:
        name = "".join(sign if sign.isalnum() else "_" for sign in label).strip("_")
        return folders.setdefault((what, real_path(path)), _ROOT / name / what)

    moved = {}
    for spec in specs:
        media = folder("media", spec.root if spec.directory is not None else spec.listing, spec.label)
        companions: dict[str, Any] = {
            field.name: folder(field.name, value, spec.label)
            for field in dataclasses.fields(spec)
            if field.name not in ("directory", "jsonl_file", "cache_directory") and isinstance(value := getattr(spec, field.name), Path)
        }
        moved[spec.label] = dataclasses.replace(
            spec,
            directory=None if spec.directory is None else media,
            jsonl_file=None if spec.directory is not None else media / _JSONL,
            cache_directory=folder("cache", spec.cache_directory, spec.label),
            **companions,
        )
    return moved


def _of_dataset(spec: DatasetSpec, moved: DatasetSpec, config: DatasetConfig, items: Sequence[Item], mode: str) -> dict[str, Path | bytes]:
    """Files by their paths in the pack."""
    index = read_index(spec, config.path)
    files: dict[str, Path | bytes] = {}
    cache = moved.cache_directory.relative_to(_ROOT)
    for item in items:
        for kind, path in item.paths.items():
            files[(cache / path.name).as_posix()] = path
            if kind in LOOK_ENDINGS and (look := look_path(path, kind)).is_file():
                files[(cache / look.relative_to(path.parent)).as_posix()] = look
    if mode == "audio":  # which leaves silent clips out by these files
        sounds = {spec.cache_directory / clip.sidecars["audio"].file for clip in index.clips if "audio" in clip.sidecars}
        files |= {(cache / path.name).as_posix(): path for path in sounds if sound_steps(path) == 0}
    prompts = spec.cache_directory / PROMPT_FOLDER
    for path in sorted(prompts.glob("*.safetensors")) if prompts.is_dir() else ():
        files[(cache / PROMPT_FOLDER / path.name).as_posix()] = path
    new_index = DatasetIndex(
        settings=moved.settings(),
        clips=tuple(_moved_clip(clip) for clip in index.clips),
        dropped=tuple((_inside(source), reason) for source, reason in index.dropped),
    )
    files[index_path(moved).relative_to(_ROOT).as_posix()] = index_bytes(new_index)
    if (receipts := read_receipts(spec)) is not None:
        rows = [dataclasses.replace(row, source=_inside(row.source)) for row in receipts]
        files[receipts_path(moved).relative_to(_ROOT).as_posix()] = receipts_bytes(rows)
    return files | _captions(spec, moved, items)


def _captions(spec: DatasetSpec, moved: DatasetSpec, items: Sequence[Item]) -> dict[str, Path | bytes]:
    """Those that were cached, where the dataset reads them: training compares them, and people read them."""
    by_source = {item.clip.source: item for item in items}
    now = captions_now(spec, list(by_source))
    texts = {
        source: (now[source].text if source in now else None) or read_metadata(item.paths["text"]).get("caption", "")
        for source, item in by_source.items()
    }
    if moved.jsonl_file is not None:
        lines = [{f"{spec.kind}_path": _inside(source), "caption": text} for source, text in sorted(texts.items())]
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "backslashreplace")
        return {moved.jsonl_file.relative_to(_ROOT).as_posix(): data}
    assert moved.directory is not None
    folder = moved.directory.relative_to(_ROOT)
    return {
        (folder / source).with_suffix(spec.caption_extension).as_posix(): f"{text}\n".encode() for source, text in texts.items() if text
    }


def _moved_clip(clip: Clip) -> Clip:
    """Without paths of this machine, where a jsonl names media by such."""
    sidecars = {name: dataclasses.replace(sidecar, source=_inside(sidecar.source)) for name, sidecar in clip.sidecars.items()}
    return dataclasses.replace(clip, source=_inside(clip.source), sidecars=sidecars)


def _inside(source: str) -> str:
    """A source's name, or the last part of its path where that leads out of the dataset; stems are unique in a dataset."""
    path = PureWindowsPath(source)
    leads_out = path.drive or path.root or ".." in path.parts
    return PurePosixPath(source.replace("\\", "/")).name if leads_out else source


def _encoders(items: Sequence[Item]) -> tuple[Mapping[str, Any], ...]:
    """By kind and metadata, how many files there are."""
    found: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
    for kind, path in dict.fromkeys((kind, path) for item in items for kind, path in item.paths.items()):
        metadata = read_metadata(path)
        found[kind, tuple((key, metadata[key]) for key in _OF_ENCODERS if key in metadata)] += 1
    return tuple({"kind": kind, "files": count, **dict(entries)} for (kind, entries), count in sorted(found.items()))


def _check_toml(text: str, specs: Sequence[DatasetSpec]) -> None:
    """
    Raises:
        AssertionError: the written TOML is not read as the datasets that it was made of.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for spec in specs:
            (root / spec.root.relative_to(_ROOT)).mkdir(parents=True, exist_ok=True)
        path = root / TOML_NAME
        path.write_text(text, encoding="utf-8")
        read = load_dataset_config(path).all
    for wanted, found in zip(specs, read, strict=True):
        assert found.settings() == wanted.settings() and index_path(found).name == index_path(wanted).name, (found, wanted)
        assert all(getattr(found, key) == getattr(wanted, key) for key in _plain_keys(wanted)), (found, wanted)


def _plain_keys(spec: DatasetSpec) -> list[str]:
    return [field.name for field in dataclasses.fields(spec) if not isinstance(getattr(spec, field.name), Path)]
