"""Rules of the storage worker: order, bounds, and one result for every job."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hicache_core.errors import BackendTimeout, UseAfterClose
from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.workers.executor import run_job
from hicache_core.storage.workers.queue import READS_BEFORE_A_WRITE
from hicache_core.storage.workers.worker import StorageWorker
from hicache_core.types import (
    Job,
    JobResult,
    JobState,
    WriteJob,
)
from tests.no_threads import no_threads
from tests.unit.storage.jobs import CONTEXT, NBYTES, BatchesOnly, exists, read, write
from tests.unit.storage.threads import storage_threads


class Gated(BatchesOnly):
    """Records what starts; every batch call waits until the test lets one through."""

    name = "gated"

    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []
        self.gate = threading.Semaphore(0)
        self.now_running = 0
        self.most_running = 0
        self._lock = threading.Lock()

    def _pass(self, keys: Sequence[str]) -> int:
        with self._lock:
            self.started += keys
            self.now_running += 1
            self.most_running = max(self.most_running, self.now_running)
        self.gate.acquire()
        with self._lock:
            self.now_running -= 1
        return len(keys)

    def let_through(self, n: int = 10_000) -> None:
        self.gate.release(n)


def until(condition: Callable[[], bool]) -> None:
    """Waits for ``condition``; a hang is a failure."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited 20 s for nothing"
        time.sleep(0.001)


def make(backend: StorageBackend, **limits: int) -> StorageWorker:
    bounds = {"n_threads": 1, "max_read_nbytes": 1000, "max_write_nbytes": 1000} | limits
    return StorageWorker(backend, **bounds, clock=time.monotonic)


def drained(worker: StorageWorker, n: int) -> list[JobResult]:
    """The next ``n`` results."""
    results: list[JobResult] = []
    while len(results) < n:
        assert worker.wait(20), f"{len(results)} of {n} results after 20 s"
        results += worker.drain()
    worker.check_integrity()
    return results


@pytest.fixture
def gated() -> Iterator[Gated]:
    backend = Gated()
    yield backend
    backend.let_through()


def test_questions_go_before_reads_and_reads_before_writes(gated: Gated) -> None:
    worker = make(gated)
    worker.submit(read(0))
    until(lambda: gated.started == ["r0"])
    for job in (write(1), write(2), read(3), exists(4), read(5), exists(6)):
        assert worker.submit(job)
    assert worker.depths == {"exists": 2, "read": 2, "write": 2}
    gated.let_through()
    drained(worker, 7)
    assert gated.started == ["r0", "e4", "e6", "r3", "r5", "w1", "w2"]
    assert worker.close(5) == []


def test_a_write_waits_for_a_bounded_number_of_reads(gated: Gated) -> None:
    worker = make(gated)
    worker.submit(read(0))
    until(lambda: gated.started == ["r0"])
    worker.submit(write(1))
    for job_id in range(2, 2 + 2 * READS_BEFORE_A_WRITE):
        worker.submit(read(job_id))
    gated.let_through()
    drained(worker, 2 + 2 * READS_BEFORE_A_WRITE)
    assert gated.started.index("w1") == READS_BEFORE_A_WRITE + 1
    assert worker.close(5) == []


def test_writes_leave_a_thread_to_the_reads(gated: Gated) -> None:
    worker = make(gated, n_threads=3)
    for job_id in range(4):
        worker.submit(write(job_id))
    until(lambda: len(gated.started) == 2)
    worker.submit(read(9))
    until(lambda: "r9" in gated.started)
    assert gated.started == ["w0", "w1", "r9"]
    gated.let_through()
    drained(worker, 5)
    assert worker.close(5) == []


def test_bytes_of_running_reads_are_bounded(gated: Gated) -> None:
    worker = make(gated, n_threads=4, max_read_nbytes=2 * NBYTES)
    for job_id in range(6):
        worker.submit(read(job_id))
    until(lambda: len(gated.started) == 2)
    assert worker.read_nbytes_in_flight == 2 * NBYTES
    worker.submit(exists(7))
    until(lambda: "e7" in gated.started)
    gated.let_through()
    drained(worker, 7)
    assert gated.most_running <= 3
    assert worker.read_nbytes_in_flight == 0
    assert worker.close(5) == []


def test_a_write_is_refused_when_the_queue_is_full_and_nothing_of_it_is_kept(gated: Gated) -> None:
    worker = make(gated, max_write_nbytes=2 * NBYTES)
    assert worker.submit(write(0))
    assert worker.submit(write(1))
    assert not worker.submit(write(2))
    assert worker.n_in_flight == 2
    assert worker.write_nbytes_in_flight == 2 * NBYTES
    gated.let_through()
    drained(worker, 2)
    assert worker.submit(write(2)), "a refused job may be submitted again"
    drained(worker, 1)
    assert worker.close(5) == []


