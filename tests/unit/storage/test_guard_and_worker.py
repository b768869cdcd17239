"""Rules that guard and worker keep together: a dead store costs its deadline once a window."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.breaker import BreakerState
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.workers.worker import StorageWorker
from hicache_core.types import JobResult, JobState, ReadJob
from tests.unit.storage.virtual import Clock, Told, blank, content, key

N_THREADS = 2
CONFIG = GuardConfig(deadline_base_s=2.0, open_s=5.0, max_open_s=5.0)


class Dead(Told):
    """Once dead, a call hangs until the test lets all of them go."""

    dead = False

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.news = threading.Condition()
        self.n_inside = 0
        self.n_entered = 0
        self.released = False

    def _call(self) -> None:
        if self.dead:
            with self.news:
                self.n_inside += 1
                self.n_entered += 1
                self.news.notify_all()
                self.news.wait_for(lambda: self.released)
                self.n_inside -= 1
        super()._call()

    def until_entered(self, n: int) -> None:
        with self.news:
            assert self.news.wait_for(lambda: self.n_entered >= n, 20)

    def release(self) -> None:
        with self.news:
            self.released = True
            self.news.notify_all()


@pytest.fixture
def store() -> Iterator[Dead]:
    backend = Dead(Clock())
    yield backend
    backend.release()


def read(job_id: int) -> ReadJob:
    return ReadJob(job_id, [key(1)], blank(1), 8)


def finals(worker: StorageWorker, job_ids: Sequence[int]) -> dict[int, JobResult]:
    """The final results of these jobs; those of others are not looked at."""
    found: dict[int, JobResult] = {}
    while set(found) < set(job_ids):
        assert worker.wait(20)
        for result in worker.drain():
            if result.state is not JobState.OVERDUE and result.job.job_id in job_ids:
                found[result.job.job_id] = result
        worker.check_integrity()
    return found


def test_a_store_that_hangs_takes_each_thread_once_and_then_one_probe_a_window(
    store: Dead,
) -> None:
    clock = store.clock
    store.objects = {key(1): content(key(1))}
    guard = GuardedBackend(store, CONFIG, clock, clock.sleep)
    worker = StorageWorker(
        guard,
        n_threads=N_THREADS,
        max_read_nbytes=1000,
        max_write_nbytes=1000,
        clock=clock,
        deadline=CONFIG.deadlines,
        max_overdue=10,
    )
    worker.submit(read(0))
    assert finals(worker, [0])[0].state is JobState.DONE
    store.dead = True
    for job_id in range(1, 9):
        worker.submit(read(job_id))
    store.until_entered(N_THREADS)
    clock.now += 1.5
    worker.submit(read(9))
    clock.now += 0.6
    late = [result.job.job_id for result in worker.drain() if result.state is JobState.OVERDUE]
    assert late == [1, 2]
    assert finals(worker, [9])[9].error_kind == "BreakerOpen", "its thread was a replacement"
    assert store.n_entered == N_THREADS
    for window in range(1, 4):
        clock.now += 5.0
        worker.submit(read(100 * window))
        store.until_entered(N_THREADS + window)
        clock.now += 2.1
        worker.drain()
        refused = [100 * window + n for n in range(1, 6)]
        for job_id in refused:
            worker.submit(read(job_id))
        results = finals(worker, refused)
        assert {result.error_kind for result in results.values()} == {"BreakerOpen"}
        assert store.n_entered == N_THREADS + window, "one probe in each window"
    store.release()
    store.dead = False
    clock.now += 5.0
    worker.submit(read(1000))
    assert finals(worker, [1000])[1000].state is JobState.DONE
    assert guard.status().state is BreakerState.CLOSED
    assert worker.close(20) == []
    assert worker.n_in_flight == 0
