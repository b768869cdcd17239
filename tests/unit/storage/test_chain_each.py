"""Rules of a chain that is asked for each page: one question a link, whatever gaps there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hicache_core.errors import BackendError, BackendTimeout, BackendUnavailable, BreakerOpen
from tests.unit.storage.virtual import Clock, MakeChain, TellsEach, blank, content, filled, key

KEYS = [key(n) for n in range(8)]
ERRORS = [BackendUnavailable("gone"), BackendTimeout("late"), BreakerOpen("open")]


def hold(store: TellsEach, *numbers: int) -> None:
    store.objects = {KEYS[n]: content(KEYS[n]) for n in numbers}


@pytest.fixture
def each_stores() -> list[TellsEach]:
    return [TellsEach(Clock()) for _ in range(3)]


def test_each_link_is_asked_once_for_the_keys_that_those_before_it_lack(
    each_stores: list[TellsEach], make: MakeChain
) -> None:
    hold(each_stores[0], 1, 4)
    hold(each_stores[1], 1, 2, 6)
    hold(each_stores[2], 0, 4)
    chain = make(each_stores, promote=False)
    expected = [n in (0, 1, 2, 4, 6) for n in range(8)]
    assert list(chain.exists_each(KEYS)) == expected
    assert [list(store.asked) for store in each_stores[1:]] == [
        [KEYS[n] for n in (0, 2, 3, 5, 6, 7)],
        [KEYS[n] for n in (0, 3, 5, 7)],
    ]
    pages = blank(8)
    assert list(chain.get_each(KEYS, pages)) == expected
    for n, is_there in enumerate(expected):
        assert not is_there or pages[n] == filled(KEYS)[n]
    assert [store.n_calls for store in each_stores] == [2, 2, 2]
    assert list(chain.exists_each([KEYS[4], KEYS[1]])) == [True, True]
    assert [store.n_calls for store in each_stores] == [3, 2, 2]
    assert (list(chain.exists_each([])), list(chain.get_each([], []))) == ([], [])


def test_pages_behind_gaps_are_promoted_from_the_link_that_had_them(
    each_stores: list[TellsEach], make: MakeChain
) -> None:
    hold(each_stores[0], 3)
    hold(each_stores[1], 1)
    hold(each_stores[2], 1, 3, 5, 7)
    chain = make(each_stores)
    pages = blank(8)
    assert list(chain.get_each(KEYS, pages)) == [n % 2 == 1 for n in range(8)]
    for page in pages:
        page[0][:] = b"reused!!"
    chain.settle()
    assert each_stores[0].objects == {KEYS[n]: content(KEYS[n]) for n in (1, 3, 5, 7)}
    assert sorted(each_stores[1].objects) == [KEYS[n] for n in (1, 5, 7)]


def test_a_page_of_each_is_stored_if_every_link_that_answers_has_it(
    each_stores: list[TellsEach], make: MakeChain
) -> None:
    hold(each_stores[0], 0, 1)
    hold(each_stores[1], 5)
    each_stores[0].room = 3
    each_stores[2].always = BackendUnavailable("gone")
    chain = make(each_stores)
    mask = [n in (0, 1, 2) for n in range(8)]
    assert list(chain.set_each(KEYS, filled(KEYS))) == mask
    assert sorted(each_stores[1].objects) == KEYS
    each_stores[1].room = 0
    each_stores[1].objects.clear()
    hold(each_stores[1], 2, 6)
    assert list(chain.set_each(KEYS, filled(KEYS))) == [n == 2 for n in range(8)]


def test_copies_behind_a_page_without_room_are_stored(
    each_stores: list[TellsEach], make: MakeChain
) -> None:
    hold(each_stores[1], 5)
    each_stores[1].room = 1
    chain = make(each_stores[:2], write="behind")
    assert list(chain.set_each(KEYS, filled(KEYS))) == [True] * 8
    assert not chain.flush(20)
    counts = chain.copy_counts()
    assert (counts["middle_behind_pages"], counts["middle_behind_dropped_pages"]) == (1, 7)


@pytest.mark.parametrize("error", ERRORS)
def test_a_dead_link_answers_for_no_key_and_all_dead_ones_raise(
    each_stores: list[TellsEach], make: MakeChain, error: BackendError
) -> None:
    hold(each_stores[2], 2, 4)
    for store in each_stores[:2]:
        store.always = error
    chain = make(each_stores)
    mask = [n in (2, 4) for n in range(8)]
    assert list(chain.exists_each(KEYS)) == mask
    assert list(chain.get_each(KEYS, blank(8))) == mask
    assert list(chain.set_each(KEYS, filled(KEYS))) == [True] * 8
    each_stores[2].always = error
    calls: list[Callable[[], object]] = [
        lambda: chain.exists_each(KEYS),
        lambda: chain.get_each(KEYS, blank(8)),
        lambda: chain.set_each(KEYS, filled(KEYS)),
    ]
    for call in calls:
        with pytest.raises(type(error), match="chain: "):
            call()


def test_a_link_that_does_not_answer_for_each_key_is_an_error(
    each_stores: list[TellsEach], make: MakeChain
) -> None:
    each_stores[1].exists_each = lambda _: [True]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="middle answered for 1 of 8 pages"):
        make(each_stores).exists_each(KEYS)


def test_a_chain_bounds_its_calls_if_every_link_does(
    each_stores: list[TellsEach], make: MakeChain
) -> None:
    chain = make(each_stores)
    for bounding in range(3):
        assert not chain.bounds_calls()
        each_stores[bounding].bounds_calls = lambda: True  # type: ignore[method-assign]
    assert chain.bounds_calls()
