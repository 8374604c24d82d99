"""What an audit can find: the table of kinds, findings, and the facts of a dataset."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.config.dataset_audit import Kind

MEANING: dict[Kind, str] = {
    "hole": "a cache file is missing, damaged or not of what the dataset asks for now; run the caching programs",
    "changed": "a source or a caption is not what was cached; run the caching programs",
    "new": "a source that is not in the plan; run the caching programs",
    "dropped": "a source from which no clip is cut",
    "unreadable": "a file that does not decode",
    "companion": "a source without its reference, mask or sound file",
    "orphan": "a reference, mask, sound file, caption or cache file that no source or clip has",
    "late_sound": "sound that begins after the pictures, or ends before them, by more than a frame",
    "clipped_sound": "sound at full scale",
    "silent_sound": "a sound stream in which nothing is to be heard",
    "static": "pictures that do not move: a still is cheaper, and motion is unlearned from it",
    "upscaled": "a source that is smaller than its bucket",
    "duplicate": "two clips whose latents are nearly the same",
    "leak": "a validation clip that is trained on, or nearly so: its loss says nothing",
    "caption": "a caption that is missing, empty or cannot be read",
    "same_caption": "one caption on several sources",
    "no_trigger": "a caption without the trigger word",
}
"""In the order in which they are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong, or may be."""

    kind: Kind
    dataset: str
    """Its label."""
    name: str
    """Of the clip, source or file."""
    text: str
    clip: str = ""
    """Key of the clip whose picture shows it; empty: none does."""
    value: float | None = None
    """Seconds, share or distance, by which such findings are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFacts:
    """What a dataset is."""

    label: str
    kind: str
    is_validation: bool
    clips: int
    sources: int
    seconds: float
    with_sound: int
    cached_bytes: int
    lengths: dict[str, int]
    """Clips by length, such as `49 frames`."""
    sizes: dict[str, int]
    """Clips by size, such as `768x512`."""
    rates: dict[str, int]
    source_sizes: dict[str, int]
    caption_words: tuple[int, float, int]
    """Least, median, most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """All of it."""

    dataset_config: Path
    facts: tuple[DatasetFacts, ...]
    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...]
    """What could not be looked at, and why."""
    nearest: tuple[tuple[str, str, float], ...]
    """The pairs of clips whose latents are nearest to each other, with their distance."""
    looks: dict[tuple[str, str], Path]
    """(dataset, clip) -> its small picture, where there is one."""

    def counts(self) -> dict[Kind, int]:
        """Findings by kind, of all kinds."""
        found = Counter(finding.kind for finding in self.findings)
        return {kind: found[kind] for kind in MEANING}

    def fails(self, kinds: Sequence[str]) -> list[Kind]:
        """Those of the kinds that something was found of; `any` stands for all."""
        return [kind for kind, count in self.counts().items() if count and ("any" in kinds or kind in kinds)]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        findings = [
            {key: value for key, value in dataclasses.asdict(finding).items() if value not in ("", None)} for finding in self.findings
        ]
        return {
            "ltxv2_audit": 1,
            "dataset_config": str(self.dataset_config),
            "counts": self.counts(),
            "datasets": [dataclasses.asdict(facts) for facts in self.facts],
            "findings": findings,
            "nearest": [{"clips": [first, second], "distance": distance} for first, second, distance in self.nearest],
            "not_checked": list(self.not_checked),
        }
