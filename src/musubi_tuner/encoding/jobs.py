"""Which cache files there are to make, and which of them are right already: decided before anything is decoded."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.contents import content_faults
from musubi_tuner.cache.forms import Forms
from musubi_tuner.runtime.errors import UserError

Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(Generic[Content]):
    """One cache file."""

    name: str
    """For people."""
    target: Path
    content: Content
    """What it is made from: a `PlannedClip`, or a text."""
    expected: Mapping[str, str]
    """Metadata that an existing file is compared by; the first that differs is named as the reason."""
    people: Mapping[str, str]
    """Metadata that is only read by people."""
    size: int
    """About how many bytes it will have."""
    unwanted_note: str = ""
    """A file with this `NOTE` is made again, though it is what is expected."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What else decides about the file, of which only its note tells."""
    forms: Forms
    """What the file's tensors must be."""


@dataclass(frozen=True, slots=True)
class Todo(Generic[Content]):
    """A job that has to be done, and why."""

    job: Job[Content]
    reason: str
    """`missing`, or why the file that is there is no good."""


def one_for_each_file(jobs: Iterable[Job[Content]]) -> list[Job[Content]]:
    """The first job of each file: two datasets may share one, such as training and validation cut alike.

    Raises:
        UserError: two that differ would have the same file.
    """
    found: dict[Path, Job[Content]] = {}
    for job in jobs:
        other = found.setdefault(job.target, job)
        theirs, ours = ({**one.settings, **one.expected} for one in (other, job))
        differing = next((key for key in ours if theirs.get(key) != ours[key]), None)
        if differing is not None:
            raise UserError(
                f"{job.target}: {other.name} and {job.name} would both be cached in this file, though they differ ({differing}: "
                f"{theirs.get(differing)} and {ours[differing]}). Give one of the datasets a cache_directory of its own."
            )
    return list(found.values())


def choose(jobs: Sequence[Job[Content]], required: Sequence[str], *, skip_existing: bool) -> list[Todo[Content]]:
    """The jobs whose file is missing or wrong; all of them where existing files are not to be kept."""
    reasons = {
        job.target: reason_to_rebuild(job.target, job.expected, required, job.forms, unwanted_note=job.unwanted_note) for job in jobs
    }
    if skip_existing:
        reasons |= content_faults({job.target: job.forms for job in jobs if reasons[job.target] is None})
    return [Todo(job, reasons[job.target] or "--no-skip_existing") for job in jobs if reasons[job.target] is not None or not skip_existing]
