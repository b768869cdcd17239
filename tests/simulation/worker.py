"""The storage worker under virtual time: the same jobs, each a task that a seed starts."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from random import Random

from hicache_core.errors import IntegrityError, UseAfterClose
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.workers.executor import Worker, run_job
from hicache_core.types import Job, JobResult, JobState, ReadJob, WriteJob
from tests.simulation.clock import InvariantBroken, Process, VirtualClock


class SimWorker(Worker):
    """Stands where ``StorageWorker`` stands: the same contract, without threads.

    Jobs start in any order, which is more than real threads do: nobody may rely on an order. Each
    runs the real ``run_job``; time passes only inside its backend. A job that runs beyond
    ``deadline_s`` is told as OVERDUE, goes on, and is told again when it ends. A question or read
    that waits as long is cancelled.

    Attributes:
        told: how many results of each state were given.
    """

    def __init__(
        self,
        backend: StorageBackend,
        clock: VirtualClock,
        process: Process,
        draw: Random,
        *,
        n_threads: int,
        max_read_nbytes: int,
        max_write_nbytes: int,
        deadline_s: float | None,
        may_write: bool = True,
    ) -> None:
        """Keeps its arguments: those of ``StorageWorker``, and

        Args:
            backend: an open backend.
            clock: the time.
            process: whose jobs these are.
            draw: decides when a job starts, and which.
            n_threads: at most so many jobs run at once, overdue ones aside.
            max_read_nbytes: bytes of reads that run at once.
            max_write_nbytes: bytes of writes that wait or run.
            deadline_s: when a running job is overdue; never, if None.
            may_write: False for a rank whose bytes another rank stores.
        """
        self._backend = backend
        self._virtual = clock
        self._process = process
        self._draw = draw
        self._n_threads = n_threads
        self._max_read_nbytes = max_read_nbytes
        self._max_write_nbytes = max_write_nbytes
        self._deadline_s = deadline_s
        self._may_write = may_write
        self._waiting: dict[int, Job] = {}
        self._running: dict[int, Job] = {}
        self._late: set[int] = set()  # those that run and were told as OVERDUE
        self._results: deque[JobResult] = deque()
        self.told: Counter[JobState] = Counter()
        self._closed = False
        self._n_accepted = 0
        self._n_settled = 0

    @property
    def n_in_flight(self) -> int:
        # docstring inherited
        return self._n_accepted - self._n_settled

    @property
    def n_overdue(self) -> int:
        # docstring inherited
        return len(self._late)

    @property
    def overdue_nbytes(self) -> int:
        # docstring inherited
        late = [job for job_id, job in self._running.items() if job_id in self._late]
        return _nbytes(late, ReadJob) + _nbytes(late, WriteJob)

    @property
    def read_nbytes_in_flight(self) -> int:
        # docstring inherited
        return _nbytes(self._running.values(), ReadJob)

    @property
    def write_nbytes_in_flight(self) -> int:
        # docstring inherited
        return _nbytes([*self._running.values(), *self._waiting.values()], WriteJob)

    @property
    def depths(self) -> Mapping[str, int]:
        # docstring inherited
        waiting = self._waiting.values()
        n_reads = sum(isinstance(job, ReadJob) for job in waiting)
        n_writes = sum(isinstance(job, WriteJob) for job in waiting)
        n_questions = len(self._waiting) - n_reads - n_writes
        return {"exists": n_questions, "read": n_reads, "write": n_writes}

    def submit(self, job: Job) -> bool:
        # docstring inherited
        if self._closed:
            raise UseAfterClose("the storage worker is closed and accepts no jobs")
        if job.job_id in self._running or job.job_id in self._waiting:
            raise ValueError(f"job {job.job_id} was already submitted")
        if isinstance(job, WriteJob):
            if not self._may_write:
                raise InvariantBroken(f"one writer: job {job.job_id} stores what another rank does")
            used = self.write_nbytes_in_flight
            if used and used + job.nbytes > self._max_write_nbytes:
                return False
        self._waiting[job.job_id] = job
        self._n_accepted += 1
        if self._deadline_s is not None and not isinstance(job, WriteJob):
            self._process.after(self._deadline_s, partial(self._waited_too_long, job))
        self._process.after(self._draw.choice((0.0, 0.0, 0.005, 0.5)), self._start)
        return True

    def cancel(self, job_id: int) -> bool:
        # docstring inherited
        job = self._waiting.pop(job_id, None)
        if job is None:
            return False
        self._settle(JobResult(job, JobState.CANCELLED, 0))
        return True

    def drain(self) -> list[JobResult]:
        # docstring inherited
        results = list(self._results)
        self._results.clear()
        return results

    def wait(self, timeout_s: float, *, for_all: bool = False) -> bool:
        # docstring inherited
        def has_come() -> bool:
            on_time = self._running.keys() - self._late
            return bool(self._results) and not (for_all and (self._waiting or on_time))

        self._virtual.run_until(has_come, timeout_s)
        return bool(self._results)

    def close(self, timeout_s: float) -> list[Job]:
        # docstring inherited
        self._closed = True
        for job_id in list(self._waiting):
            self.cancel(job_id)
        self._virtual.run_until(lambda: not self._running, timeout_s)
        return list(self._running.values())

    def check_integrity(self) -> None:
        # docstring inherited
        n_known = len(self._waiting) + len(self._running) + self._n_settled
        if n_known != self._n_accepted:
            raise IntegrityError(f"{self._n_accepted} jobs accepted, but {n_known} known")

    def unfinished(self) -> Iterator[Job]:
        """Jobs whose final result has not been drained: nobody else may touch their bytes."""
        yield from self._waiting.values()
        yield from self._running.values()
        yield from (r.job for r in self._results if r.state is not JobState.OVERDUE)

    def _start(self) -> None:
        """Starts a job that may start, any of them."""
        if len(self._running) - len(self._late) >= self._n_threads:
            return
        startable = [job for job in self._waiting.values() if self._has_room(job)]
        if startable:
            job = self._draw.choice(startable)
            self._running[job.job_id] = self._waiting.pop(job.job_id)
            if self._deadline_s is not None:
                self._process.after(self._deadline_s, partial(self._overdue, job))
            self._process.spawn(partial(self._run, job))

    def _has_room(self, job: Job) -> bool:
        used = self.read_nbytes_in_flight
        return (
            not isinstance(job, ReadJob) or not used or used + job.nbytes <= self._max_read_nbytes
        )

    def _run(self, job: Job) -> None:
        result = run_job(self._backend, job, lambda: self._virtual.now)
        del self._running[job.job_id]
        self._late.discard(job.job_id)
        self._settle(result)
        self._start_later()

    def _overdue(self, job: Job) -> None:
        if self._running.get(job.job_id) is job and self._deadline_s is not None:
            self._late.add(job.job_id)
            self._tell(JobResult(job, JobState.OVERDUE, 0, elapsed_s=self._deadline_s))
            self._start_later()

    def _waited_too_long(self, job: Job) -> None:
        if self._waiting.get(job.job_id) is job:
            self.cancel(job.job_id)

    def _start_later(self) -> None:
        if self._waiting:
            self._process.after(0.0, self._start)

    def _settle(self, result: JobResult) -> None:
        self._n_settled += 1
        self._tell(result)

    def _tell(self, result: JobResult) -> None:
        self.told[result.state] += 1
        self._results.append(result)


def _nbytes(jobs: Iterable[Job], kind: type[ReadJob | WriteJob]) -> int:
    return sum(job.nbytes for job in jobs if isinstance(job, kind))
