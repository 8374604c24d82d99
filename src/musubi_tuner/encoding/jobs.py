"""Which cache files there are to make, and which of them are right already: decided from headers and fingerprints, before decoding."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.cache.audit import reason_to_rebuild
from musubi_tuner.cache.index import Clip
from musubi_tuner.encoding.plan import DatasetPlan, PlannedClip
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One cache file."""

    label: str
    """Of the dataset."""
    planned: PlannedClip
    target: Path
    expected: Mapping[str, str]
    """Metadata that an existing file is compared by."""
    people: Mapping[str, str]
    """Metadata that is only read by people."""
    size: int
    """About how many bytes it will have."""

    @property
    def name(self) -> str:
        return f"{self.label}/{self.planned.clip.key}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Todo:
    """A job that has to be done, and why."""

    job: Job
    reason: str
    """`missing`, or why the file that is there is no good."""


def list_jobs(
    plans: Sequence[DatasetPlan],
    *,
    name_of: Callable[[Clip], str | None],
    expected_of: Callable[[Clip], Mapping[str, str]],
    size_of: Callable[[Clip], int],
    model_version: str,
) -> tuple[Job, ...]:
    """One job for each file; a file that two datasets share, such as training and validation cut alike, is one job.

    Args:
        name_of: the file's name in the cache directory; None where the clip has no such file.

    Raises:
        UserError: two different windows would have the same file name.
    """
    jobs: dict[Path, Job] = {}
    for plan in plans:
        for planned in plan.clips:
            name = name_of(planned.clip)
            if name is None:
                continue
            job = Job(
                label=plan.spec.label,
                planned=planned,
                target=plan.spec.cache_directory / name,
                expected=expected_of(planned.clip),
                people=_for_people(planned, model_version),
                size=size_of(planned.clip),
            )
            other = jobs.setdefault(job.target, job)
            if other.expected != job.expected:
                raise UserError(
                    f"{job.target}: {other.name} and {job.name} would both be cached in this file, though they are cut differently "
                    f"({other.expected['window']} and {job.expected['window']}). Give one of the datasets a cache_directory of its own."
                )
    return tuple(sorted(jobs.values(), key=lambda job: (_bucket(job.planned.clip), str(job.target))))


def choose(jobs: Sequence[Job], required: Sequence[str], *, skip_existing: bool) -> list[Todo]:
    """The jobs whose file is missing or wrong; all of them where existing files are not to be kept."""
    found = []
    for job in jobs:
        if skip_existing:
            reason = reason_to_rebuild(job.target, job.expected, required)
        else:
            reason = "--no-skip_existing" if job.target.is_file() else "missing"
        if reason is not None:
            found.append(Todo(job=job, reason=reason))
    return found


def _for_people(planned: PlannedClip, model_version: str) -> dict[str, str]:
    clip = planned.clip
    size = {"original_size": f"{clip.original_width}x{clip.original_height}"} if clip.width else {}
    return {"source": clip.source, "caption": planned.source.caption, "model_version": model_version, **size}


def _bucket(clip: Clip) -> tuple[float, ...]:
    """Largest first, so that memory that does not suffice shows at once."""
    return (-clip.width * clip.height * clip.frames, clip.width, clip.height, clip.frames, clip.end_seconds - clip.start_seconds)
