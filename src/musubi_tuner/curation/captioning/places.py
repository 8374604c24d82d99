"""Where captions are written: files beside the media, or a new jsonl beside a jsonl. What a person has written is never replaced."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.curation.captioning.media import Medium
from musubi_tuner.runtime.disk import not_written, write_whole
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json_lines
from musubi_tuner.sources.captions import Caption, name_in, read_caption


class Place(Protocol):
    """Captions of one dataset."""

    def name_of(self, medium: Medium) -> str:
        """Of the file that holds its caption."""
        ...

    def now(self, medium: Medium) -> Caption:
        """What is there at this moment."""
        ...

    def write(self, medium: Medium, caption: str) -> Path:
        """
        Raises:
            TemporaryFailure: the disk is full.
            UserError: it cannot be written.
        """
        ...

    def finish(self) -> Path | None:
        """Write what is held back; returns a new jsonl where there is one."""
        ...


class Beside:
    """Caption files of the media's stems."""

    def name_of(self, medium: Medium) -> str:
        assert medium.caption_file is not None
        return medium.caption_file.name

    def now(self, medium: Medium) -> Caption:
        assert medium.caption_file is not None
        return read_caption(medium.caption_file)

    def write(self, medium: Medium, caption: str) -> Path:
        assert medium.caption_file is not None
        _replace(medium.caption_file, f"{caption}\n".encode())
        return medium.caption_file

    def finish(self) -> None:
        return None


class NewJsonl:
    """A jsonl with the lines of the dataset's own, and captions where these have none. It is written anew now and then, and at the end."""

    _HELD_BACK = 25

    def __init__(self, spec: DatasetSpec, path: Path) -> None:
        """
        Args:
            path: in the folder of the dataset's jsonl, as paths in it are relative to that; a file that is there is gone on with.

        Raises:
            UserError: another folder, the old jsonl itself, or a file that is there and is none of this dataset.
        """
        self._spec, self.path = spec, path
        if os.path.realpath(path.parent) != os.path.realpath(spec.listing.parent):
            raise UserError(f"--output {path}: must lie beside {spec.listing}, as paths in it are relative to its folder.")
        if os.path.realpath(path) == os.path.realpath(spec.listing):
            raise UserError(f"--output {path}: is the dataset's own jsonl, which stays as it is. Give a new name.")
        self._lines: list[dict[str, Any]] = [
            dict(value) for _, value in read_json_lines(spec.listing, named=f"{spec.label}:") if isinstance(value, dict)
        ]
        self._ours: dict[str, str] = {}
        self._there = self._read()
        if unknown := self._there.keys() - {self._name(line) for line in self._lines}:
            raise UserError(f"{path}: holds '{min(unknown)}', which {spec.listing} does not. Move it away, or give --output.")

    def name_of(self, medium: Medium) -> str:
        return self.path.name

    def now(self, medium: Medium) -> Caption:
        own = self._ours.get(medium.source.name)
        return Caption(own) if own is not None else self._there.get(medium.source.name) or Caption(medium.source.caption or None)

    def write(self, medium: Medium, caption: str) -> Path:
        self._ours[medium.source.name] = caption
        if len(self._ours) % self._HELD_BACK == 0:
            self.finish()
        return self.path

    def finish(self) -> Path | None:
        """Captions that were changed in the file since it was read stay."""
        if not self._ours:
            return self.path if self._there else None
        before, now = self._there, self._read()
        edited = {name: caption for name, caption in now.items() if caption != before.get(name, Caption(None)) and caption.text}
        lines = []
        for line in self._lines:
            name = self._name(line)
            text = next(
                (found for found in (edited[name].text if name in edited else None, self._ours.get(name), _text(now, name)) if found),
                line.get("caption"),
            )
            lines.append(json.dumps(line if text is None else {**line, "caption": text}, ensure_ascii=False))
        _replace(self.path, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
        self._there = self._read()
        self._ours = {}
        return self.path

    def _name(self, line: Mapping[str, Any]) -> str:
        path = line.get(f"{self._spec.kind}_path")
        return name_in(self._spec, self._spec.root / path) if isinstance(path, str) else ""

    def _read(self) -> dict[str, Caption]:
        if not self.path.exists():
            return {}
        found = {}
        for where, value in read_json_lines(self.path, named="--output"):
            if not isinstance(value, dict) or not self._name(value):
                raise UserError(f"{where}: holds no {self._spec.kind}_path. Move the file away, or give --output.")
            text = value.get("caption")
            found[self._name(value)] = Caption(text.strip() or None if isinstance(text, str) else None)
        return found


def _text(captions: Mapping[str, Caption], name: str) -> str | None:
    return captions[name].text if name in captions else None


def open_places(specs: Sequence[DatasetSpec], output: Path | None) -> dict[str, Place]:
    """By the labels of the datasets.

    Args:
        output: the new jsonl, where one dataset has a jsonl.

    Raises:
        UserError: `output` where no dataset has one, or several have; what `NewJsonl` raises.
    """
    by_label = {spec.label: spec for spec in specs}
    listings = {spec.listing for spec in by_label.values() if spec.directory is None}
    if output is not None and len(listings) != 1:
        found = "several datasets have one" if listings else "no dataset has a jsonl; captions lie beside the media"
        raise UserError(f"--output {output}: is for one dataset with a jsonl; {found}. Leave the flag out.")
    beside = Beside()
    return {label: beside if spec.directory is not None else NewJsonl(spec, output or new_jsonl(spec)) for label, spec in by_label.items()}


def new_jsonl(spec: DatasetSpec) -> Path:
    """`clips.captioned.jsonl` of `clips.jsonl`."""
    return spec.listing.with_name(f"{spec.listing.stem}.captioned{spec.listing.suffix}")


def _replace(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data, path.with_name(f".ltxv2_caption.{os.getpid()}.tmp"))
    except OSError as error:
        raise not_written(path, error) from error
