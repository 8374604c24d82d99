"""What a caching program says: before (what is cut from what, a forecast) and after (a table)."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from musubi_tuner.cache.index import Clip
from musubi_tuner.encoding.jobs import Job
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
    """(file, reason) of files that were made anew; counted in `encoded` too."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(clip or source, reason)"""
    not_mirrored: int = 0
    """Clips without the mirror image that `flip_x` asks for."""

    @staticmethod
    def joined(parts: Sequence["Outcome"]) -> "Outcome":
        """Those of several processes as one."""
        return Outcome(
            kept=sum(part.kept for part in parts),
            encoded=sum(part.encoded for part in parts),
            rebuilt=sorted(row for part in parts for row in part.rebuilt),
            failed=sorted(row for part in parts for row in part.failed),
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


def describe_forecast(title: str, plans: Sequence[DatasetPlan], jobs: Sequence[Job]) -> str:
    """`--dry_run`: buckets, bytes to be written and free space.

    Args:
        jobs: what would be encoded.
    """
    buckets = Counter((plan.spec.label, *_shape(planned.clip)) for plan in plans for planned in plan.clips)
    text = _table([(*bucket, count) for bucket, count in sorted(buckets.items())], ("dataset", "size", "frames", "fps", "seconds", "clips"))
    needed: Counter[Path] = Counter()
    for job in jobs:
        needed[job.target.parent] += job.size
    for folder, size in sorted(needed.items()):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        text += f"\n\n{folder}: about {_mebibytes(size)} to be written, {_mebibytes(shutil.disk_usage(existing).free)} free"
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


def describe_orphans(plans: Sequence[DatasetPlan], jobs: Sequence[Job], ending: str) -> str:
    """Files of this kind that belong to no planned clip: left where they are, and never trained on. Empty where there are none."""
    planned = {job.target for job in jobs}
    folders = sorted({plan.spec.cache_directory for plan in plans})
    names = [path.name for folder in folders for path in sorted(folder.glob(f"*{ending}")) if path not in planned and path.is_file()]
    if not names:
        return ""
    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"{len(names)} file(s) belong to no planned clip; they are left where they are and not trained on: {listed}"


def _shape(clip: Clip) -> tuple[str, int, float, float]:
    return f"{clip.width}x{clip.height}", clip.frames, round(clip.fps, 3), round(clip.end_seconds - clip.start_seconds, 2)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    text = format_table(rows[:_MOST_ROWS], headers)
    return text if len(rows) <= _MOST_ROWS else f"{text}\n... and {len(rows) - _MOST_ROWS} more"
