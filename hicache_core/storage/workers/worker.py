"""Threads that run storage jobs, and the deadlines of those jobs."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hicache_core.errors import IntegrityError, UseAfterClose
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.failure_log import FailureLog
from hicache_core.storage.workers.executor import Deadline, Worker, nbytes_of_job, run_job
from hicache_core.storage.workers.queue import JobQueue
from hicache_core.types import Job, JobResult, JobState, ReadJob, WriteJob

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.1
"""``wait`` checks deadlines at least this often: jobs may start while it waits."""

NEVER = float("inf")

OnResult: TypeAlias = Callable[[JobResult], None]


@dataclass(slots=True)
class _Running:
    """A job on a thread.

    Attributes:
        job: the job.
        start_s: when it started.
        due_s: when its deadline ends.
        overdue: whether its OVERDUE result was reported.
    """

    job: Job
    start_s: float
    due_s: float
    overdue: bool = False


class StorageWorker(Worker):
    """Runs jobs on threads.

    A write is refused while ``max_write_nbytes`` of writes wait or run. A read waits while
    ``max_read_nbytes`` of reads run. A single job above the limit still runs, alone. With more than
    one thread, one is never used for writes.

    A thread with an overdue job does not count: another one may start in its place, so that other
    jobs continue. When the overdue job returns, the surplus thread ends. The bytes of an overdue
    read do not count towards ``max_read_nbytes``; those of an overdue write still count. At most
    ``max_overdue`` threads are replaced. After that jobs wait, and those that wait too long are
    cancelled (see ``Worker``).

    If no further thread can be started, the existing ones do the work. If there is none, jobs fail
    at once.

    Threads start with the first jobs that need them and end in ``close``. They are daemons: a
    thread that hangs in a backend cannot be stopped and must not keep the interpreter from exiting.

    With ``on_result``, each result goes to it instead of ``drain``: on the thread that ran the job,
    or on the one that found it late or cancelled it, and without a lock. ``drain`` then only looks
    at deadlines. The final result of a job may come before the call with its OVERDUE result.
    """

    def __init__(  # noqa: PLR0913 - what a worker is made of, all by name
        self,
        backend: StorageBackend,
        *,
        n_threads: int,
        max_read_nbytes: int,
        max_write_nbytes: int,
        clock: Callable[[], float],
        deadline: Deadline | None = None,
        max_overdue: int | None = None,
        on_result: OnResult | None = None,
    ) -> None:
        """Starts no thread yet.

        Args:
            backend: an open backend.
            n_threads: maximum number of jobs that run at once, not counting overdue ones.
            max_read_nbytes: maximum number of bytes of reads that run at once.
            max_write_nbytes: maximum number of bytes of writes that wait or run.
            clock: seconds; only differences count.
            deadline: returns the seconds that a job may take; None for no limit.
            max_overdue: how many threads with overdue jobs are replaced; None for
                4 x ``n_threads``.
            on_result: gets each result. It should be short, since no job runs on its thread
                meanwhile, and must not call ``close``. If it raises, that is logged.
        """
        if min(n_threads, max_read_nbytes, max_write_nbytes) < 1:
            raise ValueError("n_threads, max_read_nbytes and max_write_nbytes must be at least 1")
        self._backend = backend
        self._n_threads = n_threads
        self._max_read_nbytes = max_read_nbytes
        self._max_write_nbytes = max_write_nbytes
        self._max_overdue = 4 * n_threads if max_overdue is None else max_overdue
        self._clock = clock
        self._deadline = deadline
        self._on_result = on_result
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # a job may be ready, or the worker was closed
        self._news = threading.Condition(self._lock)  # a result arrived
        self._quiet = threading.Condition(self._lock)  # all jobs have ended or are overdue
        self._waiting = JobQueue()
        self._wait_until: dict[int, float] = {}  # of waiting jobs that are not writes
        self._running: dict[int, _Running] = {}
        self._next_due_s = NEVER  # no deadline ends earlier
        self._results: deque[JobResult] = deque()
        self._threads: list[threading.Thread] = []
        self._n_alive = 0  # threads that will look for another job
        self._read_nbytes = 0  # of running reads that are not overdue
        self._write_nbytes = 0  # of waiting and running writes
        self._n_writing = 0  # running writes that are not overdue
        self._n_overdue = 0
        self._closed = False
        self._n_accepted = 0
        self._n_settled = 0
        self._failures = FailureLog(backend.name, clock)

    @property
    def n_in_flight(self) -> int:
        # docstring inherited
        with self._lock:
            return self._n_accepted - self._n_settled

    @property
    def depths(self) -> Mapping[str, int]:
        # docstring inherited
        with self._lock:
            return self._waiting.depths

    @property
    def read_nbytes_in_flight(self) -> int:
        # docstring inherited
        with self._lock:
            return self._read_nbytes

    @property
    def write_nbytes_in_flight(self) -> int:
        # docstring inherited
        with self._lock:
            return self._write_nbytes

    @property
    def n_overdue(self) -> int:
        # docstring inherited
        with self._lock:
            return self._n_overdue

    @property
    def overdue_nbytes(self) -> int:
        # docstring inherited
        with self._lock:
            return sum(nbytes_of_job(r.job) for r in self._running.values() if r.overdue)

    def submit(self, job: Job) -> bool:
        # docstring inherited
        return not self.submit_all([job])

    def submit_all(self, jobs: Sequence[Job]) -> list[Job]:
        # docstring inherited
        with self._lock:
            if self._closed:
                raise UseAfterClose("the storage worker is closed and accepts no jobs")
            now = self._clock()
            refused = [job for job in jobs if not self._accept(job, now)]
            self._start_threads()
            self._work.notify()  # one thread, which wakes the next: cheaper for the owner
        self._call_back()
        return refused

    def cancel(self, job_id: int) -> bool:
        # docstring inherited
        with self._lock:
            if job_id not in self._waiting:
                return False
            self._cancel(job_id)
        self._call_back()
        return True

    def drain(self) -> list[JobResult]:
        # docstring inherited
        if not self._results and self._clock() < self._next_due_s:
            return []  # without the lock, which busy threads hold; later results are seen next time
        with self._lock:
            self._look_at_deadlines()
            results = [] if self._on_result is not None else list(self._results)
            if results:
                self._results.clear()
        self._call_back()
        for result in results:
            if result.state is JobState.OVERDUE:
                self._failures.warn(result)
        return results

    def wait(self, timeout_s: float, *, for_all: bool = False) -> bool:
        # docstring inherited
        news = self._quiet if for_all else self._news

        def has_come() -> bool:
            return bool(self._results) and (not for_all or self._is_quiet())

        with self._lock:
            self._look_at_deadlines()
            while not has_come() and timeout_s > 0:
                slice_s = timeout_s
                if self._deadline is not None:
                    until_due_s = max(0.001, self._next_due_s - self._clock())
                    slice_s = min(timeout_s, until_due_s, LOOK_INTERVAL_S)
                news.wait_for(has_come, slice_s)
                timeout_s -= slice_s
                self._look_at_deadlines()
            return bool(self._results)

    def close(self, timeout_s: float) -> list[Job]:
        # docstring inherited
        with self._lock:
            self._closed = True
            for job_id in self._waiting:
                self._cancel(job_id)
            self._work.notify_all()
        self._call_back()
        with self._lock:
            self._quiet.wait_for(lambda: not self._running, timeout_s)
            abandoned = [running.job for running in self._running.values()]
            threads = list(self._threads)
        if abandoned:
            ids = ", ".join(str(job.job_id) for job in abandoned)
            logger.warning(
                "backend %s still runs jobs %s after %.1f s; their threads are abandoned",
                self._backend.name,
                ids,
                timeout_s,
            )
            return abandoned
        for thread in threads:
            thread.join()
        return []

    def check_integrity(self) -> None:
        # docstring inherited
        with self._lock:
            n_known = len(self._waiting) + len(self._running) + self._n_settled
            if n_known != self._n_accepted:
                raise IntegrityError(f"{self._n_accepted} jobs accepted, but {n_known} known")
            running = list(self._running.values())
            on_time = [r.job for r in running if not r.overdue]
            writes = [r.job for r in running if isinstance(r.job, WriteJob)]
            found = {
                "bytes of reads": sum(j.nbytes for j in on_time if isinstance(j, ReadJob)),
                "bytes of writes": sum(j.nbytes for j in writes) + self._waiting.write_nbytes,
                "writes that run": sum(isinstance(job, WriteJob) for job in on_time),
                "overdue jobs": len(running) - len(on_time),
            }
            counted = (self._read_nbytes, self._write_nbytes, self._n_writing, self._n_overdue)
            if tuple(found.values()) != counted:
                raise IntegrityError(f"counted {counted}, found {found}")
            if not len(running) <= self._n_alive <= self._max_alive():
                raise IntegrityError(
                    f"{len(running)} jobs run, {self._n_overdue} of them overdue, "
                    f"on {self._n_alive} threads where {self._max_alive()} may be"
                )
            if not all(job_id in self._waiting for job_id in self._wait_until):
                raise IntegrityError("a job that is not waiting has a time limit for waiting")

    def _call_back(self) -> None:
        """Gives the results so far to ``on_result``, if there is one; without the lock."""
        if self._on_result is None:
            return
        while self._results:
            try:
                result = self._results.popleft()
            except IndexError:  # another thread has just taken it
                return
            if result.state is JobState.OVERDUE:
                self._failures.warn(result)
            try:
                self._on_result(result)
            except (Exception, SystemExit):  # code of others, as a backend is: this thread goes on
                logger.exception("on_result failed for job %d", result.job.job_id)

    # From here on the caller holds the lock, except for _run.

    def _accept(self, job: Job, now: float) -> bool:
        """Queues a job at ``now`` unless the write queue is full; returns whether it did."""
        if job.job_id in self._running or job.job_id in self._waiting:
            raise ValueError(f"job {job.job_id} was already submitted")
        if isinstance(job, WriteJob):
            if self._write_nbytes and self._write_nbytes + job.nbytes > self._max_write_nbytes:
                return False
            self._write_nbytes += job.nbytes
        elif self._deadline is not None:
            self._wait_until[job.job_id] = self._due(now, job)
        self._waiting.add(job)
        self._n_accepted += 1
        return True

    def _is_quiet(self) -> bool:
        return not self._waiting and len(self._running) == self._n_overdue

    def _max_alive(self) -> int:
        """Maximum number of threads, including those with overdue jobs."""
        return self._n_threads + min(self._n_overdue, self._max_overdue)

    def _start_threads(self) -> None:
        """Starts threads while all are busy and more are allowed."""
        n_wanted = min(len(self._running) + len(self._waiting), self._max_alive())
        while self._n_alive < n_wanted and not self._closed:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            name = f"hicache-storage-{self._n_alive}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system cannot start another one
                self._go_on_without(error)
                return
            self._threads.append(thread)
            self._n_alive += 1

    def _go_on_without(self, error: RuntimeError) -> None:
        """No thread can be started: if none is left to take jobs, the waiting ones fail."""
        if self._n_alive > self._n_overdue:
            return
        for job in [self._waiting.remove(job_id) for job_id in list(self._waiting)]:
            self._wait_until.pop(job.job_id, None)
            if isinstance(job, WriteJob):
                self._write_nbytes -= job.nbytes
            result = JobResult(job, JobState.FAILED, 0, f"no thread: {error}", 0.0, "NoThread")
            self._failures.warn(result)
            self._settle(result)

    def _run(self) -> None:
        """Runs jobs on a thread until ``close``, or until this thread is surplus."""
        while True:
            with self._lock:
                job = self._next_job()
                while job is None and not self._may_call_back():
                    if self._closed:
                        self._n_alive -= 1
                        return
                    self._work.wait()
                    job = self._next_job()
                if len(self._waiting):
                    self._work.notify()
            self._call_back()
            if job is None:
                continue
            result = run_job(self._backend, job, self._clock)
            if result.state is JobState.FAILED:
                self._failures.warn(result)
            with self._lock:
                self._finish(result)
                surplus = self._n_alive > self._max_alive()
                self._n_alive -= surplus
            self._call_back()
            if surplus:
                return
            del job, result  # an idle thread must not keep pages alive

    def _may_call_back(self) -> bool:
        """Returns whether there are results for ``on_result``."""
        return self._on_result is not None and bool(self._results)

    def _next_job(self) -> Job | None:
        """Removes and returns the job to start now; None if there is none."""
        self._look_at_deadlines()  # a job that has waited too long must not start
        may_write = self._n_writing < max(1, self._n_threads - 1)
        job = self._waiting.pop(self._fits, may_write=may_write)
        if job is None:
            return None
        if isinstance(job, WriteJob):
            self._n_writing += 1
        elif isinstance(job, ReadJob):
            self._read_nbytes += job.nbytes
        self._wait_until.pop(job.job_id, None)
        now = self._clock()
        self._running[job.job_id] = _Running(job, now, self._due(now, job))
        return job

    def _fits(self, job: ReadJob) -> bool:
        """Returns whether ``job`` may start beside the running reads."""
        return not self._read_nbytes or self._read_nbytes + job.nbytes <= self._max_read_nbytes

    def _due(self, now: float, job: Job) -> float:
        """Returns when the deadline of a job ends that starts, or starts to wait, at ``now``."""
        if self._deadline is None:
            return NEVER
        due_s = now + self._deadline(job)
        self._next_due_s = min(self._next_due_s, due_s)
        return due_s

    def _look_at_deadlines(self) -> None:
        """Reports jobs that have become overdue, and cancels those that have waited too long.

        Costs one look at the clock while nothing is late; otherwise it visits every job once.
        """
        if self._next_due_s == NEVER or self._clock() < self._next_due_s:
            return
        now = self._clock()
        for running in self._running.values():
            if not running.overdue and running.due_s <= now:
                self._set_overdue(running, now)
        for job_id in [job_id for job_id, due_s in self._wait_until.items() if due_s <= now]:
            self._cancel(job_id)
        left = [running.due_s for running in self._running.values() if not running.overdue]
        self._next_due_s = min([*left, *self._wait_until.values()], default=NEVER)
        self._start_threads()
        self._work.notify_all()

    def _set_overdue(self, running: _Running, now: float) -> None:
        """Reports the job as overdue: it no longer uses up a thread or bytes of reads."""
        job = running.job
        running.overdue = True
        self._n_overdue += 1
        if isinstance(job, WriteJob):
            self._n_writing -= 1
        elif isinstance(job, ReadJob):
            self._read_nbytes -= job.nbytes
        elapsed_s = now - running.start_s
        allowed_s = running.due_s - running.start_s
        error = (
            f"has run for {elapsed_s:.1f} s but may take {allowed_s:.1f} s; nobody waits for it now"
        )
        self._tell(JobResult(job, JobState.OVERDUE, 0, error, elapsed_s, "BackendTimeout"))

    def _cancel(self, job_id: int) -> None:
        """Removes a waiting job and settles it as CANCELLED."""
        job = self._waiting.remove(job_id)
        self._wait_until.pop(job_id, None)
        if isinstance(job, WriteJob):
            self._write_nbytes -= job.nbytes
        self._settle(JobResult(job, JobState.CANCELLED, 0))

    def _finish(self, result: JobResult) -> None:
        """Settles a job that ran, and wakes a thread: another job may have waited for its bytes."""
        job = result.job
        overdue = self._running.pop(job.job_id).overdue
        if isinstance(job, WriteJob):
            self._write_nbytes -= job.nbytes
            self._n_writing -= not overdue
        elif isinstance(job, ReadJob) and not overdue:
            self._read_nbytes -= job.nbytes
        self._n_overdue -= overdue
        self._settle(result)
        self._work.notify()

    def _settle(self, result: JobResult) -> None:
        self._n_settled += 1
        self._tell(result)

    def _tell(self, result: JobResult) -> None:
        self._results.append(result)
        self._news.notify_all()
        if self._is_quiet():
            self._quiet.notify_all()
