"""Decode, encode and write at the same time: order, failures, bounds."""

import threading
import time

import pytest

from musubi_tuner.cache.store import DiskFullError
from musubi_tuner.encoding.pipeline import Stages, run_pipeline
from musubi_tuner.runtime.errors import UserError


def stages(
    written: dict[int, int], *, batches: list[list[int]] | None = None, decode=lambda job: job, write=None
) -> Stages[int, int, int, int]:
    def encode(values):
        if batches is not None:
            batches.append(list(values))
        return [value * 10 for value in values]

    return Stages(
        decode=decode, shape=lambda value: value // 100, encode=encode, settle=lambda value: value, write=write or written.__setitem__
    )


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_job_is_written_once_in_batches_of_one_shape(workers: int, batch_size: int) -> None:
    jobs = [*range(7), *range(100, 104)]
    written: dict[int, int] = {}
    batches: list[list[int]] = []
    done = []
    run_pipeline(jobs, stages(written, batches=batches), batch_size=batch_size, workers=workers, on_done=lambda: done.append(1))
    assert written == {job: job * 10 for job in jobs} and len(done) == len(jobs)
    assert [value for batch in batches for value in batch] == jobs
    assert all(len(batch) <= batch_size and len({value // 100 for value in batch}) == 1 for batch in batches)


def test_a_job_that_fails_is_reported_and_the_others_go_on() -> None:
    def decode(job: int) -> int:
        if job == 2:
            raise UserError("damaged")
        return job

    def write(job: int, value: int) -> None:
        if job == 4:
            raise UserError("NaN")
        written[job] = value

    written: dict[int, int] = {}
    done = []
    finished = run_pipeline(range(6), stages(written, decode=decode, write=write), batch_size=2, workers=2, on_done=lambda: done.append(1))
    assert sorted(finished.failures) == [(2, "damaged"), (4, "NaN")]
    assert sorted(written) == [0, 1, 3, 5] and len(done) == 6


def test_a_full_disk_and_our_own_faults_end_the_run() -> None:
    def full(job: int, value: int) -> None:
        raise DiskFullError("full")

    with pytest.raises(DiskFullError):
        run_pipeline(range(20), stages({}, write=full), batch_size=1, workers=2, on_done=lambda: None)

    def faulty(job: int) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_pipeline(range(20), stages({}, decode=faulty), batch_size=1, workers=2, on_done=lambda: None)


def test_no_more_is_decoded_ahead_than_workers_and_a_batch() -> None:
    lock = threading.Lock()
    held, most = 0, 0

    def decode(job: int) -> int:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return job

    def write(job: int, value: int) -> None:
        nonlocal held
        time.sleep(0.002)
        with lock:
            held -= 1

    run_pipeline(range(60), stages({}, decode=decode, write=write), batch_size=2, workers=3, on_done=lambda: None)
    assert most <= 3 + 2 + 2 + 2 + 2  # ahead, in the encoder, begun before, waiting to be written


def test_the_report_names_the_stage_that_the_others_wait_for() -> None:
    def slow(job: int) -> int:
        time.sleep(0.02)
        return job

    times = run_pipeline(range(12), stages({}, decode=slow), batch_size=2, workers=2, on_done=lambda: None).times
    rates = times.rates()
    assert times.clips == {"decode": 12, "encode": 12, "write": 12} and times.threads["decode"] == 2
    assert rates["decode"] < rates["encode"] and rates["decode"] < rates["write"] and times.overall <= rates["decode"] * 1.01
    assert "decode binds, at" in times.describe()
