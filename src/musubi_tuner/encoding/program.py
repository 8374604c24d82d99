"""What the caching programs have in common: plan, forecast or encode, report."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from musubi_tuner.cache import store
from musubi_tuner.cache.audit import NOTE
from musubi_tuner.cache.index import write_index
from musubi_tuner.cache.looks import LOOK_ENDINGS
from musubi_tuner.cache.names import INDEX_ENDING, LOOKS_FOLDER
from musubi_tuner.cache.receipts import write_receipts
from musubi_tuner.cache.sidecars import KINDS, SidecarKind
from musubi_tuner.config.caching import DataOptions, WorkOptions
from musubi_tuner.config.dataset import DatasetConfig
from musubi_tuner.encoding.jobs import Job, Todo, choose
from musubi_tuner.encoding.makers import MAKERS, ClipJob, Encoder, sidecar_jobs, stages
from musubi_tuner.encoding.pipeline import run_pipeline
from musubi_tuner.encoding.plan import DatasetPlan, plan_datasets
from musubi_tuner.encoding.report import (
    Outcome,
    describe_buckets,
    describe_forecast,
    describe_orphans,
    describe_outcome,
    describe_sources,
    describe_warnings,
    outcome_of,
)
from musubi_tuner.runtime.processes import Processes
from musubi_tuner.runtime.progress import Progress

log = logging.getLogger(__name__)

_NOTHING = {
    "latents": "which have no pictures. Cache them with ltxv2_cache_audio_latents.py",
    "audio": "which have no sound. Cache them with ltxv2_cache_latents.py",
}
"""Of the programs' main kinds."""


def plan_and_index(
    datasets: DatasetConfig, program: str, data: DataOptions, work: WorkOptions, group: Processes
) -> tuple[DatasetPlan, ...]:
    """Plan all datasets, say what was left out, and write the indices unless nothing is to be written."""
    plans = plan_datasets(datasets, group, work.num_workers)
    if group.is_main:
        log.info("%s", describe_sources(plans))
        for line in describe_warnings(plans):
            log.warning("WARNING: %s", line)
        if not data.dry_run:
            kinds = [kind for kind in KINDS.values() if kind.program == program]
            endings, looks = [kind.ending for kind in kinds], [LOOK_ENDINGS[kind.name] for kind in kinds if kind.name in LOOK_ENDINGS]
            for plan in plans:
                store.clean_temporaries(plan.spec.cache_directory, (*endings, INDEX_ENDING))
                store.clean_temporaries(plan.spec.cache_directory / LOOKS_FOLDER, looks)
                write_index(plan.spec, plan.index)
                write_receipts(plan.spec, plan.receipts)
    group.barrier()
    return plans


def cache_sidecars(
    plans: Sequence[DatasetPlan], program: str, encoder: Encoder, data: DataOptions, work: WorkOptions, group: Processes
) -> int:
    """Make every kind of sidecar that is the program's; returns its exit code, 1 where anything failed."""
    code = 0
    unread = any(row.outcome == "failed" for plan in plans for row in plan.rows)
    for place, kind in enumerate(kind for kind in KINDS.values() if kind.program == program):
        jobs = sidecar_jobs(plans, kind, encoder)
        if jobs or unread and place == 0:
            code = max(code, _cache_kind(plans, kind, jobs, encoder, data, work, group))
        elif place == 0 and group.is_main:
            what = " and ".join(sorted({"sound files" if plan.spec.kind == "audio" else f"{plan.spec.kind}s" for plan in plans}))
            log.warning("WARNING: nothing was encoded: the datasets hold %s, %s.", what, _NOTHING[kind.name])
    return code


def _cache_kind(
    plans: Sequence[DatasetPlan],
    kind: SidecarKind,
    jobs: Sequence[ClipJob],
    encoder: Encoder,
    data: DataOptions,
    work: WorkOptions,
    group: Processes,
) -> int:
    checked = [one for part in group.gather(choose(group.share(jobs), kind.keys, skip_existing=data.skip_existing)) for one in part]
    order = {job.target: place for place, job in enumerate(jobs)}
    todo = sorted(checked, key=lambda one: order[one.job.target])
    unread = [(f"{plan.spec.label}/{row.source}", row.note) for plan in plans for row in plan.rows if row.outcome == "failed"]
    if data.dry_run:
        if group.is_main:
            log.info("%s\n", describe_buckets(plans))
            log.info("%s", describe_forecast(kind.title, [one.job for one in todo], kept=len(jobs) - len(todo)))
        return 1 if unread else 0

    own = group.share(todo)
    notes: dict[Path, str] = {}
    failures = _encode(kind, own, encoder, notes, work, group) if own else []
    part = outcome_of(own, failures)
    failed = {job.target for job, _ in failures}
    part.noted = [(one.job.name, notes[one.job.target]) for one in own if one.job.target in notes and one.job.target not in failed]
    if MAKERS[kind.name].judge is not None:
        todo_files = {one.job.target for one in todo}
        kept = [job for job in group.share(jobs) if job.target not in todo_files]
        part.noted += [(job.name, note) for job in kept if (note := store.read_metadata(job.target).get(NOTE))]
    outcome = Outcome.joined(group.gather(part))
    outcome.kept = len(jobs) - len(todo)
    outcome.failed += unread
    if kind.name == "latents":
        outcome.not_mirrored = sum(plan.not_mirrored for plan in plans)
    return conclude(kind, outcome, jobs, [plan.spec.cache_directory for plan in plans], group)


def _encode(
    kind: SidecarKind, todo: Sequence[Todo], encoder: Encoder, notes: dict[Path, str], work: WorkOptions, group: Processes
) -> list[tuple[Job, str]]:
    """Does the work; returns what failed, and leaves in `notes` what is to be known of files, by path."""
    jobs = [one.job for one in todo]
    made_by = stages(kind, encoder, jobs, notes)
    with Progress(kind.title, len(todo), unit="clip", shown=group.is_main) as bar:
        finished = run_pipeline(jobs, made_by, batch_size=work.batch_size, workers=work.num_workers, on_done=bar.advance)
    for job, reason in finished.failures:
        log.warning("WARNING: %s: %s", job.name, reason)
    if group.is_main and (rates := finished.times.describe()):
        log.info("%s", rates)
    return finished.failures


def conclude(kind: SidecarKind, outcome: Outcome, jobs: Sequence[Job], folders: Collection[Path], group: Processes) -> int:
    """Say what came of it; returns the exit code.

    Args:
        jobs: every file of the kind that is planned.
        folders: the cache directories.
    """
    if group.is_main:
        log.info("\n%s", describe_outcome(kind.title, outcome))
        if orphans := describe_orphans(folders, kind.ending, jobs):
            log.info("%s", orphans)
    return 1 if outcome.failed else 0
