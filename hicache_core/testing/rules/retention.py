"""Rules about how long objects stay: TTL, quota of a namespace, pins, and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from hicache_core.storage.base import Listable, Pins, ReportsUsage, StorageBackend
from hicache_core.testing.features import Feature
from hicache_core.testing.harness import Harness, expect, expect_hit, is_hit, required
from hicache_core.testing.rules.rule import RuleBook

_book = RuleBook("segments_of_every_shape", "miss_is_an_answer", "says_what_it_can")
rule = _book.rule
RULES = _book.rules

_PAGE = (64, 960)
_LONG_S = 3600.0
_POLL_S = 0.01


@rule(
    "usage returns the bytes of each namespace; an object stored twice counts once, a "
    "deleted one not at all.",
    requires=(Feature.USAGE, Feature.DELETE),
    needs=("re_put", "delete_removes"),
)
def usage_by_namespace(h: Harness) -> None:
    keys, (foreign,) = h.keys(4), _elsewhere(h, 1)
    h.put(h.backend, [*keys, foreign], _PAGE)
    _expect_usage(h, keys, [foreign])
    h.put(h.backend, keys[:2], _PAGE)
    _expect_usage(h, keys, [foreign])
    h.backend.delete([keys[1], foreign])
    _expect_usage(h, [keys[0], *keys[2:]], [])


@rule(
    "With a TTL, every call finds an object before it expires, and none afterwards.",
    requires=Feature.TTL,
)
def expires(h: Harness) -> None:
    backend, keys = h.another(h.target.expiring), h.keys(3)
    for _ in range(2):  # a key that has expired can be stored again
        started = time.monotonic()
        h.put(backend, keys, _PAGE)
        n_filled = h.leading_hits(backend, keys, _PAGE)
        # Some stores know ages to the second only: young is half of the TTL.
        young = time.monotonic() - started < h.settings.ttl_s / 2
        expect(n_filled == len(keys) or not young, f"{n_filled} of {len(keys)} young pages hit")
        _pass(h, started)
        _eventually(h, lambda: not any(map(backend.exists, keys)), "exists sees an old object")
        expect(backend.batch_exists(keys) == 0, "batch_exists counts an old object")
        expect(backend.get(keys[0]) is None, "get finds an old object")
        expect(h.leading_hits(backend, keys, _PAGE) == 0, "batch_get finds an old object")
        lists = backend.capability(Listable)
        if lists is not None:
            expect(not list(lists.list_keys(keys[0])), "list_keys gives the key of an old object")


@rule(
    "A namespace above its quota loses its own oldest objects, never those of another namespace.",
    requires=Feature.QUOTA,
)
def quota_by_namespace(h: Harness) -> None:
    backend, others = h.another(h.target.quota), _elsewhere(h, 3)
    _fill(h, backend, others)
    keys = h.keys(2 * _n_fitting(h))
    _fill(h, backend, keys)
    _expect_within_quota(h, backend, keys)
    n_present = sum(map(backend.exists, keys))
    expect(2 * n_present >= _n_fitting(h), f"{n_present} objects stayed; twice as many have room")
    expect(not backend.exists(keys[0]), "the oldest object of a namespace over its quota stayed")
    for key in others:
        expect(is_hit(backend, key, _nbytes(h)), "another namespace's object had to go")


@rule("pin counts the keys that are present, and changes none of them.", requires=Feature.PIN)
def pin_counts_present(h: Harness) -> None:
    pins = required(h.backend, Pins)
    keys, absent = h.keys(3), h.keys(2, "absent")
    h.put(h.backend, keys, _PAGE)
    mixed = [absent[0], keys[0], absent[1], *keys[1:]]
    for ttl_s in (_LONG_S, 2 * _LONG_S, 0.0, 0.0):
        n_pinned = pins.pin(mixed, ttl_s)
        expect(n_pinned == len(keys), f"pin of 3 stored and 2 absent keys counts {n_pinned}")
    n_pinned = pins.pin([], _LONG_S)
    expect(n_pinned == 0, f"pin of nothing counts {n_pinned}")
    for key in absent:
        expect(not h.backend.exists(key), "exists sees an absent key that was to be pinned")
        expect(h.backend.get(key) is None, "get finds an absent key that was to be pinned")
    h.expect_pages(h.backend, keys, _PAGE)


@rule(
    "A pinned object stays while newer objects without a pin are evicted.",
    requires=(Feature.PIN, Feature.QUOTA),
    needs=("quota_by_namespace", "pin_counts_present"),
)
def pinned_goes_last(h: Harness) -> None:
    backend = h.another(h.target.quota)
    pinned, others = h.keys(2, "pinned"), h.keys(2 * _n_fitting(h), "others")
    _fill(h, backend, pinned)
    required(backend, Pins).pin(pinned, _LONG_S)
    _fill(h, backend, others)
    _expect_within_quota(h, backend, [*pinned, *others])
    expect(not backend.exists(others[0]), "the oldest object that is not pinned stayed")
    for key in pinned:
        expect(is_hit(backend, key, _nbytes(h)), "a pinned object went before others")


@rule(
    "A pin ends after its time, or at once with 0 seconds; the object is then evicted like others.",
    requires=(Feature.PIN, Feature.QUOTA),
    needs=("quota_by_namespace", "pin_counts_present"),
)
def pin_ends(h: Harness) -> None:
    backend = h.another(h.target.quota)
    pins = required(backend, Pins)
    over, let_go = h.keys(1, "over"), h.keys(1, "let go")
    _fill(h, backend, [*over, *let_go])
    pins.pin(let_go, _LONG_S)
    pins.pin(let_go, 0)
    started = time.monotonic()
    pins.pin(over, h.settings.ttl_s)
    _pass(h, started)
    others = h.keys(2 * _n_fitting(h), "others")
    _fill(h, backend, others)
    _expect_within_quota(h, backend, [*over, *let_go, *others])
    expect(not backend.exists(over[0]), "an object stayed whose pin is over")
    expect(not backend.exists(let_go[0]), "an object stayed whose pin was ended")


@rule(
    "When everything is pinned, pinned objects are evicted, so that new objects can be stored.",
    requires=(Feature.PIN, Feature.QUOTA),
    needs=("quota_by_namespace", "pin_counts_present"),
)
def all_pinned_makes_room(h: Harness) -> None:
    backend, keys = h.another(h.target.quota), h.keys(_n_fitting(h) + 3)
    for key in keys:
        _fill(h, backend, [key])
        required(backend, Pins).pin([key], _LONG_S)
    _expect_within_quota(h, backend, keys)


def _elsewhere(h: Harness, n_keys: int) -> list[str]:
    """Keys of another namespace."""
    hashes = (key.partition("/")[2] for key in h.keys(n_keys, "elsewhere"))
    return h.remember(f"{h.namespace[::-1]}/{page_hash}" for page_hash in hashes)


def _expect_usage(h: Harness, own: Sequence[str], others: Sequence[str]) -> None:
    """``usage`` gives the bytes of these objects, at the latest after a while."""
    backend = required(h.backend, ReportsUsage)
    for namespace, keys in ((h.namespace, own), (h.namespace[::-1], others)):
        due = len(keys) * sum(_PAGE)
        _eventually(
            h,
            lambda namespace=namespace, due=due: backend.usage().get(namespace, 0) == due,  # type: ignore[misc]  # bound now
            f"usage does not come to the {due} bytes of {len(keys)} stored objects",
        )


def _nbytes(h: Harness) -> int:
    """Size of an object of which eight fill a quota, or more if the backend's limit is low."""
    return h.nbytes(h.settings.quota_nbytes // 8)


def _n_fitting(h: Harness) -> int:
    return h.settings.quota_nbytes // _nbytes(h)


def _fill(h: Harness, backend: StorageBackend, keys: Sequence[str]) -> None:
    """Stores objects one after the other; each is there at once."""
    for key in keys:
        h.put(backend, [key], (_nbytes(h),))
        expect_hit(backend, key, _nbytes(h))


def _expect_within_quota(h: Harness, backend: StorageBackend, keys: Sequence[str]) -> None:
    """Of ``keys`` no more are there than fit, at the latest after a while."""
    n_fitting = _n_fitting(h)
    _eventually(
        h,
        lambda: sum(map(backend.exists, keys)) <= n_fitting,
        f"more than {n_fitting} objects stayed, which is over the quota of their namespace",
    )


def _eventually(h: Harness, holds: Callable[[], bool], otherwise: str) -> None:
    """Waits for what a store may do behind the call; it has ``KitSettings.answer_s``."""
    deadline = time.monotonic() + h.settings.answer_s
    while not holds():
        expect(time.monotonic() < deadline, otherwise)
        time.sleep(_POLL_S)


def _pass(h: Harness, started: float) -> None:
    """Returns when ``KitSettings.ttl_s`` have passed since ``started``."""
    time.sleep(max(0.0, started + h.settings.ttl_s - time.monotonic()))