def test_of_many_jobs_those_are_refused_that_the_queue_has_no_room_for(gated: Gated) -> None:
    worker = make(gated, n_threads=3, max_write_nbytes=2 * NBYTES)
    refused = worker.submit_all([write(0), write(1, 2 * NBYTES), write(2), write(3)])
    assert [job.job_id for job in refused] == [1, 3]
    until(lambda: sorted(gated.started) == ["w0", "w2"])  # each wakes a thread
    gated.let_through()
    assert {result.job.job_id for result in drained(worker, 2)} == {0, 2}
    assert worker.close(5) == []


def test_a_wait_for_all_ends_when_nothing_waits_or_runs(gated: Gated) -> None:
    worker = make(gated)
    worker.submit_all([read(0), read(1)])
    gated.let_through(1)
    assert worker.wait(20)
    waited = threading.Event()

    def wait() -> None:
        assert worker.wait(20, for_all=True)
        waited.set()

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: gated.started == ["r0", "r1"])
    assert not waited.is_set()
    assert worker.wait(0.001, for_all=True), "there is a result, though not of all"
    gated.let_through(1)
    assert waited.wait(20)
    thread.join()
    assert len(worker.drain()) == 2
    assert worker.close(5) == []


def test_a_job_above_the_limit_runs_alone(gated: Gated) -> None:
    worker = make(gated, n_threads=2, max_read_nbytes=1, max_write_nbytes=1)
    assert worker.submit(write(0, nbytes=50))
    assert worker.submit(read(1, nbytes=50))
    gated.let_through()
    assert {result.state for result in drained(worker, 2)} == {JobState.DONE}
    assert worker.close(5) == []


def test_a_job_that_waits_can_be_cancelled_and_one_that_runs_cannot(gated: Gated) -> None:
    worker = make(gated)
    worker.submit(read(0))
    until(lambda: gated.started == ["r0"])
    for job in (read(1), write(2), exists(3)):
        worker.submit(job)
    assert [worker.cancel(job_id) for job_id in (0, 1, 2, 3, 99)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert not worker.cancel(1)
    gated.let_through()
    results = {result.job.job_id: result for result in drained(worker, 4)}
    assert results[0].state is JobState.DONE
    assert all(results[n].state is JobState.CANCELLED for n in (1, 2, 3))
    assert worker.write_nbytes_in_flight == 0
    assert gated.started == ["r0"]
    assert worker.close(5) == []


def test_a_job_id_is_taken_until_its_job_is_settled(gated: Gated) -> None:
    worker = make(gated)
    worker.submit(read(0))
    with pytest.raises(ValueError, match="job 0"):
        worker.submit(write(0))
    gated.let_through()
    drained(worker, 1)
    assert worker.close(5) == []


def test_close_cancels_what_waits_and_ends_all_threads(gated: Gated) -> None:
    before = storage_threads()
    worker = make(gated, n_threads=2)
    for job_id in range(2):
        worker.submit(read(job_id))
    until(lambda: len(gated.started) == 2)
    worker.submit(write(2))
    threading.Timer(0.05, gated.let_through).start()
    assert worker.close(20) == []
    assert storage_threads() <= before
    states = {result.job.job_id: result.state for result in worker.drain()}
    assert states == {0: JobState.DONE, 1: JobState.DONE, 2: JobState.CANCELLED}
    with pytest.raises(UseAfterClose):
        worker.submit(read(3))
    worker.check_integrity()


def test_close_is_bounded_and_names_what_a_stuck_backend_holds(
    gated: Gated, caplog: pytest.LogCaptureFixture
) -> None:
    worker = make(gated)
    stuck = read(7)
    worker.submit(stuck)
    until(lambda: gated.started == ["r7"])
    start = time.monotonic()
    assert worker.close(0.05) == [stuck]
    assert time.monotonic() - start < 10
    assert "jobs 7" in caplog.text
    assert worker.drain() == [], "its bytes may still be touched, so it has no result yet"
    gated.let_through()
    assert [result.job for result in drained(worker, 1)] == [stuck]
    assert worker.close(5) == []


STUCK = """
import time
from hicache_core.storage.base import BackendConfig, StorageBackend
from hicache_core.storage.workers.worker import StorageWorker
from hicache_core.types import BackendContext, ExistsJob

started = []

class Stuck(StorageBackend):
    name = "stuck"
    def get(self, key): time.sleep(3600)
    def exists(self, key): started.append(key); time.sleep(3600)
    def set(self, key, value): time.sleep(3600)

worker = StorageWorker(Stuck(BackendConfig(), BackendContext("0" * 16)), n_threads=1,
                       max_read_nbytes=1, max_write_nbytes=1, clock=time.monotonic)
worker.submit(ExistsJob(1, ["k"]))
while not started:
    time.sleep(0.001)
print(len(worker.close(0.05)))
"""


def test_a_stuck_backend_does_not_keep_the_interpreter_from_exiting() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


class Raises(StorageBackend):
    """Raises in every method."""

    name = "raises"

    def __init__(self, error: BaseException) -> None:
        super().__init__(BackendConfig(), CONTEXT)
        self.error = error

    def get(self, key: str) -> Buffer | None:
        raise self.error

    def exists(self, key: str) -> bool:
        raise self.error

    def set(self, key: str, value: Buffer) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [BackendTimeout("no answer in 2 s"), ZeroDivisionError("no answer in 2 s"), SystemExit()],
)
@pytest.mark.parametrize("job", [exists(1), read(1), write(1)])
def test_whatever_a_backend_raises_is_a_failed_job(error: BaseException, job: Job) -> None:
    result = run_job(Raises(error), job, time.monotonic)
    assert (result.state, result.n_pages, result.job) == (JobState.FAILED, 0, job)
    assert result.error == f"{type(error).__name__}: {error}"


