"""Whether two folders hold the same: tensors bit for bit, metadata and numbers exactly, media by bytes or by what they decode to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

VERSION_KEYS = frozenset({"ltxv2_trainer_version", "tokens"})
"""Metadata that may differ: the version of this package, and what only newer trees write. All other keys may not."""
NEWER_FILES = frozenset({"ltxv2_checked.jsonl"})
"""Files that only newer trees write: the record of checked caches."""
NEWER_KEYS = frozenset({"loss_audio_scaled"})
"""Of a line of losses, what only newer trees write."""
STATE_SETTINGS_THAT_MAY_DIFFER: frozenset[str] = frozenset()
"""Of `settings` in a state's progress.json."""
PLAN_WORDS: Mapping[str, str] = {}
"""{word of the older tree: word of the newer one} in the rows of the planner's table, such as names of levels of recomputation."""
NEVER_THE_SAME = frozenset({"torch_rng"})
"""Of a state: torch seeds its global generator anew in each process. Nothing draws from it."""

PLANS = "plans.md"


@dataclass(slots=True)
class Comparison:
    """What was compared so far, and what differs."""

    places: tuple[str, str]
    """Folders in which the two sides ran: paths below them are the same where what follows is."""
    files: int = 0
    tensors: int = 0
    decoded: int = 0
    """Media files whose bytes differ and whose pictures and sound do not."""
    differences: list[str] = field(default_factory=list)

    def folders(self, old: Path, new: Path, *, leave_out: Sequence[str] = (), title: str = "") -> None:
        """Compare all files below two folders but those in the folders `leave_out` of them; `title` goes before their names."""
        names = [_files(folder, leave_out) for folder in (old, new)]
        self.differences += [f"{title}{name}: only in {old}" for name in sorted(names[0] - names[1])]
        self.differences += [f"{title}{name}: only in {new}" for name in sorted(names[1] - names[0])]
        for name in sorted(names[0] & names[1]):
            self.files += 1
            self._file(f"{title}{name}", old / name, new / name)

    def _file(self, name: str, old: Path, new: Path) -> None:
        same_bytes = old.read_bytes() == new.read_bytes()
        if same_bytes and old.suffix == ".mp4":
            return
        before = len(self.differences)
        self._values(f"{name}:", _load(old), _load(new))
        if old.suffix == ".mp4" and len(self.differences) == before:
            self.decoded += 1

    def _values(self, where: str, old: Any, new: Any) -> None:
        """Compare what files hold; tensors may be anywhere in it."""
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            self.tensors += 1
            self.differences += [f"{where} {text}" for text in _tensor_difference(old, new)]
        elif isinstance(old, dict) and isinstance(new, dict):
            for key in sorted(old.keys() | new.keys(), key=str):
                if key in old and key in new:
                    self._values(f"{where} {key}", old[key], new[key])
                elif key not in NEWER_KEYS:
                    self.differences.append(f"{where} {key}: only in the {'older' if key in old else 'newer'} tree")
        elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
            if len(old) != len(new):
                self.differences.append(f"{where} {len(old)} entries -> {len(new)}")
            for number, pair in enumerate(zip(old, new, strict=False)):
                self._values(f"{where} [{number}]", *pair)
        elif self._plain(old) != self._plain(new):
            self.differences.append(f"{where} {_short(old)} -> {_short(new)}")

    def _plain(self, value: Any) -> str:
        """Its repr, which tells 1 from 1.0 and -0.0 from 0.0, and has nan equal to nan."""
        text = repr(value)
        for place in self.places:
            text = text.replace(place, "")
        return text


def _files(folder: Path, leave_out: Sequence[str]) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if path.parts[0] not in leave_out and path.name not in NEWER_FILES}


def _load(path: Path) -> Any:
    """What a file holds, as plain values and tensors; of unknown kinds the digest of its bytes."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = {key: value for key, value in (file.metadata() or {}).items() if key not in VERSION_KEYS}
            return {"metadata": metadata, "tensors": {name: file.get_tensor(name) for name in file.keys()}}
    if path.suffix == ".pt":
        return {key: value for key, value in torch.load(path, weights_only=True).items() if key not in NEVER_THE_SAME}
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".json":
        value = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "progress.json":
            value["settings"] = {key: one for key, one in value["settings"].items() if key not in STATE_SETTINGS_THAT_MAY_DIFFER}
        return value
    if path.suffix == ".mp4":
        return _decode(path)
    if path.name == PLANS:
        return _plan_rows(path.read_text(encoding="utf-8"))
    return f"bytes {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _decode(path: Path) -> dict[str, Tensor]:
    import av

    frames: dict[str, list[Tensor]] = {"video": [], "audio": []}
    with av.open(str(path)) as container:
        for frame in container.decode(*container.streams.video, *container.streams.audio):
            frames["audio" if isinstance(frame, av.AudioFrame) else "video"].append(torch.from_numpy(frame.to_ndarray()))
    return {kind: torch.cat(parts, dim=-1) for kind, parts in frames.items() if parts}


def _plan_rows(text: str) -> dict[str, list[str]]:
    """The cells of the planner's rows by card and clip, in the newer tree's words; headings are left out."""
    for old, new in PLAN_WORDS.items():
        text = text.replace(old, new)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    rows = [row for row in rows if any(sign.isdigit() for cell in row for sign in cell)]
    return {f"row {number} ({row[0]}, {row[1]})": row[2:] for number, row in enumerate(rows, 1)}


def _tensor_difference(old: Tensor, new: Tensor) -> list[str]:
    if old.shape != new.shape or old.dtype != new.dtype:
        return [f"{old.dtype} {tuple(old.shape)} -> {new.dtype} {tuple(new.shape)}"]
    bits = [one.contiguous().reshape(-1).view(torch.uint8) for one in (old, new)]
    if torch.equal(*bits):
        return []
    values = [one.to(torch.float64) for one in (old, new)]
    distance = (values[0] - values[1]).abs()
    return [f"max abs difference {float(distance.max()):.3g}, in {int((distance != 0).sum())} of {old.numel()} values"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
