"""What a caching program says: before (what is cut from what, a forecast) and after (a table)."""

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.encoding.jobs import Job, Todo
from musubi_tuner.encoding.plan import DatasetPlan
from musubi_tuner.runtime.tables import format_table

_MOST_ROWS = 40
_NAMES_A_SIDE = "as their captions say left or right"


@dataclass(kw_only=True, slots=True)
class Outcome:
    """Counts and rows of one program."""

    kept: int = 0
    encoded: int = 0
    rebuilt: list[tuple[str, str]] = field(default_factory=list)
    """(file, reason) of files that were encoded again; counted in `encoded` too."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(clip or source, reason)"""
    not_mirrored: int = 0
    """Clips without the mirror image that `flip_x` asks for."""

    @staticmethod
    def joined(parts: Sequence["Outcome"]) -> "Outcome":
        """Those of several processes as one."""
        return Outcome(
            encoded=sum(part.encoded for part in parts),
            rebuilt=sorted(row for part in parts for row in part.rebuilt),
            failed=sorted(row for part in parts for row in part.failed),
        )


def outcome_of(todo: Sequence[Todo], failures: Sequence[tuple[Job, str]]) -> Outcome:
    """What came of one process's share.

    Args:
        failures: jobs of it that failed, and why.
    """
    failed = {job.target for job, _ in failures}
    done = [one for one in todo if one.job.target not in failed]
    return Outcome(
        encoded=len(done),
        rebuilt=[(one.job.target.name, one.reason) for one in done if one.reason != "missing"],
        failed=[(job.name, reason) for job, reason in failures],
    )


def describe_sources(plans: Sequence[DatasetPlan]) -> str:
    """Sources and clips by dataset, and every source that was trimmed, dropped or could not be read, with the reason."""
    counts = []
    rows = []
    for plan in plans:
        by_outcome = Counter(row.outcome for row in plan.rows)
        counts.append(
            (
                plan.spec.label,
                plan.spec.kind,
                len(plan.rows),
                *(by_outcome[name] for name in ("kept", "trimmed", "dropped", "failed")),
                len(plan.clips),
            )
        )
        rows += [(plan.spec.label, row.source, row.outcome, row.clips, row.note) for row in plan.rows if row.note]
    text = format_table(counts, ("dataset", "kind", "sources", "kept", "trimmed", "dropped", "failed", "clips"))
    for plan in plans:
        if plan.spec.flip_x:
            text += f"\n{plan.spec.label}: {plan.mirrored} of the clips are mirror images (flip_x)"
            text += f"; {plan.not_mirrored} have none, {_NAMES_A_SIDE}" if plan.not_mirrored else ""
    return text + ("\n\n" + _table(rows, ("dataset", "source", "what", "clips", "why")) if rows else "")


def describe_buckets(plans: Sequence[DatasetPlan]) -> str:
    """Clips by dataset, size and length."""
    buckets = Counter(
        (plan.spec.label, f"{clip.width}x{clip.height}", clip.frames, round(clip.fps, 3), round(clip.seconds, 2))
        for plan in plans
        for clip in (planned.clip for planned in plan.clips)
    )
    return _table([(*bucket, count) for bucket, count in sorted(buckets.items())], ("dataset", "size", "frames", "fps", "seconds", "clips"))


def describe_forecast(title: str, jobs: Sequence[Job], *, kept: int, at_most: bool = False, further: Sequence[tuple[str, int]] = ()) -> str:
    """`--dry_run`: files, bytes to be written and free space.

    Args:
        jobs: what would be encoded.
        at_most: the size depends on what the encoder finds.
        further: rows for the table of counts.
    """
    text = format_table([("kept", kept), ("to encode", len(jobs)), *further], ("files", ""))
    needed: Counter[Path] = Counter()
    for job in jobs:
        needed[job.target.parent] += job.size
    for folder, size in sorted(needed.items()):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = _mebibytes(shutil.disk_usage(existing).free)
        text += f"\n\n{folder}: {'at most' if at_most else 'about'} {_mebibytes(size)} to be written, {free} free"
    return f"{text}\n\n{title}: {len(jobs)} file(s) would be encoded; nothing was (--dry_run)."


def describe_outcome(title: str, outcome: Outcome) -> str:
    """The table at the end, and the line that tools look for."""
    counts = [
        ("kept", outcome.kept),
        ("encoded", outcome.encoded),
        ("of these rebuilt", len(outcome.rebuilt)),
        ("failed", len(outcome.failed)),
    ]
    if outcome.not_mirrored:
        counts.append((f"clips not mirrored, {_NAMES_A_SIDE}", outcome.not_mirrored))
    parts = [format_table(counts, ("files", ""))]
    if outcome.rebuilt:
        parts.append(_table(outcome.rebuilt, ("rebuilt", "because")))
    if outcome.failed:
        parts.append(_table(outcome.failed, ("failed", "because")))
    parts.append(f"{title}: {outcome.encoded} encoded, {len(outcome.failed)} failed")
    return "\n\n".join(parts)


def describe_orphans(folders: Iterable[Path], ending: str, jobs: Sequence[Job]) -> str:
    """Files of a kind in the cache directories that nothing plans: left where they are, and never trained on. Empty where there are none.

    Args:
        ending: of their names.
        jobs: every file of the kind that is planned.
    """
    planned = {job.target for job in jobs}
    names = [path.name for folder in sorted(set(folders)) for path in sorted(folder.glob(f"*{ending}")) if path not in planned]
    if not names:
        return ""
    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    what = "caption and no sample prompt" if ending == KINDS["text"].ending else "planned clip"
    return f"{len(names)} file(s) belong to no {what}; they are left where they are and not trained on: {listed}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    text = format_table(rows[:_MOST_ROWS], headers)
    return text if len(rows) <= _MOST_ROWS else f"{text}\n... and {len(rows) - _MOST_ROWS} more"
