"""Rules about the calls that answer for each key: ``exists_each``, ``get_each``, ``set_each``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from hicache_core.testing.content import page_difference, scribble
from hicache_core.testing.features import Feature
from hicache_core.testing.harness import (
    Harness,
    each_answer,
    expect,
    expect_hit,
    is_hit,
    put_each,
)
from hicache_core.testing.rules.data import SHAPES
from hicache_core.testing.rules.rule import RuleBook

_book = RuleBook(
    *("exists_counts_leading", "get_counts_leading", "empty_batch", "same_key_twice", "re_put"),
    *("set_copies", "set_only_reads", "wrong_size_is_a_miss", "stays_in_its_page"),
)
rule = _book.rule
RULES = _book.rules
_full = RuleBook("large_batch_with_gaps", "full_store")
FULL = _full.rules

_PAGE = (64, 100)
_N_KEYS = 5


def _gaps(h: Harness) -> Iterator[tuple[list[str], list[bool]]]:
    """A few keys and which of them are stored; every choice of them, in turn."""
    for n, choice in enumerate(itertools.product((False, True), repeat=_N_KEYS)):
        keys = h.keys(_N_KEYS, f"choice {n}")
        put_each(h.backend, list(itertools.compress(keys, choice)), sum(_PAGE))
        yield keys, list(choice)


def _shown(mask: Sequence[bool]) -> str:
    """A mask as text: x for yes, a dot for no."""
    return "".join("x" if one else "." for one in mask)


@rule("exists_each answers for every key, wherever the gaps are.")
def exists_each_sees_all(h: Harness) -> None:
    for keys, stored in _gaps(h):
        found = each_answer("exists_each", h.backend.exists_each(keys), len(keys))
        expect(found == stored, f"stored are {_shown(stored)}; exists_each answers {_shown(found)}")


@rule(
    "get_each fills the pages of all stored keys, wherever the gaps are. An object of another "
    "length is a miss of its page only.",
    needs=("exists_each_sees_all",),
)
def get_each_fills_all(h: Harness) -> None:
    longer = h.keys(1, "longer")
    put_each(h.backend, longer, sum(_PAGE) + 1)
    for chosen, choice in _gaps(h):
        keys, stored = [*chosen[:2], *longer, *chosen[2:]], [*choice[:2], False, *choice[2:]]
        pages = [h.guarded(_PAGE) for _ in keys]
        answer = h.backend.get_each(keys, [page.segments for page in pages])
        filled = each_answer("get_each", answer, len(keys))
        for key, page in itertools.compress(zip(keys, pages, strict=True), filled):
            wrong = page_difference(key, page.segments)
            expect(not wrong, f"get_each says it filled the page of {key}: {wrong}")
        expect(filled == stored, f"stored are {_shown(stored)}; get_each fills {_shown(filled)}")
        expect(
            all(page.guards_intact() for page in pages),
            "get_each changed bytes beside the segments of its pages",
        )


@rule(
    "set_each stores every page, of any shape, stored before or not; it changes no page, and the "
    "caller may reuse them.",
    needs=("get_each_fills_all",),
)
def set_each_stores_all(h: Harness) -> None:
    for shape in SHAPES:
        keys = h.keys(4, str(shape))
        put_each(h.backend, keys[1:2], sum(shape))
        pages = [h.filled(key, shape) for key in keys]
        stored = each_answer("set_each", h.backend.set_each(keys, pages), len(keys))
        expect(all(stored), f"set_each of 4 pages answers {_shown(stored)}")
        for key, page in zip(keys, pages, strict=True):
            wrong = page_difference(key, page)
            expect(not wrong, f"set_each changed the page that it was given: {wrong}")
            scribble(page)
        absent = h.keys(1, f"absent {shape}")
        filled = h.each_hits(h.backend, [*keys[:2], *absent, *keys[2:]], shape)
        expect(
            filled == [True, True, False, True, True],
            f"of 4 pages that set_each has stored and an absent one, get_each fills"
            f" {_shown(filled)}",
        )
        for key in keys:
            expect_hit(h.backend, key, sum(shape))


@rule("A call for each of no keys answers for none.", needs=("set_each_stores_all",))
def empty_each(h: Harness) -> None:
    backend = h.backend
    for name, answer in (
        ("exists_each", backend.exists_each([])),
        ("get_each", backend.get_each([], [])),
        ("set_each", backend.set_each([], [])),
    ):
        each_answer(name, answer, 0)


@rule("A key twice in one call gets two answers and two pages.", needs=("set_each_stores_all",))
def same_key_twice_each(h: Harness) -> None:
    backend = h.backend  # first, since it says where pages may lie
    one, absent, other = h.keys(3)
    keys = [one, absent, one, other, absent, one]
    expected = [key != absent for key in keys]
    pages = [h.filled(key, _PAGE) for key in (one, other, one)]
    stored = each_answer("set_each", backend.set_each([one, other, one], pages), 3)
    expect(all(stored), f"set_each of a key twice answers {_shown(stored)}")
    found = each_answer("exists_each", backend.exists_each(keys), len(keys))
    expect(found == expected, f"exists_each of a key twice answers {_shown(found)}")
    filled = h.each_hits(backend, keys, _PAGE)
    expect(filled == expected, f"get_each of a key twice fills {_shown(filled)}")


@rule(
    "Many pages with gaps are answered for and read.",
    needs=("set_each_stores_all", "large_batch"),
    patience=2,
)
def large_batch_with_gaps(h: Harness) -> None:
    keys = h.keys(h.settings.batch_pages)
    nbytes = h.nbytes(h.settings.batch_page_nbytes)
    shape = (nbytes // 2, nbytes - nbytes // 2)
    present = [n % 3 != 1 for n in range(len(keys))]
    some = list(itertools.compress(keys, present))
    stored = h.backend.set_each(some, [h.filled(key, shape) for key in some])
    n_stored = sum(each_answer("set_each", stored, len(some)))
    expect(n_stored == len(some), f"set_each stored {n_stored} of {len(some)} pages")
    found = each_answer("exists_each", h.backend.exists_each(keys), len(keys))
    expect(found == present, f"exists_each sees {sum(found)} of {len(some)} pages among gaps")
    filled = h.each_hits(h.backend, keys, shape)
    expect(filled == present, f"get_each fills {sum(filled)} of {len(some)} pages among gaps")


@_full.rule(
    "A full store makes set_each say which pages found no room; those it says are stored can be "
    "read.",
    requires=Feature.SMALL_STORE,
    patience=2,
)
def full_store_each(h: Harness) -> None:
    backend, nbytes = h.another(h.target.small), h.nbytes(h.settings.race_nbytes)
    shape, before = (64, nbytes - 64), h.keys(0)
    for n in range(h.settings.full_nbytes // (8 * nbytes)):
        new = h.keys(8, f"batch {n}")
        keys = [*new[:4], *before, *new[4:]]
        answer = backend.set_each(keys, [h.filled(key, shape) for key in keys])
        stored = each_answer("set_each", answer, len(keys))
        if not all(stored):
            filled = h.each_hits(backend, keys, shape)
            lost = any(one and not other for one, other in zip(stored, filled, strict=True))
            expect(
                not lost,
                f"set_each into a full store answers {_shown(stored)}; get_each fills"
                f" {_shown(filled)}",
            )
            return
        before = new[:1]
    # A store that evicts is never full: the newest object is there.
    expect(is_hit(backend, new[-1], nbytes), "set_each dropped a page and did not say so")


@rule("bounds_calls answers yes or no, the same each time and from every instance.")
def bounds_calls_stays(h: Harness) -> None:
    first = h.backend.bounds_calls()
    expect(isinstance(first, bool), f"bounds_calls answers {first!r}; True or False is due")
    put_each(h.backend, h.keys(2), sum(_PAGE))
    for backend in (h.backend, h.backend, h.another()):
        again = backend.bounds_calls()
        expect(again is first, f"bounds_calls answers {again!r} after it has answered {first!r}")
