"""PageAllocator against a set, and its refusals."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hicache_core.errors import IntegrityError, PoolExhausted, SpecError
from hicache_core.pools.allocator import PageAllocator

N_PAGES = 12


class AllocatorMachine(RuleBasedStateMachine):
    """Any order of calls, right and wrong, against a set of the pages in use."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(N_PAGES)
        self.used: set[int] = set()

    @rule(n=st.integers(0, N_PAGES + 2))
    def allocate(self, n: int) -> None:
        if n > N_PAGES - len(self.used):
            with pytest.raises(PoolExhausted, match=f"{n} pages asked"):
                self.allocator.allocate(n)
            return
        pages = self.allocator.allocate(n)
        assert len(set(pages)) == n
        assert self.used.isdisjoint(pages)
        assert all(0 <= page < N_PAGES for page in pages)
        self.used.update(pages)

    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(range(N_PAGES)), unique=True))
        if self.used.issuperset(pages):
            self.allocator.free(pages)
            self.used.difference_update(pages)
        else:
            with pytest.raises(IntegrityError, match="free already"):
                self.allocator.free(pages)

    @rule(data=st.data(), foreign=st.sampled_from([-1, -N_PAGES, N_PAGES, 2**40]))
    def free_foreign(self, data: st.DataObject, foreign: int) -> None:
        pages = data.draw(st.permutations([*self.used, foreign]))
        with pytest.raises(IntegrityError, match="do not exist in a pool of 12 pages"):
            self.allocator.free(pages)

    @rule(data=st.data())
    def free_one_twice_in_a_call(self, data: st.DataObject) -> None:
        if self.used:
            page = data.draw(st.sampled_from(sorted(self.used)))
            with pytest.raises(IntegrityError, match="named twice"):
                self.allocator.free([*self.used, page])

    @invariant()
    def every_page_is_free_or_used(self) -> None:
        self.allocator.check_integrity()
        assert self.allocator.n_free == N_PAGES - len(self.used)
        assert self.allocator._in_use() == self.used


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_fresh_pool_gives_neighbouring_pages() -> None:
    allocator = PageAllocator(8)
    assert list(allocator.allocate(3)) == [0, 1, 2]
    assert list(allocator.allocate(2)) == [3, 4]


def test_pages_freed_last_are_given_first_in_the_same_order() -> None:
    allocator = PageAllocator(8)
    first, second = allocator.allocate(3), allocator.allocate(3)
    allocator.free(second)
    allocator.free(first)
    assert allocator.allocate(3) == first


def test_page_ids_are_32_bit_and_can_be_read_as_a_buffer() -> None:
    pages = PageAllocator(8).allocate(3)
    assert memoryview(pages).format == "i"
    assert memoryview(pages).nbytes == 12


@pytest.mark.parametrize("n_pages", [0, -1, 2**31])
def test_a_pool_needs_pages_that_an_id_can_name(n_pages: int) -> None:
    with pytest.raises(SpecError):
        PageAllocator(n_pages)


def test_a_negative_number_of_pages_takes_nothing() -> None:
    allocator = PageAllocator(4)
    with pytest.raises(PoolExhausted):
        allocator.allocate(-1)
    assert allocator.n_free == 4


def test_check_integrity_finds_lost_doubled_and_shared_pages() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(2)
    lost = PageAllocator(4)
    lost._free.pop()
    with pytest.raises(IntegrityError, match="lost"):
        lost.check_integrity()
    doubled = PageAllocator(4)
    doubled._free.append(0)
    with pytest.raises(IntegrityError, match="more than once"):
        doubled.check_integrity()
    allocator._free.append(1)
    with pytest.raises(IntegrityError, match="free and in use"):
        allocator.check_integrity()