class Answers(Raises):
    """Answers a read with whatever it is told."""

    def __init__(self, answer: object) -> None:
        super().__init__(ValueError())
        self.answer = answer

    def batch_get(self, keys: Sequence[str], pages: object) -> int:
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize("answer", [None, -1, 2, [True], "1", 1.0])
def test_an_answer_that_is_no_count_of_leading_pages_is_a_failure(answer: object) -> None:
    result = run_job(Answers(answer), read(1), time.monotonic)
    assert (result.state, result.n_pages) == (JobState.FAILED, 0)


def test_failures_of_one_kind_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    backend = Raises(BackendTimeout("slow"))
    worker = StorageWorker(
        backend, n_threads=1, max_read_nbytes=9, max_write_nbytes=9, clock=lambda: now[0]
    )

    def fail(job_id: int) -> None:
        worker.submit(read(job_id))
        drained(worker, 1)

    with caplog.at_level(logging.WARNING):
        fail(1)
        fail(2)
        assert [record.message for record in caplog.records] == [
            "backend raises failed a ReadJob: BackendTimeout: slow"
        ]
        backend.error = KeyError("k")
        fail(3)
        now[0] = 61.0
        fail(4)
        fail(5)
    assert len(caplog.records) == 3
    assert worker.close(5) == []


def test_many_threads_get_exactly_one_result_for_every_job() -> None:
    backend = MemoryBackend(MemoryConfig(), CONTEXT)
    backend.open()
    worker = make(backend, n_threads=4, max_read_nbytes=16, max_write_nbytes=64)
    kinds = (exists, read, write)
    accepted: list[int] = []
    lock = threading.Lock()

    def submit(start: int) -> None:
        for n in range(start, start + 200):
            if worker.submit(kinds[n % 3](n)):
                with lock:
                    accepted.append(n)
            if n % 7 == 0:
                worker.cancel(n)

    submitters = [threading.Thread(target=submit, args=(n * 1000,)) for n in range(4)]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    results = drained(worker, len(accepted))
    assert sorted(result.job.job_id for result in results) == sorted(accepted)
    assert all(result.state is not JobState.FAILED for result in results)
    assert worker.close(5) == []
    assert worker.drain() == []


class WorkerMachine(RuleBasedStateMachine):
    """Any order of calls: every accepted job is settled once, and the sums hold at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.backend = Gated()
        self.worker = make(self.backend, n_threads=2, max_read_nbytes=8, max_write_nbytes=12)
        self.next_id = 0
        self.open: set[int] = set()

    @rule(kind=st.sampled_from((exists, read, write)))
    def submit(self, kind: Callable[[int], Job]) -> None:
        job = kind(self.next_id)
        self.next_id += 1
        if self.worker.submit(job):
            self.open.add(job.job_id)
        else:
            assert isinstance(job, WriteJob)

    @precondition(lambda self: self.next_id)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.worker.cancel(data.draw(st.integers(0, self.next_id - 1)))

    @rule()
    def let_one_through(self) -> None:
        self.backend.let_through(1)

    @rule()
    def drain(self) -> None:
        for result in self.worker.drain():
            self.open.remove(result.job.job_id)

    @invariant()
    def sums_hold(self) -> None:
        self.worker.check_integrity()

    def teardown(self) -> None:
        self.backend.let_through()
        assert self.worker.close(20) == []
        self.drain()
        assert not self.open
        assert self.worker.n_in_flight == 0


TestWorkerMachine = WorkerMachine.TestCase
TestWorkerMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_without_any_thread_jobs_fail_at_once_and_later_ones_run(gated: Gated) -> None:
    worker = make(gated)
    gated.let_through()
    with no_threads("hicache-storage"):
        assert worker.submit_all([exists(0), read(1), write(2)]) == []
        results = drained(worker, 3)
    assert {result.state for result in results} == {JobState.FAILED}
    assert all("can't start new thread" in result.error for result in results)
    assert gated.started == []
    worker.submit(read(3))
    assert drained(worker, 1)[0].state is JobState.DONE
    assert worker.close(5) == []


def test_the_threads_that_run_do_the_work_of_those_that_cannot_start(gated: Gated) -> None:
    worker = make(gated, n_threads=3)
    worker.submit(read(0))
    until(lambda: gated.started == ["r0"])
    with no_threads("hicache-storage"):
        worker.submit_all([read(1), write(2)])
    gated.let_through()
    assert {result.state for result in drained(worker, 3)} == {JobState.DONE}
    assert worker.close(5) == []
