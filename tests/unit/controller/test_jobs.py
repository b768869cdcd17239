"""The table of jobs: settled once, in order, by what all ranks say, in one fixed shape."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.controller.jobs import NOT_REPORTED, JobTable
from hicache_core.controller.quarantine import Quarantine
from hicache_core.copies.base import Ticket
from hicache_core.errors import IntegrityError
from hicache_core.pools.allocator import PageAllocator
from hicache_core.ranks.base import RankGroup, SingleRank


class Others(RankGroup):
    """A rank whose peers say what a test wants."""

    rank = 0
    world_size = 2

    def __init__(self, window: int) -> None:
        self.window = window
        self.seen: list[list[int]] = []
        self.peer: list[int] | None = None

    def agree_min(self, values: Sequence[int]) -> list[int]:
        self.seen.append(list(values))
        peer = self.peer or list(values)
        return [min(pair) for pair in zip(values, peer, strict=True)]

    def gather(self, text: str) -> list[str]:
        return [text, text]


class Done(Ticket):
    """A copy that has ended."""

    error = None

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        return True

    def wait_layer(self, layer: int) -> None:
        pass


def test_a_job_settles_once_with_the_least_number_of_any_rank() -> None:
    ranks = Others(window=9)
    jobs, settled = JobTable(ranks), []
    jobs.report(jobs.add(settled.append), 7)
    ranks.peer = [1] + [NOT_REPORTED] * 4 + [3] + [NOT_REPORTED] * 3  # copies, writes: two slots
    for settle, n_pages in jobs.agree().settled:
        settle(n_pages)
    assert settled == [3]
    ranks.peer = None
    assert jobs.agree().settled == []
    assert jobs.n_jobs == 0


def test_a_rank_that_is_late_keeps_a_job_open_and_a_later_one_settles() -> None:
    ranks = Others(window=9)
    jobs = JobTable(ranks)
    first, second = jobs.add(lambda _: None), jobs.add(lambda _: None)
    jobs.report(second, 5)
    assert [n for _, n in jobs.agree().settled] == [5]
    jobs.report(first, 4)
    assert [n for _, n in jobs.agree().settled] == [4]


@given(n_jobs=st.integers(0, 30), window=st.integers(5, 20))
def test_every_agreement_has_the_same_shape(n_jobs: int, window: int) -> None:
    ranks = Others(window)
    jobs = JobTable(ranks)
    for _ in range(n_jobs):
        jobs.report(jobs.add(lambda _: None), 1)
        jobs.add_copy(Done(), 1, lambda _: None)
    jobs.collect_copies()
    n_settled = 0
    while jobs.n_jobs:
        n_settled += len(jobs.agree().settled)
    assert n_settled == 2 * n_jobs
    assert all(len(values) == window for values in ranks.seen)


def test_copies_settle_though_the_window_is_full_of_jobs_that_hang() -> None:
    ranks = Others(window=9)
    jobs = JobTable(ranks)
    for _ in range(100):
        jobs.add(lambda _: None)
    jobs.add_copy(Done(), 3, lambda _: None)
    jobs.collect_copies()
    assert [n for _, n in jobs.agree().settled] == [3]


def test_what_a_request_waits_for_settles_though_writes_hang() -> None:
    jobs, settled = JobTable(Others(window=9)), []
    for _ in range(100):
        jobs.add_write(lambda _: None)
    jobs.report(jobs.add(settled.append), 2)
    for settle, n_pages in jobs.agree().settled:
        settle(n_pages)
    assert settled == [2]


def test_the_flag_of_the_worst_rank_counts() -> None:
    ranks = Others(window=5)
    ranks.peer = [0] + [NOT_REPORTED] * 4
    assert JobTable(ranks).agree(1).flag == 0
    assert JobTable(SingleRank()).agree(1).flag == 1


def test_reporting_twice_or_what_is_unknown_is_our_bug() -> None:
    jobs = JobTable(SingleRank())
    job_id = jobs.add(lambda _: None)
    jobs.report(job_id, 1)
    for bad in (job_id, job_id + 1):
        with pytest.raises(IntegrityError, match="reported twice, or never"):
            jobs.report(bad, 1)


def test_a_withdrawn_job_never_settles() -> None:
    jobs = JobTable(SingleRank())
    job_id = jobs.add(lambda _: pytest.fail("settled"))
    jobs.report(job_id, 1)
    jobs.withdraw(job_id)
    assert jobs.agree().settled == []


def settle_all(jobs: JobTable) -> None:
    for settle, n_pages in jobs.agree().settled:
        settle(n_pages)


def test_pages_of_an_overdue_read_are_free_only_when_its_call_has_ended() -> None:
    jobs, allocator = JobTable(SingleRank()), PageAllocator(8)
    quarantine = Quarantine(jobs, allocator)
    pages = allocator.allocate(3)
    quarantine.overdue(17)
    quarantine.hold(17, pages)
    settle_all(jobs)
    assert (allocator.n_free, quarantine.n_pages) == (5, 3)
    quarantine.ended(17)
    settle_all(jobs)
    assert (allocator.n_free, quarantine.n_pages) == (8, 0)


def test_pages_wait_for_a_call_that_hangs_on_another_rank() -> None:
    ranks = Others(window=9)
    jobs, allocator = JobTable(ranks), PageAllocator(8)
    quarantine = Quarantine(jobs, allocator)
    quarantine.hold(17, array("i", allocator.allocate(3)))
    ranks.peer = [1] + [NOT_REPORTED] * 8
    settle_all(jobs)
    assert allocator.n_free == 5
    ranks.peer = None
    settle_all(jobs)
    assert allocator.n_free == 8


def test_jobs_that_are_entered_together_settle_one_by_one() -> None:
    jobs, settled = JobTable(SingleRank()), []
    reads = jobs.add_all([lambda n: settled.append(("read", n)) for _ in range(2)])
    writes = jobs.add_writes([lambda n: settled.append(("write", n)) for _ in range(2)])
    assert [*reads, *writes] == [0, 1, 2, 3]
    for job_id in (writes[1], reads[0]):
        jobs.report(job_id, job_id)
    for settle, n_pages in jobs.agree().settled:
        settle(n_pages)
    assert settled == [("read", 0), ("write", 3)]
    assert jobs.n_jobs == 2


def test_jobs_that_are_reported_together_are_checked_one_by_one() -> None:
    jobs, settled = JobTable(SingleRank()), []
    first, second = jobs.add_all([settled.append] * 2)
    jobs.report_all([(second, 2), (first, 1)])
    for settle, n_pages in jobs.agree().settled:
        settle(n_pages)
    assert settled == [1, 2]
    third = jobs.add(settled.append)
    with pytest.raises(IntegrityError, match=f"job {third} was reported twice"):
        jobs.report_all([(third, 0), (third, 0)])
