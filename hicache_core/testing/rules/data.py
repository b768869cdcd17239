"""Rules about what goes in and comes out, from one thread."""

from __future__ import annotations

import contextlib
import string

from hicache_core.testing.content import content, difference, page_difference, scribble
from hicache_core.testing.harness import (
    Harness,
    expect,
    expect_hit,
    put_each,
)
from hicache_core.testing.rules.rule import RuleBook

_PAGE = (4096,)
SHAPES: tuple[tuple[int, ...], ...] = (
    (4096,),  # page_first: one segment
    (64, 4096),  # a sealed page: its header, then one segment
    (64, *[256] * 16),  # layer_first: a segment for each layer
    (512, 512),  # keys and values
    (1, 2, 3, 5, 7, 11, 13),  # odd lengths, so that odd addresses follow
    (0, 100, 0, 28, 0),  # empty segments
    tuple([16] * 1100),  # more than one call of sendmsg or preadv takes (IOV_MAX is 1024)
)

_book = RuleBook("opens")
rule = _book.rule
RULES = _book.rules


@rule("exists and get find what set has stored, whether it was bytes, bytearray or a memoryview.")
def get_after_set(h: Harness) -> None:
    for key, kind in zip(h.keys(3), (bytes, bytearray, memoryview), strict=True):
        h.backend.set(key, kind(content(key, 4096)))
        expect(h.backend.exists(key), f"exists says no to a key that was set from {kind.__name__}")
        expect_hit(h.backend, key, 4096)


@rule("batch_get and get return the pages that batch_set has stored.", needs=("get_after_set",))
def batch_round_trip(h: Harness) -> None:
    keys, singles = h.keys(4), h.keys(4, "set")
    h.put(h.backend, keys, _PAGE)
    n_present = h.backend.batch_exists(keys)
    expect(n_present == 4, f"batch_exists counts {n_present} of 4 stored pages")
    h.expect_pages(h.backend, keys, _PAGE)
    for key in keys:
        expect_hit(h.backend, key, 4096)
    put_each(h.backend, singles, 4096)
    h.expect_pages(h.backend, singles, _PAGE)


@rule("Pages of any number and length of segments round-trip.", needs=("batch_round_trip",))
def segments_of_every_shape(h: Harness) -> None:
    for shape in SHAPES:
        keys = h.keys(2, str(shape))
        h.put(h.backend, keys, shape)
        h.expect_pages(h.backend, keys, shape)


@rule(
    "An absent key is answered with None, False or 0, never with an error, and is found "
    "once it is stored.",
    needs=("get_after_set",),
)
def miss_is_an_answer(h: Harness) -> None:
    keys = h.keys(3)
    value = h.backend.get(keys[0])
    expect(value is None, "get of an absent key is not None")
    expect(not h.backend.exists(keys[0]), "exists says yes to an absent key")
    n_present = h.backend.batch_exists(keys)
    expect(n_present == 0, f"batch_exists of absent keys is {n_present}")
    n_filled = h.backend.batch_get(keys, [h.blank(_PAGE) for _ in keys])
    expect(n_filled == 0, f"batch_get of absent keys is {n_filled}")
    put_each(h.backend, keys, 4096)
    expect(h.backend.exists(keys[0]), "exists says no to a key that was a miss before it was set")
    n_present = h.backend.batch_exists(keys)
    expect(n_present == 3, f"batch_exists counts {n_present} of 3 keys that were misses before")
    for key in keys:
        expect_hit(h.backend, key, 4096)


@rule(
    "batch_exists counts the leading keys only, wherever the hole is.",
    needs=("batch_round_trip", "miss_is_an_answer"),
)
def exists_counts_leading(h: Harness) -> None:
    for hole in range(6):
        keys = h.keys(6, f"hole {hole}")
        put_each(h.backend, [key for n, key in enumerate(keys) if n != hole], 64)
        n_present = h.backend.batch_exists(keys)
        expect(n_present == hole, f"page {hole} of 6 is missing; batch_exists is {n_present}")


@rule(
    "batch_get counts and fills the leading pages, wherever the hole is.",
    needs=("segments_of_every_shape", "miss_is_an_answer"),
)
def get_counts_leading(h: Harness) -> None:
    for hole in range(6):
        keys = h.keys(6, f"hole {hole}")
        put_each(h.backend, [key for n, key in enumerate(keys) if n != hole], 64)
        n_filled = h.leading_hits(h.backend, keys, (32, 32))
        expect(n_filled == hole, f"page {hole} of 6 is missing; batch_get is {n_filled}")


