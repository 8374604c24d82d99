"""What a caching program says: before (what is cut from what, a forecast) and after (a table)."""

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from musubi_tuner.cache.sidecars import KINDS
from musubi_tuner.encoding.jobs import Job, Todo
from musubi_tuner.encoding.plan import DatasetPlan
from musubi_tuner.runtime.tables import format_table, names_of
from musubi_tuner.sources.listing import left_out

_MOST_ROWS = 40
_MOST_WARNINGS = 10
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
    noted: list[tuple[str, str]] = field(default_factory=list)
    """(clip, what is to be known of its sound)"""
    not_mirrored: int = 0
    """Clips without the mirror image that `flip_x` asks for."""

    @staticmethod
    def joined(parts: Sequence["Outcome"]) -> "Outcome":
        """Those of several processes as one."""
        return Outcome(
            encoded=sum(part.encoded for part in parts),
            rebuilt=sorted(row for part in parts for row in part.rebuilt),
            failed=sorted(row for part in parts for row in part.failed),
            noted=sorted(row for part in parts for row in part.noted),
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
    """Sources and clips by dataset; then every video and sound with its rate and length, and every source that was trimmed, dropped or
    could not be read, with the reason."""
    outcomes = [
        name for name in ("kept", "trimmed", "dropped", "failed") if any(row.outcome == name for plan in plans for row in plan.rows)
    ]
    counts = []
    for plan in plans:
        by_outcome = Counter(row.outcome for row in plan.rows)
        counts.append((plan.spec.label, plan.spec.kind, len(plan.rows), *(by_outcome[name] for name in outcomes), len(plan.clips)))
    text = format_table(counts, ("dataset", "kind", "sources", *outcomes, "clips"))
    for plan in plans:
        if plan.spec.flip_x:
            text += f"\n{plan.spec.label}: {plan.mirrored} of the clips are mirror images (flip_x)"
            text += f"; {plan.not_mirrored} have none, {_NAMES_A_SIDE}" if plan.not_mirrored else ""
    listed = "".join(_describe_rows(plan) for plan in plans)
    return text + listed


def _describe_rows(plan: DatasetPlan) -> str:
    """The table of one dataset's sources; where it would be too long, those with a reason first, and the rest as a list of rates."""
    rows = [row for row in plan.rows if row.note or row.seconds]
    if not rows:
        return ""
    if len(rows) > _MOST_ROWS:
        chosen = {id(row) for row in sorted(rows, key=lambda row: not row.note)[:_MOST_ROWS]}
        rows, others = [row for row in rows if id(row) in chosen], [row for row in rows if id(row) not in chosen]
    else:
        others = []
    columns = {
        "source": [row.source for row in rows],
        "fps": [f"{row.fps:.6g}" if row.fps else "" for row in rows],
        "frames": [str(row.frames or "") for row in rows],
        "seconds": [f"{row.seconds:.2f}" if row.seconds else "" for row in rows],
        "clips": [str(row.clips) for row in rows],
        "what": [row.outcome for row in rows],
        "why": [row.note for row in rows],
    }
    columns = {name: values for name, values in columns.items() if any(values)}
    text = f"\n\n{plan.spec.label}: {plan.spec.root}\n" + format_table(list(zip(*columns.values(), strict=True)), tuple(columns))
    if others:
        text += f"\n... and {len(others)} more" + (":" if any(row.seconds for row in others) else "")
    for fps in sorted({row.fps for row in others if row.seconds}):
        seconds = [row.seconds for row in others if row.fps == fps and row.seconds]
        what = f"at {fps:.6g} fps" if fps else "sound files"
        text += f"\n  {len(seconds)} {what}, {min(seconds):.2f} to {max(seconds):.2f} s"
    return text


def describe_warnings(plans: Sequence[DatasetPlan]) -> list[str]:
    """A line each: what is likely not meant so, what lies in the folders and is not used, and captions that are missing."""
    lines = []
    for plan in plans:
        found = [f"{plan.spec.label}/{row.source}: {warning}" for row in plan.rows for warning in row.warnings]
        lines += found[:_MOST_WARNINGS]
        if len(found) > _MOST_WARNINGS:
            lines.append(f"{plan.spec.label}: {len(found) - _MOST_WARNINGS} more such clips")
        for what, names in left_out(plan.spec).items():
            lines.append(f"{plan.spec.label}: not used, {what}: {names_of(names)}" + (f" ({len(names)})" if len(names) > 1 else ""))
        if plan.without_caption:
            lines.append(
                f"{plan.spec.label}: no caption yet for {len(plan.without_caption)} source(s), and training needs one for each: "
                f"{names_of(plan.without_caption)}"
            )
    return lines


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
    kept_rows = [("kept", kept)] if kept else []
    text = format_table([*kept_rows, ("to encode", len(jobs)), *further], ("files", ""))
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
    kinds = Counter(part.split(" (")[0] for _, note in outcome.noted for part in note.split("; "))
    counts = [
        ("kept", outcome.kept),
        ("encoded", outcome.encoded),
        ("of these rebuilt", len(outcome.rebuilt)),
        ("failed", len(outcome.failed)),
        (f"clips not mirrored, {_NAMES_A_SIDE}", outcome.not_mirrored),
        *sorted(kinds.items()),
    ]
    parts = [format_table([(what, count) for what, count in counts if count or what == "encoded"], ("files", ""))]
    if outcome.noted:
        parts.append(_table(outcome.noted, ("clip", "its sound")))
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
