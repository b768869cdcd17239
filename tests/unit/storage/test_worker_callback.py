"""Rules of ``on_result``: every result goes there, once, whatever thread finds it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

import pytest

from hicache_core.storage.workers.executor import Deadlines
from hicache_core.storage.workers.worker import StorageWorker
from hicache_core.types import JobResult, JobState
from tests.no_threads import no_threads
from tests.unit.storage.jobs import exists, read, write
from tests.unit.storage.test_worker_deadlines import DEADLINE_S, Clock, Stuck


@pytest.fixture
def stuck() -> Stuck:
    return Stuck()


def make(
    backend: Stuck, on_result: Callable[[JobResult], None], clock: Clock, n_threads: int = 1
) -> StorageWorker:
    return StorageWorker(
        backend,
        n_threads=n_threads,
        max_read_nbytes=1000,
        max_write_nbytes=1000,
        clock=clock,
        deadline=Deadlines(DEADLINE_S, 0.0),
        on_result=on_result,
    )


def test_a_result_comes_on_the_thread_that_ran_the_job_and_not_from_drain(stuck: Stuck) -> None:
    told: queue.Queue[tuple[int, JobState, str]] = queue.Queue()

    def on_result(result: JobResult) -> None:
        told.put((result.job.job_id, result.state, threading.current_thread().name))

    worker = make(stuck, on_result, Clock())
    stuck.let_all_go()
    for job in (exists(1), read(2), write(3)):
        worker.submit(job)
        job_id, state, thread = told.get(timeout=20)
        assert (job_id, state) == (job.job_id, JobState.DONE)
        assert thread.startswith("hicache-storage-")
    assert worker.drain() == []
    assert worker.n_in_flight == 0
    worker.check_integrity()
    assert worker.close(20) == []
    assert told.empty()


def test_a_job_in_a_callback_may_be_followed_by_another(stuck: Stuck) -> None:
    done: queue.Queue[int] = queue.Queue()

    def on_result(result: JobResult) -> None:
        if result.job.job_id < 5:
            worker.submit(read(result.job.job_id + 1))
        done.put(result.job.job_id)

    worker = make(stuck, on_result, Clock())
    stuck.let_all_go()
    worker.submit(read(1))
    assert [done.get(timeout=20) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert worker.close(20) == []


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_callback_that_raises_is_logged_and_ends_no_thread(
    stuck: Stuck, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    told: queue.Queue[int] = queue.Queue()

    def on_result(result: JobResult) -> None:
        told.put(result.job.job_id)
        raise error("of the engine")

    worker = make(stuck, on_result, Clock())
    stuck.let_all_go()
    with caplog.at_level(logging.ERROR):
        for job_id in (1, 2):
            worker.submit(read(job_id))
            assert told.get(timeout=20) == job_id
        assert worker.close(20) == []
    assert caplog.text.count("of the engine") >= 2


def test_what_is_late_or_has_waited_too_long_is_told_of_by_whoever_looks(stuck: Stuck) -> None:
    told: list[tuple[int, JobState]] = []
    clock = Clock()
    worker = make(stuck, lambda result: told.append((result.job.job_id, result.state)), clock)
    worker.submit(read(1))
    stuck.until_started("1")
    worker.submit(read(2))
    clock.now += DEADLINE_S
    assert worker.drain() == []
    assert told == [(1, JobState.OVERDUE), (2, JobState.CANCELLED)]
    stuck.let_all_go()
    assert worker.close(20) == []
    assert told[2:] == [(1, JobState.DONE)]


def test_a_job_that_waited_too_long_is_told_of_although_no_other_job_starts(stuck: Stuck) -> None:
    """The thread that finds it has nothing to run, and would go to sleep with the result."""
    told: queue.Queue[tuple[int, JobState]] = queue.Queue()
    clock = Clock()
    worker = make(stuck, lambda result: told.put((result.job.job_id, result.state)), clock)
    worker.submit(read(1))
    stuck.until_started("1")
    worker.submit(read(2))
    clock.now += DEADLINE_S
    stuck.let_all_go()
    states = dict(told.get(timeout=20) for _ in range(2))
    assert states == {1: JobState.DONE, 2: JobState.CANCELLED}
    assert worker.close(20) == []


def test_a_cancelled_job_and_those_that_wait_at_close_are_told_of(stuck: Stuck) -> None:
    told: list[tuple[int, JobState]] = []
    worker = make(stuck, lambda result: told.append((result.job.job_id, result.state)), Clock())
    for job_id in (1, 2, 3):
        worker.submit(read(job_id))
    stuck.until_started("1")
    assert worker.cancel(2)
    assert told == [(2, JobState.CANCELLED)]
    assert [job.job_id for job in worker.close(0.0)] == [1]
    assert told == [(2, JobState.CANCELLED), (3, JobState.CANCELLED)]
    stuck.let_all_go()
    assert worker.close(20) == []
    assert told[2:] == [(1, JobState.DONE)]


def test_jobs_without_a_thread_are_told_of(stuck: Stuck) -> None:
    told: list[tuple[int, JobState]] = []
    worker = make(stuck, lambda result: told.append((result.job.job_id, result.state)), Clock())
    with no_threads("hicache-storage"):
        worker.submit(read(1))
    assert told == [(1, JobState.FAILED)]
    assert worker.close(20) == []
