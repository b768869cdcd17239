"""Waiting storage jobs, and the order in which they start."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from hicache_core.types import ExistsJob, Job, ReadJob, WriteJob

READS_BEFORE_A_WRITE = 8
"""At most this many other jobs start before a waiting write, so that writes never starve."""


class JobQueue:
    """Jobs that have not started. ``ExistsJob`` go first, then reads, then writes.

    Threads: the caller holds the lock of the worker that owns the queue.
    """

    def __init__(self) -> None:
        self._exists: OrderedDict[int, ExistsJob] = OrderedDict()
        self._reads: OrderedDict[int, ReadJob] = OrderedDict()
        self._writes: OrderedDict[int, WriteJob] = OrderedDict()
        self._reads_in_a_row = 0

    def __len__(self) -> int:
        return len(self._exists) + len(self._reads) + len(self._writes)

    def __contains__(self, job_id: int) -> bool:
        return job_id in self._exists or job_id in self._reads or job_id in self._writes

    def __iter__(self) -> Iterator[int]:
        """Iterates over the ids of a snapshot of the waiting jobs."""
        return iter([*self._exists, *self._reads, *self._writes])

    @property
    def depths(self) -> dict[str, int]:
        """Number of waiting jobs by kind."""
        return {
            "exists": len(self._exists),
            "read": len(self._reads),
            "write": len(self._writes),
        }

    @property
    def write_nbytes(self) -> int:
        """Bytes of waiting writes."""
        return sum(job.nbytes for job in self._writes.values())

    def add(self, job: Job) -> None:
        """Appends a job to those of its kind."""
        if isinstance(job, WriteJob):
            self._writes[job.job_id] = job
        elif isinstance(job, ReadJob):
            self._reads[job.job_id] = job
        else:
            self._exists[job.job_id] = job

    def remove(self, job_id: int) -> Job:
        """Removes and returns a waiting job that will not start. Raises KeyError if unknown."""
        if job_id in self._writes:
            return self._writes.pop(job_id)
        if job_id in self._exists:
            return self._exists.pop(job_id)
        return self._reads.pop(job_id)

    def pop(self, fits: Callable[[ReadJob], bool], *, may_write: bool) -> Job | None:
        """Removes and returns the job to start now; None if none may start.

        Args:
            fits: returns whether a read may start beside those that run.
            may_write: whether a write may start.
        """
        may_read = bool(self._exists)
        if not may_read and self._reads:
            may_read = fits(next(iter(self._reads.values())))
        enough = self._reads_in_a_row >= READS_BEFORE_A_WRITE
        if self._writes and may_write and (enough or not may_read):
            self._reads_in_a_row = 0
            return self._writes.popitem(last=False)[1]
        if not may_read:
            return None
        self._reads_in_a_row += bool(self._writes)
        if self._exists:
            return self._exists.popitem(last=False)[1]
        return self._reads.popitem(last=False)[1]
