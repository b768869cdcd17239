"""The simulated storage worker: the order and the times of its jobs, and what is refused."""

from __future__ import annotations

import math

import pytest

from hicache_core.fleet import store as module
from hicache_core.fleet.links import Clock
from hicache_core.fleet.setting import StorageProfile
from hicache_core.fleet.store import Store, TimedWorker, names_of
from hicache_core.kv.keys import PageKeys, pack_tokens
from hicache_core.types import ExistsJob, JobState, ReadJob, WriteJob

PAGE_NBYTES = 100
PROFILE = StorageProfile(
    question_s=0.5, latency_s=1.0, page_s=0.1, read_nbytes_per_s=100.0, write_nbytes_per_s=50.0
)


def keys(first: int, n: int) -> PageKeys:
    """Keys of ``n`` pages of four tokens; another ``first`` gives other pages."""
    return PageKeys("0" * 16, pack_tokens(range(4 * first, 4 * (first + n))), 4)


class Bench:
    """A worker, its clock and its store."""

    def __init__(self, *, n_threads: int = 1, shared_nbytes_per_s: float = math.inf) -> None:
        self.clock = Clock()
        self.store = Store(None, shared_nbytes_per_s)
        self.worker = self.another(n_threads)

    def another(self, n_threads: int = 1) -> TimedWorker:
        """A further worker of the same store and clock."""
        return TimedWorker(self.clock, self.store, PROFILE, PAGE_NBYTES, n_threads)

    def results(self) -> list[tuple[int, JobState, int, float]]:
        """What has ended by now: job, state, pages, and when it was found."""
        self.worker.check_integrity()
        found = self.worker.drain()
        return [(one.job.job_id, one.state, one.n_pages, one.elapsed_s) for one in found]


def test_each_kind_of_job_takes_its_time() -> None:
    b = Bench(n_threads=3)
    b.worker.submit(WriteJob(1, keys(0, 2), [], 0))
    b.clock.reach(10.0)
    assert b.results() == [(1, JobState.DONE, 2, pytest.approx(200 / 50 + 1.0 + 2 * 0.1))]
    b.worker.submit(ExistsJob(2, keys(0, 2)))
    b.worker.submit(ReadJob(3, keys(0, 2), [], 0))
    b.clock.reach(20.0)
    assert b.results() == [
        (2, JobState.DONE, 2, pytest.approx(0.5)),
        (3, JobState.DONE, 2, pytest.approx(200 / 100 + 1.0 + 2 * 0.1)),
    ]


def test_a_page_that_storage_has_is_not_sent_again() -> None:
    b = Bench()
    b.store.write(names_of(keys(0, 3)), 0.0)
    b.worker.submit(WriteJob(1, keys(0, 3), [], 0))
    b.clock.reach(10.0)
    assert b.results() == [(1, JobState.DONE, 3, pytest.approx(1.0))]
    assert b.worker.writes.moved_nbytes == 0


def test_questions_start_before_reads_and_reads_before_writes() -> None:
    b = Bench()
    b.worker.submit(WriteJob(1, keys(0, 1), [], 0))  # runs, so the others wait
    b.worker.submit(WriteJob(2, keys(5, 1), [], 0))
    b.worker.submit(ReadJob(3, keys(9, 1), [], 0))
    b.worker.submit(ExistsJob(4, keys(9, 1)))
    assert b.worker.depths == {"exists": 1, "read": 1, "write": 1}
    b.clock.reach(100.0)
    assert [job_id for job_id, *_ in b.results()] == [1, 4, 3, 2]
    assert b.worker.n_in_flight == 0


def test_a_waiting_job_can_be_cancelled_and_a_running_one_not() -> None:
    b = Bench()
    b.worker.submit(ReadJob(1, keys(0, 1), [], 0))
    b.worker.submit(ReadJob(2, keys(1, 1), [], 0))
    assert not b.worker.cancel(1)
    assert b.worker.cancel(2)
    assert b.results() == [(2, JobState.CANCELLED, 0, 0.0)]
    assert b.worker.reads.moved_nbytes == PAGE_NBYTES


def test_writes_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WRITE_NBYTES", 2 * PAGE_NBYTES)
    b = Bench()
    assert b.worker.submit(WriteJob(1, keys(0, 3), [], 0))  # alone, it is taken whatever its size
    assert not b.worker.submit(WriteJob(2, keys(5, 1), [], 0))
    assert b.worker.submit(ReadJob(3, keys(5, 1), [], 0))
    b.clock.reach(100.0)
    assert b.worker.submit(WriteJob(4, keys(5, 1), [], 0))


def test_servers_share_the_bandwidth_of_the_store() -> None:
    """Each could read a page a second; together they get one in two seconds."""
    b = Bench(shared_nbytes_per_s=50.0)
    b.store.write(names_of(keys(0, 1)), 0.0)
    other = b.another()
    b.worker.submit(ReadJob(1, keys(0, 1), [], 0))
    other.submit(ReadJob(1, keys(0, 1), [], 0))
    assert b.worker.next_s == pytest.approx(2.0 + 1.0 + 0.1)
    assert other.next_s == pytest.approx(4.0 + 1.0 + 0.1)


def test_who_waits_lets_the_time_of_the_next_result_come() -> None:
    b = Bench(n_threads=2)
    b.worker.submit(ExistsJob(1, keys(0, 1)))
    b.worker.submit(ReadJob(2, keys(0, 1), [], 0))
    assert not b.worker.wait(0.25)
    assert b.clock.now == 0.25
    assert b.worker.wait(100.0)
    assert b.clock.now == 0.5
    assert b.worker.wait(100.0, for_all=True)
    assert b.clock.now == pytest.approx(2.1)
    assert [one[0] for one in b.results()] == [1, 2]
