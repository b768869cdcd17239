"""Storage: which pages a store has, and a worker whose jobs take time and move no bytes."""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush

from hicache_core.errors import IntegrityError
from hicache_core.fleet.links import Clock, Link
from hicache_core.fleet.setting import StorageProfile
from hicache_core.kv.keys import DIGEST_NBYTES, PageKeys
from hicache_core.storage.workers.executor import Worker
from hicache_core.types import ExistsJob, Job, JobResult, JobState, ReadJob, WriteJob

MAX_WRITE_NBYTES = 1 << 30
"""Bytes of writes that wait or run; further ones are dropped, as by default in a real cache."""

_WORDS = DIGEST_NBYTES // 8


class Store:
    """The pages of a store that all servers share, by name; the least recently used leaves first.

    A page counts from the moment when its write has ended. Its name is the first 8 bytes of its
    digest.

    Attributes:
        link: what all servers read and write goes through it.
        n_evicted: pages that left for want of room.
    """

    def __init__(self, max_pages: int | None, nbytes_per_s: float) -> None:
        """An empty store of ``max_pages`` pages, or without a limit if that is None."""
        self.link = Link(nbytes_per_s)
        self.n_evicted = 0
        self._max_pages = max_pages
        self._since_s: OrderedDict[int, float] = OrderedDict()

    @property
    def n_pages(self) -> int:
        """Pages that it has."""
        return len(self._since_s)

    def n_leading(self, names: Sequence[int], at_s: float) -> int:
        """How many leading pages it has at ``at_s``."""
        since_s = self._since_s
        for n, name in enumerate(names):
            if since_s.get(name, math.inf) > at_s:
                return n
        return len(names)

    def read(self, names: Sequence[int], at_s: float) -> int:
        """As ``n_leading``, and counts as a use of these pages."""
        n = self.n_leading(names, at_s)
        for name in names[:n]:
            self._since_s.move_to_end(name)
        return n

    def n_new(self, names: Sequence[int]) -> int:
        """How many pages it does not have."""
        return sum(name not in self._since_s for name in names)

    def write(self, names: Sequence[int], at_s: float) -> None:
        """Has these pages from ``at_s`` on, and uses those that it has already."""
        for name in names:
            self._since_s.setdefault(name, at_s)
            self._since_s.move_to_end(name)
        while self._max_pages is not None and len(self._since_s) > self._max_pages:
            self._since_s.popitem(last=False)
            self.n_evicted += 1


def names_of(keys: Sequence[str]) -> Sequence[int]:
    """A number for each key of a job."""
    assert isinstance(keys, PageKeys)  # as a cache without groups of layers makes them
    return array("Q", keys.digests)[::_WORDS]


