"""Quarantine: host pages of a read that was given up, which its call may still write into."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial

from hicache_core.controller.jobs import JobTable
from hicache_core.pools.allocator import PageAllocator


class Quarantine:
    """Keeps the pages of reads that delivered nothing, until no rank's call can touch them.

    An overdue read is settled with 0 pages, and its request goes on. The call in the backend goes
    on too, and may write into the pages. Only the rank whose call hangs knows that, so giving the
    pages back is a job of its own, which all ranks agree on. Owner thread only.

    Attributes:
        n_pages: host pages in quarantine.
    """

    def __init__(self, jobs: JobTable, allocator: PageAllocator) -> None:
        self._jobs = jobs
        self._allocator = allocator
        self._touched: set[int] = set()  # overdue reads of this rank whose call has not ended
        self._releases: dict[int, int] = {}  # such a read -> the job that frees its pages
        self.n_pages = 0

    def overdue(self, job_id: int) -> None:
        """Says that a read was given up while its call goes on."""
        self._touched.add(job_id)

    def ended(self, job_id: int) -> None:
        """Says that the call of an overdue read has ended."""
        self._touched.discard(job_id)
        release_id = self._releases.pop(job_id, None)
        if release_id is not None:
            self._jobs.report(release_id, 0)

    def hold(
        self, job_id: int, pages: array[int], free: Callable[[array[int]], None] | None = None
    ) -> None:
        """Takes the pages of a settled read that delivered nothing; frees them when it is safe.

        Args:
            job_id: of the read.
            pages: where it wrote.
            free: frees units of a group; by default, ``pages`` are of the host pool, and counted.
        """
        if free is None:
            self.n_pages += len(pages)
        release_id = self._jobs.add(partial(self._free, pages, free))
        if job_id in self._touched:
            self._releases[job_id] = release_id
        else:
            self._jobs.report(release_id, 0)

    def _free(self, pages: array[int], free: Callable[[array[int]], None] | None, _: int) -> None:
        if free is not None:
            free(pages)
            return
        self.n_pages -= len(pages)
        self._allocator.free(pages)
