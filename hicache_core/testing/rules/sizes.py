"""Rules about the lengths of objects and pages."""

from __future__ import annotations

from hicache_core.testing.content import content
from hicache_core.testing.harness import (
    Harness,
    expect,
    expect_hit,
    put_each,
)
from hicache_core.testing.rules.rule import RuleBook

_book = RuleBook("batch_round_trip", "segments_of_every_shape")
rule = _book.rule
RULES = _book.rules


@rule(
    "batch_get treats an object of another length than its page as a miss.",
    needs=("get_counts_leading",),
)
def wrong_size_is_a_miss(h: Harness) -> None:
    for stored_nbytes in (1, 1023, 1025, 2048, 5000):
        before, wrong, after = h.keys(3, str(stored_nbytes))
        put_each(h.backend, [before, after], 1024)
        put_each(h.backend, [wrong], stored_nbytes)
        n_filled = h.leading_hits(h.backend, [before, wrong, after], (64, 960))
        expect(
            n_filled == 1,
            f"the second object has {stored_nbytes} bytes; batch_get into pages of 1024 bytes"
            f" counts {n_filled} instead of 1",
        )


@rule("batch_get writes into its pages only, hit or miss.", needs=("wrong_size_is_a_miss",))
def stays_in_its_page(h: Harness) -> None:
    hit, long, short, absent = h.keys(4)
    put_each(h.backend, [hit], 1000)
    put_each(h.backend, [long], 5000)
    put_each(h.backend, [short], 10)
    for keys in ([hit], [long], [short], [absent], [hit, long, hit], [hit, absent, hit]):
        pages = [h.guarded((64, 436, 500)) for _ in keys]
        h.backend.batch_get(keys, [page.segments for page in pages])
        expect(
            all(page.guards_intact() for page in pages),
            "batch_get changed bytes beside the segments of its pages",
        )


@rule("An empty object is an object, not a miss.")
def empty_object(h: Harness) -> None:
    single, *keys = h.keys(3)
    h.backend.set(single, b"")
    expect_hit(h.backend, single, 0)
    expect(h.backend.exists(single), "exists says no to an empty object")
    h.put(h.backend, keys, (0,))
    h.expect_pages(h.backend, keys, (0,))
    n_filled = h.backend.batch_get(keys, [(), ()])
    expect(n_filled == 2, f"batch_get of 2 empty objects into pages without segments is {n_filled}")


@rule("Objects of a few bytes, and around powers of two, round-trip.")
def tiny_objects(h: Harness) -> None:
    around = [2**n + d for n in (7, 9, 12, 14, 16) for d in (-1, 0, 1)]
    for nbytes in [*range(1, 34), *(n for n in around if n == h.nbytes(n))]:
        (key,) = h.keys(1, str(nbytes))
        h.put(h.backend, [key], (nbytes,))
        expect_hit(h.backend, key, nbytes)
        h.expect_pages(h.backend, [key], (nbytes,))


@rule("The largest objects round-trip.", patience=2)
def large_object(h: Harness) -> None:
    nbytes = h.nbytes(h.settings.large_nbytes)
    page, single = h.keys(2)
    h.put(h.backend, [page], (64, nbytes - 64))
    h.expect_pages(h.backend, [page], (64, nbytes - 64))
    h.backend.set(single, content(single, nbytes))
    expect_hit(h.backend, single, nbytes)
