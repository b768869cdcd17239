"""Host pages that a read gave up but may still write into: out of use until it has ended."""

from __future__ import annotations

from array import array
from functools import partial

from hicache_core.controller.jobs import JobTable
from hicache_core.pools.allocator import PageAllocator


class Quarantine:
    """Keeps the pages of reads that gave nothing, until no rank's call can touch them.

    A read that is overdue is settled with 0 pages, and its request goes on; the call in the backend
    goes on too, and may write into the pages. Which rank's call hangs is known to that rank alone,
    so giving the pages back is a job of its own, that all ranks agree on. Owner thread only.
    """

    def __init__(self, jobs: JobTable, allocator: PageAllocator) -> None:
        self._jobs = jobs
        self._allocator = allocator
        self._touched: set[int] = set()  # overdue reads of this rank whose call has not ended
        self._releases: dict[int, int] = {}  # such a read -> the job that frees its pages
        self.n_pages = 0

    def overdue(self, job_id: int) -> None:
        """A read was given up while its call goes on."""
        self._touched.add(job_id)

    def ended(self, job_id: int) -> None:
        """That call has ended."""
        self._touched.discard(job_id)
        release_id = self._releases.pop(job_id, None)
        if release_id is not None:
            self._jobs.report(release_id, 0)

    def hold(self, job_id: int, pages: array[int]) -> None:
        """Takes the pages of a settled read that gave nothing; frees them once that is safe."""
        self.n_pages += len(pages)
        release_id = self._jobs.add(partial(self._free, pages))
        if job_id in self._touched:
            self._releases[job_id] = release_id
        else:
            self._jobs.report(release_id, 0)

    def _free(self, pages: array[int], _: int) -> None:
        self.n_pages -= len(pages)
        self._allocator.free(pages)
