"""The contract of a storage worker, and how one job is run."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hicache_core.storage.answers import n_leading
from hicache_core.storage.base import StorageBackend
from hicache_core.types import ExistsJob, Job, JobResult, JobState, ReadJob

GIB = 2**30

Deadline: TypeAlias = Callable[[Job], float]
"""Returns how many seconds a job may take."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a job may take: a fixed part, and a part proportional to its bytes.

    Attributes:
        base_s: seconds for every job.
        per_gib_s: seconds for each GiB that a job reads or writes, added to ``base_s``.
    """

    base_s: float = 2.0
    per_gib_s: float = 20.0

    def __post_init__(self) -> None:
        if self.base_s <= 0 or self.per_gib_s < 0:
            raise ValueError(f"{self}: base_s must be greater than 0, and per_gib_s at least 0")

    def for_nbytes(self, nbytes: int) -> float:
        """Returns the seconds for a job of ``nbytes``."""
        return self.base_s + nbytes / GIB * self.per_gib_s

    def __call__(self, job: Job) -> float:
        """Returns the seconds for ``job``."""
        nbytes = 0 if isinstance(job, ExistsJob) else job.nbytes
        return self.base_s + nbytes / GIB * self.per_gib_s


def nbytes_of_job(job: Job) -> int:
    """Returns the bytes that a job reads or writes; 0 for an ``ExistsJob``."""
    return 0 if isinstance(job, ExistsJob) else job.nbytes


def run_job(backend: StorageBackend, job: Job, clock: Callable[[], float]) -> JobResult:
    """Runs one job on ``backend``. Never raises, whatever the backend does.

    This is the one place of HiCache that catches every exception: a backend is foreign code, and
    the engine must survive it. An answer that is not a possible number of leading pages is a
    failure too: trusting it could serve bytes that never arrived.

    Args:
        backend: open; called on this thread.
        job: its keys and pages.
        clock: seconds; only differences count.
    """
    start = clock()
    try:
        keys = list(job.keys)  # lazy keys are computed on this thread
        if job.each:
            mask = _each(backend, job, keys)
            return JobResult(job, JobState.DONE, n_leading(mask), "", clock() - start, "", mask)
        if isinstance(job, ExistsJob):
            answer = backend.batch_exists(keys)
        elif isinstance(job, ReadJob):
            answer = backend.batch_get(keys, job.pages)
        else:
            answer = backend.batch_set(keys, job.pages)
        n_pages = operator.index(answer)
        if not 0 <= n_pages <= len(job.keys):
            raise ValueError(f"the backend answered {n_pages} of {len(job.keys)} pages")
    except (Exception, SystemExit) as exc:
        error = f"{type(exc).__name__}: {exc}"
        kind = type(exc).__name__
        return JobResult(job, JobState.FAILED, 0, error, clock() - start, kind)
    return JobResult(job, JobState.DONE, n_pages, "", clock() - start)


def _each(backend: StorageBackend, job: Job, keys: Sequence[str]) -> Sequence[bool]:
    """Returns the backend's answer for each page."""
    if isinstance(job, ExistsJob):
        mask = backend.exists_each(keys)
    elif isinstance(job, ReadJob):
        mask = backend.get_each(keys, job.pages)
    else:
        mask = backend.set_each(keys, job.pages)
    if len(mask) != len(keys) or not all(isinstance(one, bool) for one in mask):
        raise ValueError(f"the backend did not answer yes or no for each of {len(keys)} pages")
    return mask


class Worker(ABC):
    """Runs storage jobs: ``ExistsJob`` first, then reads, then writes.

    Every accepted job yields exactly one final ``JobResult``. A job that runs past its deadline
    yields one OVERDUE result before that. Nobody needs to wait for it then, but its pages may be
    read or written until the final result arrives. An ``ExistsJob`` or a read that waits longer
    than its deadline is CANCELLED. A waiting write has no deadline.

    Threads: every method may be called from any thread. Only ``wait`` and ``close`` block.
    """

    @property
    @abstractmethod
    def n_in_flight(self) -> int:
        """Number of accepted jobs without a final result, including overdue ones."""

    @property
    @abstractmethod
    def read_nbytes_in_flight(self) -> int:
        """Bytes of running reads that are not overdue."""

    @property
    @abstractmethod
    def write_nbytes_in_flight(self) -> int:
        """Bytes of waiting and running writes, including overdue ones."""

    @property
    @abstractmethod
    def n_overdue(self) -> int:
        """Number of jobs past their deadline, as of the last ``drain`` or ``wait``."""

    @property
    @abstractmethod
    def overdue_nbytes(self) -> int:
        """Bytes of overdue jobs."""

    @property
    @abstractmethod
    def depths(self) -> Mapping[str, int]:
        """Number of waiting jobs by kind: ``exists``, ``read``, ``write``."""

    @abstractmethod
    def submit(self, job: Job) -> bool:
        """Accepts a job; returns False if it is a write and the write queue is full.

        Raises:
            ValueError: a job with this id is already waiting or running.
            UseAfterClose: after ``close``.
        """

    def submit_all(self, jobs: Sequence[Job]) -> list[Job]:
        """Accepts jobs in order; returns those that were not accepted. Raises as ``submit``."""
        return [job for job in jobs if not self.submit(job)]

    @abstractmethod
    def cancel(self, job_id: int) -> bool:
        """Cancels a waiting job; returns False if it runs or is unknown."""

    @abstractmethod
    def drain(self) -> list[JobResult]:
        """Returns the results since the last call, oldest first. Checks deadlines; never blocks."""

    @abstractmethod
    def wait(self, timeout_s: float, *, for_all: bool = False) -> bool:
        """Blocks until there is a result to drain, including OVERDUE ones.

        Args:
            timeout_s: maximum time to block, in seconds.
            for_all: block until every job has ended or is overdue.

        Returns:
            Whether there is a result.
        """

    @abstractmethod
    def close(self, timeout_s: float) -> list[Job]:
        """Accepts no more jobs, cancels waiting ones and waits ``timeout_s`` for running ones.

        Results can still be drained afterwards. A second call waits again.

        Returns:
            The jobs that still run, since their backend hangs. Their threads are abandoned. Their
            pages may be read or written until their results are drained.
        """

    @abstractmethod
    def check_integrity(self) -> None:
        """Checks that every accepted job is either waiting, running or settled.

        Raises:
            IntegrityError: a job is lost or counted twice.
        """
