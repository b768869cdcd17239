"""What whoever carries out storage jobs must do, on threads or in a simulation."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hicache_core.storage.base import StorageBackend
from hicache_core.types import ExistsJob, Job, JobResult, JobState, ReadJob

GIB = 2**30

Deadline: TypeAlias = Callable[[Job], float]
"""Seconds that a job may take, by its kind and its bytes."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a job may take: a part for every job, and a part for its bytes.

    Attributes:
        base_s: for every job.
        per_gib_s: for each GiB that a job reads or writes, beside ``base_s``.
    """

    base_s: float = 2.0
    per_gib_s: float = 20.0

    def __post_init__(self) -> None:
        if self.base_s <= 0 or self.per_gib_s < 0:
            raise ValueError(f"{self}: base_s must be above 0, per_gib_s at least 0")

    def for_nbytes(self, nbytes: int) -> float:
        """Seconds for a job of ``nbytes``."""
        return self.base_s + nbytes / GIB * self.per_gib_s

    def __call__(self, job: Job) -> float:
        """Seconds for ``job``; a question has no bytes."""
        return self.for_nbytes(nbytes_of_job(job))


def nbytes_of_job(job: Job) -> int:
    """Bytes that the job reads or writes; none if it is a question."""
    return 0 if isinstance(job, ExistsJob) else job.nbytes


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


class Worker(ABC):
    """Carries out storage jobs: questions first, then reads, then writes.

    Every accepted job yields exactly one final ``JobResult``. A job that runs beyond its deadline
    yields one OVERDUE result before that: nobody needs to wait for it, but the bytes that it names
    may be touched until its final result comes. A question or read that waited longer than its
    deadline is CANCELLED; a write that waits has no deadline.

    Threads: every method may be called from any thread, and none but ``wait`` and ``close`` blocks.
    """

    @property
    @abstractmethod
    def n_in_flight(self) -> int:
        """Jobs that were accepted and have no final result yet, overdue ones included."""

    @property
    @abstractmethod
    def read_nbytes_in_flight(self) -> int:
        """Bytes of the reads that run and are not overdue."""

    @property
    @abstractmethod
    def write_nbytes_in_flight(self) -> int:
        """Bytes of the writes that wait or run, overdue ones included."""

    @property
    @abstractmethod
    def n_overdue(self) -> int:
        """Jobs that run beyond their deadline, as far as ``drain`` or ``wait`` has noticed."""

    @property
    @abstractmethod
    def overdue_nbytes(self) -> int:
        """Bytes of the jobs that are overdue."""

    @property
    @abstractmethod
    def depths(self) -> Mapping[str, int]:
        """Jobs that wait for a thread, by kind: ``exists``, ``read``, ``write``."""

    @abstractmethod
    def submit(self, job: Job) -> bool:
        """Accepts a job; False if the write queue is full, and then nothing was accepted.

        Raises:
            ValueError: a job of this id is already waiting or running.
            UseAfterClose: after ``close``.
        """

    def submit_all(self, jobs: Sequence[Job]) -> list[Job]:
        """Accepts several jobs, in order; those that were not accepted. Raises as ``submit``."""
        return [job for job in jobs if not self.submit(job)]

    @abstractmethod
    def cancel(self, job_id: int) -> bool:
        """Settles a job that has not started as CANCELLED; False if it runs, or is not here."""

    @abstractmethod
    def drain(self) -> list[JobResult]:
        """The results since the last call, oldest first; never blocks. Looks at the deadlines."""

    @abstractmethod
    def wait(self, timeout_s: float, *, for_all: bool = False) -> bool:
        """Waits until there is a result to drain, OVERDUE ones too; False if there is none.

        Args:
            timeout_s: seconds.
            for_all: waits on while a job that is not overdue waits or runs.
        """

    @abstractmethod
    def close(self, timeout_s: float) -> list[Job]:
        """Takes no more jobs, cancels those that wait, and gives those that run ``timeout_s``.

        Results can still be drained afterwards. A second call waits once more.

        Returns:
            The jobs that are still running: their backend hangs. Their threads are abandoned, and
            the bytes that they name may still be touched until their results are drained.
        """

    @abstractmethod
    def check_integrity(self) -> None:
        """Every accepted job is waiting, running or settled, and in one state only.

        Raises:
            IntegrityError: it is not so.
        """
