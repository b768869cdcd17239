"""The table of jobs: what is under way, what has been reported, what may be settled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hicache_core.errors import IntegrityError
from hicache_core.ranks import RankGroup
from hicache_core.transfer.base import Ticket

Settle = Callable[[int], None]
"""Called once, with the number of leading pages that all ranks agree on."""

NOT_REPORTED = -1


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy between device and host that is under way."""

    job_id: int
    ticket: Ticket
    n_pages: int


class JobTable:
    """Every job from submission to settlement; each settles exactly once. Owner thread only.

    Whether a job exists depends only on what all ranks know, so job ids agree between ranks. Ranks
    then agree on *pages for each job*: a rank that has not finished reports -1 for it, a rank that
    failed reports 0, and a job is settled when no rank says -1.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._next_id = 0
        self._settle: dict[int, Settle] = {}  # in order of job id, since ids only grow
        self._reported: dict[int, int] = {}
        self._copies: dict[int, Copy] = {}

    def add(self, settle: Settle) -> int:
        """Enters a job; its new id."""
        job_id = self._next_id
        self._next_id += 1
        self._settle[job_id] = settle
        return job_id

    def add_copy(self, ticket: Ticket, n_pages: int, settle: Settle) -> None:
        """Enters a copy; it is reported by ``collect_copies`` once its ticket is done."""
        job_id = self.add(settle)
        self._copies[job_id] = Copy(job_id, ticket, n_pages)

    def report(self, job_id: int, n_pages: int) -> None:
        """This rank is done with a job: ``n_pages`` leading pages, 0 if it failed."""
        if job_id not in self._settle or job_id in self._reported:
            raise IntegrityError(f"job {job_id} was reported twice or never submitted")
        self._reported[job_id] = n_pages

    def collect_copies(self) -> None:
        """Reports every copy whose ticket is done."""
        done = [copy for copy in self._copies.values() if copy.ticket.done()]
        for copy in done:
            del self._copies[copy.job_id]
            self.report(copy.job_id, 0 if copy.ticket.error is not None else copy.n_pages)

    @property
    def oldest_copy(self) -> Ticket | None:
        """The copy that was submitted first among those under way."""
        return next((copy.ticket for copy in self._copies.values()), None)

    @property
    def has_reports(self) -> bool:
        """Whether the next ``settled`` has something to say for this rank."""
        return bool(self._reported)

    def settled(self) -> Iterator[tuple[Settle, int]]:
        """Jobs that all ranks are done with, by id, each with the agreed number of pages.

        Enters the collective once, also with nothing to report.
        """
        window = self._ranks.window
        if window is None:
            candidates = sorted(self._reported)
            mine = [self._reported[job_id] for job_id in candidates]
        else:
            candidates = [job_id for job_id, _ in zip(self._settle, range(window), strict=False)]
            mine = [self._reported.get(job_id, NOT_REPORTED) for job_id in candidates]
            mine += [NOT_REPORTED] * (window - len(mine))
        agreed = self._ranks.agree_min(mine)
        for job_id, n_pages in zip(candidates, agreed, strict=False):
            if n_pages != NOT_REPORTED:
                del self._reported[job_id]
                yield self._settle.pop(job_id), n_pages