class TimedWorker(Worker):
    """Stands where ``StorageWorker`` stands: the same contract, without threads and bytes.

    Questions start before reads, and reads before writes; ``n_threads`` of them run at once. No
    call fails, and none is late.

    Attributes:
        reads: the link from storage to this server.
        writes: the link from this server to storage.
    """

    def __init__(
        self, clock: Clock, store: Store, profile: StorageProfile, page_nbytes: int, n_threads: int
    ) -> None:
        """Keeps its arguments.

        Args:
            clock: of the server.
            store: what it reads and writes.
            profile: how fast that is.
            page_nbytes: bytes of a page.
            n_threads: calls that run at once.
        """
        self.reads = Link(profile.read_nbytes_per_s)
        self.writes = Link(profile.write_nbytes_per_s)
        self._clock = clock
        self._store = store
        self._profile = profile
        self._page_nbytes = page_nbytes
        self._n_threads = n_threads
        self._waiting: tuple[deque[Job], deque[Job], deque[Job]] = (deque(), deque(), deque())
        self._running: list[tuple[float, int, float, Job]] = []  # end, job id, start: a heap
        self._results: list[JobResult] = []
        self._n_accepted = self._n_settled = 0

    @property
    def next_s(self) -> float:
        """When the next job ends; 0 if one has that nobody knows of, infinite if none runs."""
        if self._results:
            return 0.0
        return self._running[0][0] if self._running else math.inf

    @property
    def n_in_flight(self) -> int:
        # docstring inherited
        return self._n_accepted - self._n_settled

    @property
    def read_nbytes_in_flight(self) -> int:
        # docstring inherited
        return sum(self._nbytes(job) for *_, job in self._running if isinstance(job, ReadJob))

    @property
    def write_nbytes_in_flight(self) -> int:
        # docstring inherited
        running = [job for *_, job in self._running if isinstance(job, WriteJob)]
        return sum(map(self._nbytes, [*running, *self._waiting[2]]))

    @property
    def n_overdue(self) -> int:
        # docstring inherited
        return 0

    @property
    def overdue_nbytes(self) -> int:
        # docstring inherited
        return 0

    @property
    def depths(self) -> Mapping[str, int]:
        # docstring inherited
        return dict(zip(("exists", "read", "write"), map(len, self._waiting), strict=True))

    def submit(self, job: Job) -> bool:
        # docstring inherited
        self._run_until_now()
        if isinstance(job, WriteJob):
            used = self.write_nbytes_in_flight
            if used and used + self._nbytes(job) > MAX_WRITE_NBYTES:
                return False
        self._n_accepted += 1
        self._waiting[_rank(job)].append(job)
        self._start(self._clock.now)
        return True

    def cancel(self, job_id: int) -> bool:
        # docstring inherited
        self._run_until_now()
        for waiting in self._waiting:
            for job in waiting:
                if job.job_id == job_id:
                    waiting.remove(job)
                    self._settle(JobResult(job, JobState.CANCELLED, 0))
                    return True
        return False

    def drain(self) -> list[JobResult]:
        # docstring inherited
        self._run_until_now()
        results, self._results = self._results, []
        return results

    def wait(self, timeout_s: float, *, for_all: bool = False) -> bool:
        # docstring inherited
        end_s = self._clock.now + timeout_s
        self._run_until_now()
        while self._running and (for_all or not self._results) and self._running[0][0] <= end_s:
            self._clock.reach(self._running[0][0])
            self._run_until_now()
        if not self._results:
            self._clock.reach(end_s)
        return bool(self._results)

    def close(self, timeout_s: float) -> list[Job]:
        # docstring inherited
        for waiting in self._waiting:
            for job in list(waiting):
                self.cancel(job.job_id)
        self.wait(timeout_s, for_all=True)
        return [job for *_, job in self._running]

    def check_integrity(self) -> None:
        # docstring inherited
        n_known = sum(map(len, self._waiting)) + len(self._running) + self._n_settled
        if n_known != self._n_accepted:
            raise IntegrityError(f"{self._n_accepted} jobs accepted, but {n_known} known")

    def _nbytes(self, job: Job) -> int:
        return len(job.keys) * self._page_nbytes

    def _run_until_now(self) -> None:
        """Ends the jobs that have ended by now, and starts others as soon as one ends."""
        while self._running and self._running[0][0] <= self._clock.now:
            end_s, _, start_s, job = heappop(self._running)
            self._settle(self._ended(job, start_s, end_s))
            self._start(end_s)

    def _start(self, at_s: float) -> None:
        """Starts as many waiting jobs as there are threads."""
        for waiting in self._waiting:
            while waiting and len(self._running) < self._n_threads:
                job = waiting.popleft()
                heappush(self._running, (self._end_s(job, at_s), job.job_id, at_s, job))

    def _end_s(self, job: Job, at_s: float) -> float:
        """When a job ends that starts at ``at_s``."""
        if isinstance(job, ExistsJob):
            return at_s + self._profile.question_s
        n_pages, own = len(job.keys), self.reads
        if isinstance(job, WriteJob):  # a page that storage has is not sent again
            n_pages, own = self._store.n_new(names_of(job.keys)), self.writes
        nbytes = n_pages * self._page_nbytes
        moved_s = max(own.take(at_s, nbytes), self._store.link.take(at_s, nbytes))
        return moved_s + self._profile.latency_s + n_pages * self._profile.page_s

    def _ended(self, job: Job, start_s: float, end_s: float) -> JobResult:
        names, n_pages = names_of(job.keys), len(job.keys)
        if isinstance(job, ExistsJob):
            n_pages = self._store.n_leading(names, end_s)
        elif isinstance(job, ReadJob):
            n_pages = self._store.read(names, end_s)
        else:
            self._store.write(names, end_s)
        return JobResult(job, JobState.DONE, n_pages, elapsed_s=end_s - start_s)

    def _settle(self, result: JobResult) -> None:
        self._n_settled += 1
        self._results.append(result)


def _rank(job: Job) -> int:
    """Jobs of a smaller rank start first."""
    return 0 if isinstance(job, ExistsJob) else 1 if isinstance(job, ReadJob) else 2
