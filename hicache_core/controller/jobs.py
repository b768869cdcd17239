"""The table of jobs: which jobs run, what was reported of them, which may be settled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from hicache_core.copies.base import Ticket
from hicache_core.errors import IntegrityError
from hicache_core.ranks.base import RankGroup

Settle = Callable[[int], None]
"""Called once for a job, with the number of leading pages that all ranks agree on."""

NOT_REPORTED = -1


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy between device and host that has not ended."""

    job_id: int
    ticket: Ticket
    n_pages: int


@dataclass(slots=True)
class _Lane:
    """Unsettled jobs in order of id, and how many of them one agreement covers."""

    n_slots: int
    settle: dict[int, Settle] = field(default_factory=dict)

    def window(self) -> list[int]:
        return list(islice(self.settle, self.n_slots))


class Agreement(NamedTuple):
    """The result of one collective.

    Attributes:
        settled: jobs that no rank waits for any more, in order of id, each with its agreed number
            of pages.
        flag: the least of the flags that the ranks gave.
    """

    settled: list[tuple[Settle, int]]
    flag: int


class JobTable:
    """Every job from its start to its settlement; each settles exactly once. Owner thread only.

    Whether a job exists depends only on what all ranks know, so job ids agree between ranks. Ranks
    then agree on *pages for each job*: a rank that has not finished reports -1 for it, a rank that
    failed reports 0, and a job is settled when no rank says -1.

    One agreement has a fixed shape::

        | flag | copies | writes | all other jobs |      each lane: the oldest first

    Each kind has its own slots, so no kind can keep another from being settled: copies always end,
    writes may wait behind a store that hangs, and requests wait for questions, reads and timers.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._next_id = 0
        window = ranks.window
        n_slots = 0 if window is None else window - 1
        self._copy_lane = _Lane(n_slots // 4)
        self._write_lane = _Lane(n_slots // 4)
        self._lane = _Lane(n_slots - 2 * (n_slots // 4))
        self._lanes = (self._copy_lane, self._write_lane, self._lane)
        self._lane_of: dict[int, _Lane] = {}
        self._reported: dict[int, int] = {}
        self._copies: dict[int, Copy] = {}  # whose tickets are not done on this rank

    def add(self, settle: Settle) -> int:
        """Enters a job that a request may wait for; returns its new id."""
        return self._enter(self._lane, [settle])[0]

    def add_all(self, settles: Sequence[Settle]) -> Sequence[int]:
        """Enters jobs that a request may wait for; returns their new ids."""
        return self._enter(self._lane, settles)

    def add_write(self, settle: Settle) -> int:
        """Enters a write to storage; returns its new id."""
        return self._enter(self._write_lane, [settle])[0]

    def add_writes(self, settles: Sequence[Settle]) -> Sequence[int]:
        """Enters writes to storage; returns their new ids."""
        return self._enter(self._write_lane, settles)

    def add_copy(self, ticket: Ticket, n_pages: int, settle: Settle) -> None:
        """Enters a copy; ``collect_copies`` reports it once its ticket is done.

        Args:
            ticket: of the copy.
            n_pages: pages that it copies.
            settle: called when all ranks have reported it.
        """
        (job_id,) = self._enter(self._copy_lane, [settle])
        self._copies[job_id] = Copy(job_id, ticket, n_pages)

    def report(self, job_id: int, n_pages: int) -> None:
        """Says that this rank is done with a job: ``n_pages`` leading pages, 0 if it failed.

        Raises:
            IntegrityError: the job was reported before, or there is no such job.
        """
        self.report_all([(job_id, n_pages)])

    def report_all(self, reports: Sequence[tuple[int, int]]) -> None:
        """As ``report``, for several jobs: the id and the leading pages of each."""
        lane_of, reported = self._lane_of, self._reported
        for job_id, n_pages in reports:
            if job_id not in lane_of or job_id in reported:
                raise IntegrityError(f"job {job_id} was reported twice, or never entered")
            reported[job_id] = n_pages

    def withdraw(self, job_id: int) -> None:
        """Removes a job that nobody waits for any more. All ranks must withdraw it alike."""
        if job_id in self._lane_of:  # else it is being settled right now
            self._leave([(job_id, 0)])

    def collect_copies(self) -> None:
        """Reports every copy whose ticket is done."""
        if not self._copies:
            return
        done = [copy for copy in self._copies.values() if copy.ticket.done()]
        for copy in done:
            del self._copies[copy.job_id]
            self.report(copy.job_id, 0 if copy.ticket.error is not None else copy.n_pages)

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""
        return self._ranks.rank

    @property
    def n_ranks(self) -> int:
        """How many ranks agree."""
        return self._ranks.world_size

    @property
    def n_jobs(self) -> int:
        """How many jobs have not settled."""
        return len(self._lane_of)

    @property
    def n_copies(self) -> int:
        """How many copies have not settled: the same number on every rank."""
        return len(self._copy_lane.settle)

    @property
    def oldest_copy(self) -> Ticket | None:
        """The oldest copy that this rank has not seen done; None if there is none."""
        for copy in self._copies.values():
            return copy.ticket
        return None

    @property
    def has_reports(self) -> bool:
        """Whether this rank has reported a job that has not settled."""
        return bool(self._reported)

    def agree(self, flag: int = 1) -> Agreement:
        """Enters the collective once, even with nothing to report.

        Args:
            flag: any number; the least of all ranks comes back.

        Raises:
            RankLost: another rank died, or does not answer.
        """
        if self._ranks.window is None:
            ids = sorted(self._reported)
            if not ids:
                return Agreement([], self._ranks.agree_min([flag])[0])
        else:
            ids = [job_id for lane in self._lanes for job_id in _padded(lane)]
        reported = self._reported
        mine = [flag, *[reported.get(job_id, NOT_REPORTED) for job_id in ids]]
        agreed_flag, *agreed = self._ranks.agree_min(mine)
        pairs = zip(ids, agreed, strict=True)
        done = sorted([pair for pair in pairs if pair[1] != NOT_REPORTED])
        return Agreement(self._leave(done), agreed_flag)

    def _enter(self, lane: _Lane, settles: Sequence[Settle]) -> Sequence[int]:
        job_ids = range(self._next_id, self._next_id + len(settles))
        self._next_id = job_ids.stop
        lane.settle.update(zip(job_ids, settles, strict=True))
        self._lane_of.update(dict.fromkeys(job_ids, lane))
        return job_ids

    def _leave(self, done: Sequence[tuple[int, int]]) -> list[tuple[Settle, int]]:
        """Removes jobs, each given with its pages; returns what settles each, with its pages."""
        left = []
        for job_id, n_pages in done:
            self._reported.pop(job_id, None)
            left.append((self._lane_of.pop(job_id).settle.pop(job_id), n_pages))
        return left


def _padded(lane: _Lane) -> list[int]:
    """The lane's window, padded with an id that no job has."""
    window = lane.window()
    return window + [NOT_REPORTED] * (lane.n_slots - len(window))
