"""Rules about opening, closing and what stays behind."""

from __future__ import annotations

import random
from collections.abc import Callable

from hicache_core.errors import UseAfterClose
from hicache_core.storage.base import Flushable
from hicache_core.testing.content import content
from hicache_core.testing.harness import Harness, RuleBroken, expect, expect_hit
from hicache_core.testing.resources import Resources, settled
from hicache_core.testing.rules.rule import RuleBook

_opening = RuleBook()
_book = RuleBook("segments_of_every_shape", "miss_is_an_answer")
rule = _book.rule
OPENING = _opening.rules
RULES = _book.rules

_NBYTES = 4096
_BLOCKS_PER_OPERATION = 0.25
_RESIDENT_SLACK_NBYTES = 16 << 20
_SPARE_DESCRIPTORS = 8  # a pool of connections may grow a little after the first look
_SPARE_THREADS = 4


@_opening.rule("The constructor, check_reachable() and open() succeed, and close() after them.")
def opens(h: Harness) -> None:
    h.target.recipe.make().check_reachable()
    backend = h.another()
    backend.close()
    h.forget(backend)


@rule("open() on an open instance changes nothing.")
def open_twice(h: Harness) -> None:
    keys = h.keys(2)
    h.put(h.backend, keys, (_NBYTES,))
    h.backend.open()
    h.expect_pages(h.backend, keys, (_NBYTES,))


@rule("A second close() does nothing.")
def close_twice(h: Harness) -> None:
    backend = h.another()
    h.forget(backend)
    backend.close()
    backend.close()


@rule(
    "Every call after close() raises UseAfterClose.",
    needs=("close_twice", "set_each_stores_all"),
)
def use_after_close(h: Harness) -> None:
    backend = h.another()
    (key,) = h.keys(1)
    backend.set(key, content(key, 64))
    h.forget(backend)
    backend.close()
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: backend.get(key),
        "exists": lambda: backend.exists(key),
        "set": lambda: backend.set(key, content(key, 64)),
        "batch_exists": lambda: backend.batch_exists([key]),
        "batch_get": lambda: backend.batch_get([key], [h.blank((64,))]),
        "batch_set": lambda: backend.batch_set([key], [h.filled(key, (64,))]),
        "exists_each": lambda: backend.exists_each([key]),
        "get_each": lambda: backend.get_each([key], [h.blank((64,))]),
        "set_each": lambda: backend.set_each([key], [h.filled(key, (64,))]),
        "delete": lambda: backend.delete([key]),
    }
    for name, call in calls.items():
        _expect_refused(name, call)


def _expect_refused(name: str, call: Callable[[], object]) -> None:
    try:
        call()
    except UseAfterClose:
        return
    except NotImplementedError:  # a backend that cannot delete says so, open or closed
        if name == "delete":
            return
        raise
    raise RuleBroken(f"{name} after close() works; it should raise UseAfterClose")


@rule(
    "close() leaves no descriptor and no thread behind.",
    needs=("close_twice", "re_put"),
    patience=2,
)
def close_releases(h: Harness) -> None:
    (key,) = h.keys(1)
    _open_use_close(h, key)  # what is set up once for the process is there after this
    before = Resources.now()
    for _ in range(h.settings.reopenings):
        _open_use_close(h, key)
    after = settled(before)
    times = f"after opening and closing {h.settings.reopenings} times"
    left = after.n_descriptors - before.n_descriptors
    expect(left <= 0, f"{left} descriptors are left {times}")
    left = after.n_threads - before.n_threads
    expect(left <= 0, f"{left} threads are left {times}")


def _open_use_close(h: Harness, key: str) -> None:
    backend = h.another()
    backend.batch_set([key], [h.filled(key, (64,))])
    backend.batch_get([key], [h.blank((64,))])
    h.forget(backend)
    backend.close()


@rule(
    "Thousands of operations on an open instance leave no descriptor, thread or memory behind.",
    needs=("close_releases", "set_only_reads"),
    patience=10,
)
def no_leaks(h: Harness) -> None:
    keys, absent = h.keys(16), h.keys(16, "absent")
    n_operations = h.settings.leak_operations
    _operate(h, keys, absent, max(n_operations // 5, 200))
    before = Resources.now()
    _operate(h, keys, absent, n_operations)
    after = Resources.now()
    expect_hit(h.backend, keys[0], _NBYTES)
    grown = after.n_descriptors - before.n_descriptors
    expect(grown <= _SPARE_DESCRIPTORS, f"{grown} more descriptors after {n_operations} operations")
    grown = after.n_threads - before.n_threads
    expect(grown <= _SPARE_THREADS, f"{grown} more threads after {n_operations} operations")
    grown = after.n_blocks - before.n_blocks
    expect(
        grown <= n_operations * _BLOCKS_PER_OPERATION,
        f"{grown} more blocks of Python memory after {n_operations} operations",
    )
    grown = after.resident_nbytes - before.resident_nbytes
    expect(
        grown <= _RESIDENT_SLACK_NBYTES,
        f"{grown >> 20} MiB more resident memory after {n_operations} operations",
    )


def _operate(h: Harness, keys: list[str], absent: list[str], n_operations: int) -> None:
    """A fixed mix of calls on the same few keys, so that the store itself does not grow."""
    backend, draw = h.backend, random.Random(0)
    stored = [h.filled(key, (64, _NBYTES - 64)) for key in keys]
    page = h.blank((64, _NBYTES - 64))
    for n in range(n_operations):
        which = draw.randrange(len(keys))
        match n % 5:
            case 0:
                backend.batch_set([keys[which]], [stored[which]])
            case 1:
                backend.batch_get([keys[which]], [page])
            case 2:
                backend.get(keys[which])
            case 3:
                backend.batch_exists([keys[which], absent[which]])
            case _:
                backend.batch_get([absent[which]], [page])
    flushable = backend.capability(Flushable)
    if flushable is not None:  # pending writes are not a leak
        expect(flushable.flush(h.settings.rule_s), "flush() did not end in time")
