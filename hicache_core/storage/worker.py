"""Threads that carry out storage jobs, and the order in which they do."""

from __future__ import annotations

import logging
import operator
import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from hicache_core.errors import IntegrityError, UseAfterClose
from hicache_core.storage.base import StorageBackend
from hicache_core.types import ExistsJob, Job, JobResult, JobState, ReadJob, WriteJob

logger = logging.getLogger(__name__)

READS_BEFORE_A_WRITE = 8
"""So many questions and reads may go before a write that waits: writes come last but not never."""

LOG_INTERVAL_S = 60.0
"""Failures of one kind are logged once in this time."""


def run_job(backend: StorageBackend, job: Job, clock: Callable[[], float]) -> JobResult:
    """Carries out one job; never raises, whatever the backend does.

    This is the one place of HiCache that catches every exception: a backend is foreign code, and
    the engine must outlive it. An answer that is no number of leading pages is a failure too, since
    to trust it could serve bytes that never arrived.
    """
    start = clock()
    try:
        keys = list(job.keys)  # made on this thread, if they were not made yet
        if isinstance(job, ExistsJob):
            answer = backend.batch_exists(keys)
        elif isinstance(job, ReadJob):
            answer = backend.batch_get(keys, job.pages)
        else:
            answer = backend.batch_set(keys, job.pages)
        n_pages = operator.index(answer)
        if not 0 <= n_pages <= len(job.keys):
            raise ValueError(f"answered {n_pages} pages of {len(job.keys)}")
    except (Exception, SystemExit) as exc:
        error = f"{type(exc).__name__}: {exc}"
        kind = type(exc).__name__
        return JobResult(job, JobState.FAILED, 0, error, clock() - start, kind)
    return JobResult(job, JobState.DONE, n_pages, "", clock() - start)


