"""What the two latent caching programs have in common: plan, forecast or encode, report."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from musubi_tuner.cache import store
from musubi_tuner.cache.index import write_index
from musubi_tuner.cache.names import INDEX_ENDING, LATENTS_ENDING
from musubi_tuner.config.caching import DataOptions, WorkOptions
from musubi_tuner.config.dataset import DatasetConfig
from musubi_tuner.encoding.jobs import Job, Todo, choose
from musubi_tuner.encoding.pipeline import Stages, run_pipeline
from musubi_tuner.encoding.plan import DatasetPlan, plan_datasets
from musubi_tuner.encoding.report import Outcome, describe_forecast, describe_orphans, describe_outcome, describe_sources
from musubi_tuner.runtime.processes import Processes

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What one program caches."""

    title: str
    """Such as `Audio latent caching`."""
    ending: str
    """Of its files' names."""
    required: tuple[str, ...]
    """Stripped keys that each file must hold."""
    make_stages: Callable[[Sequence[Job]], Stages]
    """Loads the encoder for the jobs of this process; called only where there are some."""


def plan_and_index(datasets: DatasetConfig, task: Task, data: DataOptions, work: WorkOptions, group: Processes) -> tuple[DatasetPlan, ...]:
    """Plan all datasets, say what was left out, and write the indices unless nothing is to be written."""
    plans = plan_datasets(datasets, group, work.num_workers)
    if group.is_main:
        log.info("%s", describe_sources(plans))
        for plan in plans:
            if plan.without_caption:
                log.warning(
                    "WARNING: %s: %d source(s) have no caption yet; training needs one for each.", plan.spec.label, plan.without_caption
                )
        if not data.dry_run:
            for plan in plans:
                store.clean_temporaries(plan.spec.cache_directory, (task.ending, INDEX_ENDING))
                write_index(plan.spec, plan.index)
    group.barrier()
    return plans


def run_task(task: Task, plans: Sequence[DatasetPlan], jobs: Sequence[Job], data: DataOptions, work: WorkOptions, group: Processes) -> int:
    """Encode what is missing or wrong; returns the exit code, 1 where anything failed."""
    checked = [one for part in group.gather(choose(group.share(jobs), task.required, skip_existing=data.skip_existing)) for one in part]
    order = {job.target: place for place, job in enumerate(jobs)}
    todo = sorted(checked, key=lambda one: order[one.job.target])
    if data.dry_run:
        if group.is_main:
            log.info("%s", describe_forecast(task.title, plans, [one.job for one in todo]))
        return 1 if any(row.outcome == "failed" for plan in plans for row in plan.rows) else 0
    own = group.share(todo)
    failures = _encode(task, own, work, group)
    failed = {job.target for job, _ in failures}
    done = [one for one in own if one.job.target not in failed]
    part = Outcome(
        kept=len(jobs) - len(todo) if group.is_main else 0,
        encoded=len(done),
        rebuilt=[(one.job.target.name, one.reason) for one in done if one.reason != "missing"],
        failed=[(job.name, reason) for job, reason in failures],
    )
    outcome = Outcome.joined(group.gather(part))
    outcome.failed += [(f"{plan.spec.label}/{row.source}", row.note) for plan in plans for row in plan.rows if row.outcome == "failed"]
    if task.ending == LATENTS_ENDING:
        outcome.not_mirrored = sum(plan.not_mirrored for plan in plans)
    if group.is_main:
        log.info("\n%s", describe_outcome(task.title, outcome))
        if orphans := describe_orphans(plans, jobs, task.ending):
            log.info("%s", orphans)
    return 1 if outcome.failed else 0


def _encode(task: Task, todo: Sequence[Todo], work: WorkOptions, group: Processes) -> list[tuple[Job, str]]:
    if not todo:
        return []
    jobs = [one.job for one in todo]
    stages = task.make_stages(jobs)
    with tqdm(total=len(todo), desc=task.title, unit="clip", disable=not group.is_main) as bar:
        finished = run_pipeline(jobs, stages, batch_size=work.batch_size, workers=work.num_workers, on_done=lambda: bar.update() and None)
    for job, reason in finished.failures:
        log.warning("WARNING: %s: %s", job.name, reason)
    if group.is_main and (rates := finished.times.describe()):
        log.info("%s", rates)
    return finished.failures