@rule("An empty batch is answered with 0.", needs=("batch_round_trip",))
def empty_batch(h: Harness) -> None:
    answers = (h.backend.batch_exists([]), h.backend.batch_get([], []), h.backend.batch_set([], []))
    expect(answers == (0, 0, 0), f"batch_exists, batch_get, batch_set of no key are {answers}")


@rule("A key twice in one batch fills both of its pages.", needs=("batch_round_trip",))
def same_key_twice(h: Harness) -> None:
    one, other = h.keys(2)
    h.put(h.backend, [one, other], _PAGE)
    h.expect_pages(h.backend, [one, other, one], _PAGE)
    expect(h.backend.batch_exists([one, one]) == 2, "batch_exists of a key twice is not 2")


@rule("A batch of many pages round-trips.", needs=("segments_of_every_shape",), patience=2)
def large_batch(h: Harness) -> None:
    keys = h.keys(h.settings.batch_pages)
    nbytes = h.nbytes(h.settings.batch_page_nbytes)
    shape = (nbytes // 2, nbytes - nbytes // 2)
    h.put(h.backend, keys, shape)
    h.expect_pages(h.backend, keys, shape)


@rule("A stored key can be stored again and reads the same.", needs=("batch_round_trip",))
def re_put(h: Harness) -> None:
    keys = h.keys(3)
    h.put(h.backend, keys[:2], _PAGE)
    put_each(h.backend, keys, 4096)
    h.put(h.backend, [*keys, *keys], _PAGE)
    h.expect_pages(h.backend, keys, _PAGE)
    for key in keys:
        expect_hit(h.backend, key, 4096)


@rule("The caller may reuse its memory when set or batch_set returns.", needs=("batch_round_trip",))
def set_copies(h: Harness) -> None:
    single, *keys = h.keys(5)
    buffer = bytearray(content(single, 4096))
    h.backend.set(single, memoryview(buffer))
    buffer[:] = b"\x11" * len(buffer)
    pages = [h.filled(key, (64, 2000, 2032)) for key in keys]
    expect(h.backend.batch_set(keys, pages) == len(keys), "batch_set did not store the batch")
    for page in pages:
        scribble(page)
    for key in (single, *keys):
        expect_hit(h.backend, key, 4096)


@rule("batch_set reads its pages and changes nothing in them.", needs=("batch_round_trip",))
def set_only_reads(h: Harness) -> None:
    backend, keys = h.backend, h.keys(3)
    pages = [h.filled(key, (64, 1000)) for key in keys]
    backend.batch_set(keys, pages)
    for key, page in zip(keys, pages, strict=True):
        wrong = page_difference(key, page)
        expect(not wrong, f"batch_set changed the page that it was given: {wrong}")


@rule("Later calls do not change what get has returned.", needs=("get_after_set",))
def get_gives_its_own_bytes(h: Harness) -> None:
    keys, later = h.keys(8), h.keys(8, "later")
    put_each(h.backend, keys, 4096)
    values = [h.backend.get(key) for key in keys]
    with contextlib.suppress(NotImplementedError):
        h.backend.delete(keys)
    put_each(h.backend, later, 4096)  # into the room of those that were deleted, perhaps
    for key, value in zip(keys, values, strict=True):
        expect(value is not None, f"get missed {key}, which is stored")
        wrong = difference(key, 4096, value or b"")
        expect(not wrong, f"a value that get returned has changed since: {wrong}")


@rule("Equal page hashes in two namespaces name two objects.", needs=("miss_is_an_answer",))
def namespaces_are_apart(h: Harness) -> None:
    (ours,) = h.keys(1)
    page_hash = ours.partition("/")[2]
    (foreign,) = h.remember([f"{h.namespace[::-1]}/{page_hash}"])
    h.backend.set(ours, content(ours, 512))
    expect(h.backend.get(foreign) is None, "get found the object of another namespace")
    expect(not h.backend.exists(foreign), "exists found the object of another namespace")
    h.backend.set(foreign, content(foreign, 512))
    for key in (ours, foreign):
        expect_hit(h.backend, key, 512)


@rule("Keys of every legal character, up to 200 of them, are told apart.", needs=("re_put",))
def every_legal_key(h: Harness) -> None:
    letters = string.digits + string.ascii_lowercase
    long = (h.namespace + "/" + letters * 6)[:199]
    keys = h.remember(
        [
            *(f"{h.namespace}/{letter}" for letter in letters),
            *(long + letter for letter in letters),
            f"{h.namespace}/{letters}",
            f"{h.namespace}/{letters}0",
            f"{h.namespace}/x/y/{letters}",
        ]
    )
    h.put(h.backend, keys, (96,))
    h.expect_pages(h.backend, keys, (96,))
    for key in keys:
        expect_hit(h.backend, key, 96)
