"""Pages that are read ahead: room for them, and what becomes of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from hicache_core.integrations.foreign.store import Answer, OnDone
from hicache_core.integrations.vllm.fetches import MAX_WAIT_S, Fetches
from hicache_core.types import Page


class Clock:
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Memory:
    """Some pages of one byte."""

    def __init__(self, n_pages: int) -> None:
        self.pages: Sequence[Page] = [(memoryview(bytearray(1)),) for _ in range(n_pages)]


@dataclass
class Script:
    """A store that answers when the test says so."""

    asked: list[tuple[Sequence[str], OnDone]] = field(default_factory=list)
    reading: list[tuple[Sequence[str], OnDone]] = field(default_factory=list)

    def submit_exists(self, keys: Sequence[str], on_done: OnDone) -> None:
        self.asked.append((keys, on_done))

    def submit_read(self, keys: Sequence[str], pages: Sequence[Page], on_done: OnDone) -> None:
        assert len(keys) == len(pages)
        self.reading.append((keys, on_done))

    def find(self, n_present: int) -> None:
        """Answers the oldest question."""
        keys, on_done = self.asked.pop(0)
        on_done(Answer([n < n_present for n in range(len(keys))]))

    def read(self, *mask: bool) -> None:
        """Answers the oldest read; all is well without a mask."""
        keys, on_done = self.reading.pop(0)
        on_done(Answer(mask or [True] * len(keys)))


@pytest.fixture
def store() -> Script:
    return Script()


@pytest.fixture
def clock() -> Clock:
    return Clock()


Make = Callable[[int], Fetches[Memory]]


@pytest.fixture
def make(store: Script, clock: Clock) -> Make:
    return lambda max_pages: Fetches(store, Memory, max_pages=max_pages, clock=clock)


def keys(n: int) -> list[str]:
    return [str(k) for k in range(n)]


def test_what_is_present_is_read_and_held(store: Script, make: Make) -> None:
    fetches = make(10)
    fetches.start(1, keys(5))
    store.find(3)
    assert fetches.take_reports() == {}
    store.read()
    assert fetches.take_reports() == {1: 3}
    assert fetches.take_reports() == {}
    assert fetches.n_free == 7
    assert len(fetches.take(1).pages) == 3
    assert fetches.n_free == 10


def test_a_refused_page_ends_what_is_held(store: Script, make: Make) -> None:
    fetches = make(10)
    fetches.start(1, keys(4))
    store.find(4)
    store.read(True, True, False, True)
    assert fetches.take_reports() == {1: 2}


@pytest.mark.parametrize("is_first_page_refused", [False, True])
def test_a_fetch_without_pages_holds_no_room(
    store: Script, make: Make, is_first_page_refused: bool
) -> None:
    fetches = make(10)
    fetches.start(1, keys(2))
    if is_first_page_refused:
        store.find(2)
        store.read(False, True)
    else:
        store.find(0)
    assert fetches.take_reports() == {1: 0}
    assert fetches.n_free == 10
    fetches.drop(1)
    assert fetches.n_free == 10


def test_a_fetch_waits_for_room_in_order(store: Script, make: Make) -> None:
    fetches = make(4)
    for fetch_id in (1, 2, 3):
        fetches.start(fetch_id, keys(3))
        store.find(3)
    assert len(store.reading) == 1
    store.read()
    fetches.take(1)
    assert len(store.reading) == 1
    fetches.drop(2)  # while it is read: its memory stays until the call has ended
    assert len(store.reading) == 1
    store.read()
    assert len(store.reading) == 1
    store.read()
    assert fetches.take_reports() == {1: 3, 3: 3}


def test_a_fetch_longer_than_all_room_is_cut(store: Script, make: Make) -> None:
    fetches = make(4)
    fetches.start(1, keys(9))
    store.find(9)
    store.read()
    assert fetches.take_reports() == {1: 4}


def test_a_fetch_that_waits_too_long_for_room_is_given_up(
    store: Script, make: Make, clock: Clock
) -> None:
    fetches = make(4)
    for fetch_id in (1, 2):
        fetches.start(fetch_id, keys(3))
        store.find(3)
    store.read()
    clock.now = MAX_WAIT_S + 1
    assert fetches.take_reports() == {1: 3, 2: 0}
    fetches.take(1)
    assert store.reading == []


@pytest.mark.parametrize("when", ["asked", "waiting", "reading", "held"])
def test_a_dropped_fetch_is_not_reported_and_leaves_no_room_taken(
    store: Script, make: Make, when: str
) -> None:
    fetches = make(4)
    if when == "waiting":
        fetches.start(0, keys(4))
        store.find(4)
    fetches.start(1, keys(2))
    if when != "asked":
        store.find(2)
    if when == "held":
        store.read()
    fetches.drop(1)
    if when == "asked":
        store.find(2)
    elif when == "reading":
        assert fetches.n_free == 2
        store.read()
    elif when == "waiting":
        store.read()
        fetches.take(0)
        assert store.reading == []
    assert fetches.n_free == 4
    assert 1 not in fetches.take_reports()


def test_no_memory_is_a_miss(store: Script, clock: Clock) -> None:
    def none_left(n_pages: int) -> Memory:
        raise RuntimeError("no memory")

    fetches = Fetches(store, none_left, max_pages=4, clock=clock)
    fetches.start(1, keys(2))
    store.find(2)
    assert fetches.take_reports() == {1: 0}
    assert fetches.n_free == 4


def test_an_allocation_that_takes_long_holds_nobody_up(store: Script, clock: Clock) -> None:
    is_allocating, may_go_on = threading.Event(), threading.Event()

    def slow(n_pages: int) -> Memory:
        is_allocating.set()
        assert may_go_on.wait(20)
        return Memory(n_pages)

    fetches = Fetches(store, slow, max_pages=4, clock=clock)
    for fetch_id in (1, 2):
        fetches.start(fetch_id, keys(2))
    found = threading.Thread(target=store.find, args=(2,))
    found.start()
    assert is_allocating.wait(20)
    store.find(0)
    assert fetches.take_reports() == {2: 0}
    assert fetches.n_free == 2
    fetches.drop(2)
    assert found.is_alive()
    may_go_on.set()
    found.join()
    store.read()
    assert fetches.take_reports() == {1: 2}


def test_a_fetch_that_is_dropped_while_its_memory_is_allocated_is_not_read(
    store: Script, clock: Clock
) -> None:
    def dropped(n_pages: int) -> Memory:
        fetches.drop(1)
        return Memory(n_pages)

    fetches = Fetches(store, dropped, max_pages=4, clock=clock)
    fetches.start(1, keys(2))
    store.find(2)
    assert store.reading == []
    assert fetches.n_free == 4
    assert fetches.take_reports() == {}
