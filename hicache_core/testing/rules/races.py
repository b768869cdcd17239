"""Rules about several threads on one instance."""

from __future__ import annotations

import itertools
from functools import partial

from hicache_core.testing.content import content
from hicache_core.testing.features import Feature
from hicache_core.testing.harness import (
    Harness,
    expect,
    expect_hit,
    is_hit,
    put_each,
)
from hicache_core.testing.rules.rule import RuleBook

_book = RuleBook(
    "miss_is_an_answer", "large_batch", "set_copies", "get_gives_its_own_bytes", "re_put"
)
rule = _book.rule
RULES = _book.rules
_deleting = RuleBook("delete_removes", "all_or_nothing")
DELETING = _deleting.rules


@rule("Many threads at a time: each reads what it has stored.")
def threads_do_not_mix(h: Harness) -> None:
    backend = h.backend

    def runner(thread: int) -> None:
        shape = (100 + thread, 400, 4096)
        for n in range(4):
            single, *keys = h.keys(4, f"thread {thread} round {n}")
            backend.set(single, content(single, sum(shape)))
            h.put(backend, keys, shape)
            expect_hit(backend, single, sum(shape))
            h.expect_pages(backend, [*keys, single], shape)

    h.race([partial(runner, thread) for thread in range(h.settings.n_threads)], h.settings.race_s)


@rule(
    "An object that is being stored is read whole or not at all.",
    needs=("threads_do_not_mix", "set_each_stores_all"),
)
def all_or_nothing(h: Harness) -> None:
    backend, nbytes = h.backend, h.nbytes(h.settings.race_nbytes)
    keys = [h.keys(4, f"round {n}") for n in range(64)]
    turns = itertools.cycle(keys)
    current = [keys[0]]

    def write() -> None:
        current[0] = next(turns)
        h.put(backend, current[0], (64, nbytes - 64))

    def read() -> None:
        batch = current[0]
        for key in reversed(batch):
            is_hit(backend, key, nbytes)
        h.leading_hits(backend, batch, (64, nbytes - 64))
        h.each_hits(backend, batch, (64, nbytes - 64))

    h.race([write, read, read], h.settings.race_s)


@rule(
    "A key that is stored again stays readable at every moment.",
    needs=("threads_do_not_mix", "get_counts_leading"),
)
def re_put_stays_readable(h: Harness) -> None:
    backend, keys, nbytes = h.backend, h.keys(2), h.nbytes(h.settings.race_nbytes)
    shape = (64, nbytes - 64)
    h.put(backend, keys, shape)

    def write() -> None:
        h.put(backend, keys, shape)
        put_each(backend, keys, nbytes)

    def read() -> None:
        for key in keys:
            expect(backend.exists(key), "exists says no to a key that is being stored again")
            expect_hit(backend, key, nbytes)
        h.expect_pages(backend, keys, shape)

    h.race([write, read, read], h.settings.race_s)


@_deleting.rule(
    "A read during a deletion returns the whole object or a miss.", requires=Feature.DELETE
)
def delete_while_reading(h: Harness) -> None:
    backend, keys, nbytes = h.backend, h.keys(4), h.nbytes(h.settings.race_nbytes)
    shape = (64, nbytes - 64)

    def write() -> None:
        h.put(backend, keys, shape)
        backend.delete(keys)

    def read() -> None:
        for key in keys:
            is_hit(backend, key, nbytes)
        h.leading_hits(backend, keys, shape)
        h.each_hits(backend, keys, shape)

    h.race([write, read, read], h.settings.race_s)