class StorageWorker:
    """Runs jobs on threads: questions first, then reads, then writes.

    Every accepted job yields exactly one ``JobResult``. A write is refused when
    ``max_write_nbytes`` of writes wait or run; a read waits while ``max_read_nbytes`` of reads run.
    A single job above the limit is still carried out, alone. With more than one thread, writes
    leave one thread to the reads.

    Threads: every method may be called from any thread, and none but ``wait`` and ``close`` blocks.
    Worker threads start with the jobs that need them and end in ``close``. They are daemons: a
    thread that hangs in a backend cannot be stopped, and must not keep the interpreter from
    exiting.

    Args:
        backend: an open backend.
        n_threads: at most so many jobs run at once.
        max_read_nbytes: bytes of reads that run at once.
        max_write_nbytes: bytes of writes that wait or run.
        clock: seconds; only differences count.
    """

    def __init__(
        self,
        backend: StorageBackend,
        *,
        n_threads: int,
        max_read_nbytes: int,
        max_write_nbytes: int,
        clock: Callable[[], float],
    ) -> None:
        if min(n_threads, max_read_nbytes, max_write_nbytes) < 1:
            raise ValueError("n_threads, max_read_nbytes and max_write_nbytes must be at least 1")
        self._backend = backend
        self._n_threads = n_threads
        self._max_read_nbytes = max_read_nbytes
        self._max_write_nbytes = max_write_nbytes
        self._clock = clock
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # a job may be ready, or the end has come
        self._news = threading.Condition(self._lock)  # a result arrived, or a thread ended
        self._exists: OrderedDict[int, ExistsJob] = OrderedDict()
        self._reads: OrderedDict[int, ReadJob] = OrderedDict()
        self._writes: OrderedDict[int, WriteJob] = OrderedDict()
        self._running: dict[int, Job] = {}
        self._results: deque[JobResult] = deque()
        self._threads: list[threading.Thread] = []
        self._read_nbytes = 0  # of the reads that run
        self._write_nbytes = 0  # of the writes that wait or run
        self._n_writing = 0
        self._reads_in_a_row = 0
        self._closed = False
        self._n_accepted = 0
        self._n_settled = 0
        self._logged_at: dict[str, float] = {}

    @property
    def n_in_flight(self) -> int:
        """Jobs that were accepted and have no result yet."""
        with self._lock:
            return self._n_accepted - self._n_settled

    @property
    def read_nbytes_in_flight(self) -> int:
        """Bytes of the reads that run."""
        with self._lock:
            return self._read_nbytes

    @property
    def write_nbytes_in_flight(self) -> int:
        """Bytes of the writes that wait or run."""
        with self._lock:
            return self._write_nbytes

    def submit(self, job: Job) -> bool:
        """Accepts a job; False if the write queue is full, and then nothing was accepted.

        Raises:
            ValueError: a job of this id is already waiting or running.
            UseAfterClose: after ``close``.
        """
        with self._lock:
            if self._closed:
                raise UseAfterClose("the storage worker is closed; it takes no more jobs")
            if job.job_id in self._running or self._is_waiting(job.job_id):
                raise ValueError(f"job {job.job_id} was already submitted")
            if isinstance(job, WriteJob):
                if self._write_nbytes and self._write_nbytes + job.nbytes > self._max_write_nbytes:
                    return False
                self._write_nbytes += job.nbytes
                self._writes[job.job_id] = job
            elif isinstance(job, ReadJob):
                self._reads[job.job_id] = job
            else:
                self._exists[job.job_id] = job
            self._n_accepted += 1
            self._start_thread()
            self._work.notify()
            return True

    def cancel(self, job_id: int) -> bool:
        """Settles a job that has not started as CANCELLED; False if it runs, or is not here."""
        with self._lock:
            if not self._is_waiting(job_id):
                return False
            self._cancel(job_id)
            return True

    def drain(self) -> list[JobResult]:
        """The results since the last call, oldest first; never blocks."""
        with self._lock:
            results = list(self._results)
            self._results.clear()
            return results

    def wait(self, timeout_s: float) -> bool:
        """Waits until there is a result to drain; False if there is none by then."""
        with self._lock:
            return self._news.wait_for(lambda: bool(self._results), timeout_s)

    def close(self, timeout_s: float) -> list[Job]:
        """Takes no more jobs, cancels those that wait, and gives those that run ``timeout_s``.

        Results can still be drained afterwards. A second call waits once more.

        Returns:
            The jobs that are still running: their backend hangs. Their threads are abandoned, and
            the bytes that they name may still be touched until their results are drained.
        """
        with self._lock:
            self._closed = True
            for job_id in [*self._exists, *self._reads, *self._writes]:
                self._cancel(job_id)
            self._work.notify_all()
            self._news.wait_for(lambda: not self._running, timeout_s)
            abandoned = list(self._running.values())
            threads = list(self._threads)
        if abandoned:
            ids = ", ".join(str(job.job_id) for job in abandoned)
            logger.warning(
                "backend %s still works on jobs %s after %.1f s; its threads are abandoned",
                self._backend.name,
                ids,
                timeout_s,
            )
            return abandoned
        for thread in threads:
            thread.join()
        return []

    def check_integrity(self) -> None:
        """Every accepted job is waiting, running or settled, and in one state only.

        Raises:
            IntegrityError: it is not so.
        """
        with self._lock:
            n_waiting = len(self._exists) + len(self._reads) + len(self._writes)
            n_known = n_waiting + len(self._running) + self._n_settled
            if n_known != self._n_accepted:
                raise IntegrityError(f"{self._n_accepted} jobs accepted, but {n_known} known")
            running = self._running.values()
            read_nbytes = sum(job.nbytes for job in running if isinstance(job, ReadJob))
            writes = [job for job in running if isinstance(job, WriteJob)]
            write_nbytes = sum(job.nbytes for job in [*writes, *self._writes.values()])
            if (read_nbytes, write_nbytes) != (self._read_nbytes, self._write_nbytes):
                raise IntegrityError(f"{read_nbytes} and {write_nbytes} bytes are in flight")
            if len(writes) != self._n_writing:
                raise IntegrityError(f"{len(writes)} writes run, but {self._n_writing} counted")
            if len(self._running) > self._n_threads:
                raise IntegrityError(f"{len(self._running)} jobs on {self._n_threads} threads")

    # From here on: the caller holds the lock, but for _run and _log_failure.

    def _start_thread(self) -> None:
        """Starts one more thread if all are busy and there may be more."""
        idle = len(self._threads) - len(self._running)
        n_waiting = len(self._exists) + len(self._reads) + len(self._writes)
        if idle < n_waiting and len(self._threads) < self._n_threads:
            name = f"hicache-storage-{len(self._threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _run(self) -> None:
        """What a thread does until ``close``."""
        while True:
            with self._lock:
                job = self._next_job()
                while job is None:
                    if self._closed:
                        return
                    self._work.wait()
                    job = self._next_job()
            result = run_job(self._backend, job, self._clock)
            if result.state is JobState.FAILED:
                self._log_failure(result)
            with self._lock:
                self._finish(result)
            del job, result  # an idle thread must not keep pages alive

    def _next_job(self) -> Job | None:
        """Takes the job that is to start now out of its queue."""
        may_write = bool(self._writes) and self._n_writing < max(1, self._n_threads - 1)
        job: Job
        if may_write and (self._reads_in_a_row >= READS_BEFORE_A_WRITE or not self._may_read()):
            _, job = self._writes.popitem(last=False)
            self._n_writing += 1
            self._reads_in_a_row = 0
        elif self._exists:
            _, job = self._exists.popitem(last=False)
            self._reads_in_a_row += bool(self._writes)
        elif self._may_read():
            _, job = self._reads.popitem(last=False)
            self._read_nbytes += job.nbytes
            self._reads_in_a_row += bool(self._writes)
        else:
            return None
        self._running[job.job_id] = job
        return job

    def _may_read(self) -> bool:
        """Whether a question or a read may start: a read waits for room among those that run."""
        if self._exists or not self._reads:
            return bool(self._exists)
        first = next(iter(self._reads.values()))
        return not self._read_nbytes or self._read_nbytes + first.nbytes <= self._max_read_nbytes

    def _is_waiting(self, job_id: int) -> bool:
        return job_id in self._exists or job_id in self._reads or job_id in self._writes

    def _cancel(self, job_id: int) -> None:
        """Takes a waiting job out of its queue and settles it."""
        job: Job
        if job_id in self._writes:
            job = self._writes.pop(job_id)
            self._write_nbytes -= job.nbytes
        else:
            job = self._exists.pop(job_id) if job_id in self._exists else self._reads.pop(job_id)
        self._settle(JobResult(job, JobState.CANCELLED, 0))

    def _finish(self, result: JobResult) -> None:
        """Settles a job that ran, and wakes a thread: its bytes may have kept another waiting."""
        job = result.job
        del self._running[job.job_id]
        if isinstance(job, WriteJob):
            self._write_nbytes -= job.nbytes
            self._n_writing -= 1
        elif isinstance(job, ReadJob):
            self._read_nbytes -= job.nbytes
        self._settle(result)
        self._work.notify()

    def _settle(self, result: JobResult) -> None:
        self._results.append(result)
        self._n_settled += 1
        self._news.notify_all()

    def _log_failure(self, result: JobResult) -> None:
        """Warns of a failure, unless one of its kind was logged a short while ago."""
        kind = result.error.partition(":")[0]
        now = self._clock()
        with self._lock:
            last = self._logged_at.get(kind)
            if last is not None and now - last < LOG_INTERVAL_S:
                return
            self._logged_at[kind] = now
        what = type(result.job).__name__
        logger.warning("backend %s failed a %s: %s", self._backend.name, what, result.error)
