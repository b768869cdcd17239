"""Rules of deadlines: a late job is told of once, and harms no other job."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hicache_core.storage.base import StorageBackend
from hicache_core.storage.workers.executor import GIB, Deadlines
from hicache_core.storage.workers.worker import StorageWorker
from hicache_core.types import (
    Job,
    JobResult,
    JobState,
    ReadJob,
    WriteJob,
)
from tests.unit.storage.jobs import BatchesOnly, exists, read, write
from tests.unit.storage.threads import storage_threads

DEADLINE_S = 2.0


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Stuck(BatchesOnly):
    """Every call stays until the test lets the job of that number go."""

    name = "stuck"

    def __init__(self) -> None:
        super().__init__()
        self.news = threading.Condition()
        self.started: list[str] = []
        self.inside: set[str] = set()
        self.may_go: set[str] = set()
        self.all_may_go = False

    def _pass(self, keys: Sequence[str]) -> int:
        (key,) = (key[1:] for key in keys)
        with self.news:
            self.started.append(key)
            self.inside.add(key)
            self.news.notify_all()
            self.news.wait_for(lambda: self.all_may_go or key in self.may_go)
            self.inside.remove(key)
            self.news.notify_all()
        return 1

    def until_started(self, *keys: str) -> None:
        with self.news:
            assert self.news.wait_for(lambda: set(keys) <= set(self.started), 20), self.started

    def let_go(self, key: str) -> None:
        with self.news:
            self.may_go.add(key)
            self.news.notify_all()

    def let_all_go(self) -> None:
        with self.news:
            self.all_may_go = True
            self.news.notify_all()


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    backend = Stuck()
    yield backend
    backend.let_all_go()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(backend: StorageBackend, clock: Callable[[], float], **limits: int) -> StorageWorker:
    bounds = {"n_threads": 1, "max_read_nbytes": 1000, "max_write_nbytes": 1000} | limits
    return StorageWorker(backend, **bounds, clock=clock, deadline=Deadlines(DEADLINE_S, 0.0))


def states(results: Sequence[JobResult]) -> list[tuple[int, JobState]]:
    return [(result.job.job_id, result.state) for result in results]


def drained(worker: StorageWorker, n: int) -> list[JobResult]:
    """The next ``n`` results."""
    results: list[JobResult] = []
    while len(results) < n:
        assert worker.wait(20), f"{len(results)} of {n} results after 20 s"
        results += worker.drain()
    worker.check_integrity()
    return results


def test_a_deadline_grows_with_the_bytes_of_a_job() -> None:
    deadline = Deadlines(base_s=2.0, per_gib_s=20.0)
    assert deadline(exists(1)) == 2.0
    assert deadline(ReadJob(1, [], [], GIB)) == 22.0
    assert deadline(WriteJob(1, [], [], GIB // 2)) == 12.0
    with pytest.raises(ValueError, match="base_s"):
        Deadlines(base_s=0)


def test_a_wait_for_all_does_not_wait_for_what_is_overdue(stuck: Stuck, clock: Clock) -> None:
    worker = make(stuck, clock, n_threads=2)
    worker.submit_all([read(1), read(2)])
    stuck.until_started("1", "2")
    stuck.let_go("2")
    assert worker.wait(20)
    clock.now += DEADLINE_S + 0.1
    assert worker.wait(1e9, for_all=True)
    assert states(worker.drain()) == [(2, JobState.DONE), (1, JobState.OVERDUE)]
    stuck.let_go("1")
    assert worker.wait(1e9, for_all=True)
    assert states(worker.drain()) == [(1, JobState.DONE)]
    assert worker.close(20) == []


@pytest.mark.parametrize("make_job", [exists, read, write])
def test_a_job_beyond_its_deadline_is_told_of_once_and_settled_when_it_returns(
    stuck: Stuck, clock: Clock, make_job: Callable[[int], Job]
) -> None:
    worker = make(stuck, clock)
    worker.submit(make_job(1))
    stuck.until_started("1")
    clock.now += DEADLINE_S - 0.1
    assert worker.drain() == []
    clock.now += 0.2
    (result,) = worker.drain()
    assert (result.state, result.n_pages) == (JobState.OVERDUE, 0)
    assert (result.error_kind, result.elapsed_s) == ("BackendTimeout", pytest.approx(2.1))
    assert "2.1 s" in result.error
    assert (worker.n_overdue, worker.n_in_flight) == (1, 1)
    worker.check_integrity()
    clock.now += 100
    assert worker.drain() == []
    stuck.let_go("1")
    (result,) = drained(worker, 1)
    assert (result.state, result.n_pages) == (JobState.DONE, 1)
    assert (worker.n_overdue, worker.n_in_flight, worker.overdue_nbytes) == (0, 0, 0)
    assert worker.close(20) == []


def test_healthy_jobs_go_on_beside_stuck_ones_and_the_spare_thread_ends(
    stuck: Stuck, clock: Clock
) -> None:
    before = storage_threads()
    worker = make(stuck, clock)
    worker.submit(read(1))
    stuck.until_started("1")
    clock.now += 1.5
    worker.submit(read(2))
    assert worker.drain() == []
    assert stuck.started == ["1"], "one thread, and it is busy"
    clock.now += 1
    assert states(worker.drain()) == [(1, JobState.OVERDUE)]
    stuck.let_go("2")
    assert states(drained(worker, 1)) == [(2, JobState.DONE)]
    stuck.let_go("1")
    assert states(drained(worker, 1)) == [(1, JobState.DONE)]
    worker.submit(read(3))
    stuck.until_started("3")
    worker.submit(read(4))
    worker.check_integrity()
    assert "4" not in stuck.started, "there is one thread again"
    stuck.let_all_go()
    drained(worker, 2)
    assert worker.close(20) == []
    assert storage_threads() <= before


def test_reads_and_questions_that_wait_too_long_are_cancelled_and_writes_are_not(
    stuck: Stuck, clock: Clock
) -> None:
    worker = make(stuck, clock, max_overdue=0)
    for job in (write(0), exists(1), read(2), write(3)):
        worker.submit(job)
        stuck.until_started("0")
    clock.now += DEADLINE_S
    assert states(worker.drain()) == [
        (0, JobState.OVERDUE),
        (1, JobState.CANCELLED),
        (2, JobState.CANCELLED),
    ]
    assert worker.n_in_flight == 2
    worker.check_integrity()
    stuck.let_all_go()
    assert states(drained(worker, 2)) == [(0, JobState.DONE), (3, JobState.DONE)]
    assert sorted(stuck.started) == ["0", "3"], "what was cancelled never started"
    assert worker.close(20) == []


def test_so_many_stuck_threads_are_replaced_and_no_more(stuck: Stuck, clock: Clock) -> None:
    worker = make(stuck, clock, max_overdue=2)
    for job_id in range(3):
        worker.submit(read(job_id))
        stuck.until_started(str(job_id))
        clock.now += DEADLINE_S
        assert states(worker.drain()) == [(job_id, JobState.OVERDUE)]
        worker.check_integrity()
    worker.submit(read(3))
    clock.now += DEADLINE_S
    assert states(worker.drain()) == [(3, JobState.CANCELLED)]
    assert stuck.started == ["0", "1", "2"]
    assert worker.n_overdue == 3
    stuck.let_go("0")
    drained(worker, 1)
    worker.submit(read(4))
    worker.check_integrity()
    assert worker.n_overdue == 2
    stuck.until_started("4")
    stuck.let_all_go()
    drained(worker, 3)
    assert worker.close(20) == []


def test_bytes_of_an_overdue_read_block_no_other_read_and_those_of_a_write_pass_counted(
    stuck: Stuck, clock: Clock
) -> None:
    worker = make(stuck, clock, n_threads=3, max_read_nbytes=4, max_write_nbytes=8)
    for job in (read(0), write(1), read(2)):
        worker.submit(job)
    stuck.until_started("0", "1")
    clock.now += DEADLINE_S / 2
    worker.cancel(2)
    worker.submit(read(3))
    worker.drain()
    assert worker.read_nbytes_in_flight == 4
    clock.now += DEADLINE_S / 2
    assert sorted(states(worker.drain()), key=lambda s: s[0]) == [
        (0, JobState.OVERDUE),
        (1, JobState.OVERDUE),
    ]
    stuck.until_started("3")
    assert (worker.read_nbytes_in_flight, worker.write_nbytes_in_flight) == (4, 4)
    assert worker.overdue_nbytes == 8
    assert not worker.submit(write(4, nbytes=5)), "a stuck write still holds its bytes"
    stuck.let_all_go()
    drained(worker, 3)
    assert (worker.read_nbytes_in_flight, worker.write_nbytes_in_flight) == (0, 0)
    assert worker.close(20) == []


def test_wait_wakes_for_a_job_that_becomes_overdue(stuck: Stuck) -> None:
    worker = StorageWorker(
        stuck,
        n_threads=1,
        max_read_nbytes=9,
        max_write_nbytes=9,
        clock=time.monotonic,
        deadline=Deadlines(0.05, 0.0),
    )
    worker.submit(read(1))
    stuck.until_started("1")
    assert worker.wait(20)
    assert states(worker.drain()) == [(1, JobState.OVERDUE)]
    assert not worker.wait(0.01), "it is told of once"
    stuck.let_all_go()
    assert states(drained(worker, 1)) == [(1, JobState.DONE)]
    assert worker.close(20) == []


def test_wait_ends_even_if_the_clock_stands_still(stuck: Stuck, clock: Clock) -> None:
    worker = make(stuck, clock)
    worker.submit(read(1))
    assert not worker.wait(0.01)
    stuck.let_all_go()
    drained(worker, 1)
    assert worker.close(20) == []


def test_close_names_an_overdue_job_that_never_returns(stuck: Stuck, clock: Clock) -> None:
    worker = make(stuck, clock)
    job = read(1)
    worker.submit(job)
    stuck.until_started("1")
    clock.now += DEADLINE_S
    worker.drain()
    assert worker.close(0.01) == [job]
    worker.check_integrity()
    stuck.let_all_go()
    assert worker.close(20) == []
    assert states(worker.drain()) == [(1, JobState.DONE)]


def test_overdue_jobs_are_logged_once_a_minute(
    stuck: Stuck, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    worker = make(stuck, clock)
    with caplog.at_level(logging.WARNING):
        for job_id in range(2):
            worker.submit(read(job_id))
            stuck.until_started(str(job_id))
            clock.now += DEADLINE_S
            assert worker.drain()
    (record,) = caplog.records
    assert "backend stuck is late with a ReadJob" in record.message
    stuck.let_all_go()
    assert worker.close(20) == []


class DeadlineMachine(RuleBasedStateMachine):
    """Any order of calls and of time: one final result a job, at most one OVERDUE before it."""

    def __init__(self) -> None:
        super().__init__()
        self.backend = Stuck()
        self.clock = Clock()
        self.worker = make(
            self.backend,
            self.clock,
            n_threads=2,
            max_read_nbytes=8,
            max_write_nbytes=12,
            max_overdue=2,
        )
        self.next_id = 0
        self.open: dict[int, Job] = {}
        self.overdue: set[int] = set()

    @rule(kind=st.sampled_from((exists, read, write)))
    def submit(self, kind: Callable[[int], Job]) -> None:
        job = kind(self.next_id)
        self.next_id += 1
        if self.worker.submit(job):
            self.open[job.job_id] = job
        else:
            assert isinstance(job, WriteJob)

    @precondition(lambda self: self.next_id)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.worker.cancel(data.draw(st.integers(0, self.next_id - 1)))

    @precondition(lambda self: self.next_id)
    @rule(data=st.data())
    def let_one_go(self, data: st.DataObject) -> None:
        self.backend.let_go(str(data.draw(st.integers(0, self.next_id - 1))))

    @rule(seconds=st.sampled_from((0.5, 1.0, DEADLINE_S)))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def drain(self) -> None:
        for result in self.worker.drain():
            job_id = result.job.job_id
            if result.state is JobState.OVERDUE:
                assert job_id in self.open, "told of after its final result"
                assert job_id not in self.overdue, "told of twice"
                self.overdue.add(job_id)
            else:
                del self.open[job_id]
                if result.state is JobState.CANCELLED:
                    assert str(job_id) not in self.backend.started

    @invariant()
    def sums_hold(self) -> None:
        self.worker.check_integrity()
        assert self.worker.n_in_flight <= len(self.open)

    @invariant()
    def threads_are_bounded(self) -> None:
        assert len(self.backend.inside) <= 2 + 2

    def teardown(self) -> None:
        self.backend.let_all_go()
        assert self.worker.close(20) == []
        self.drain()
        assert not self.open
        assert (self.worker.n_in_flight, self.worker.n_overdue) == (0, 0)


TestDeadlineMachine = DeadlineMachine.TestCase
TestDeadlineMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
