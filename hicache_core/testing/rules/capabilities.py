"""Rules about what only some backends can do."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from hicache_core.storage.base import (
    Clearable,
    Diagnosable,
    Finding,
    HasStats,
    Listable,
    RegistersMemory,
)
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.sealed import SealedBackend
from hicache_core.storage.segments import nbytes_of, scatter
from hicache_core.storage.wrapper import PASSED_ON
from hicache_core.testing.content import content, page_difference, scribble
from hicache_core.testing.features import Feature
from hicache_core.testing.harness import (
    Harness,
    expect,
    expect_hit,
    put_each,
    required,
)
from hicache_core.testing.rules.rule import RuleBook

_asking = RuleBook("opens")
_book = RuleBook("segments_of_every_shape", "miss_is_an_answer", "says_what_it_can")
rule = _book.rule
ASKING = _asking.rules
RULES = _book.rules

_PAGE = (64, 960)


@runtime_checkable
class _OfTheFuture(Protocol):
    """A capability that no backend knows."""

    def do_what_no_backend_does(self) -> None:
        """Does nothing: no class has this method."""


@_asking.rule(
    "capability returns an object for each kind whose methods the class has and None for an "
    "unknown kind; wrappers pass the answer on."
)
def says_what_it_can(h: Harness) -> None:
    backend = h.backend
    wrapped = GuardedBackend(SealedBackend(backend), GuardConfig())
    for kind in sorted(PASSED_ON, key=lambda kind: kind.__name__):
        asked, found = f"capability({kind.__name__})", backend.capability(kind)
        if found is None:
            expect(not isinstance(backend, kind), f"{asked} is None, but the class has the methods")
        else:
            expect(isinstance(found, kind), f"{asked} gives a {type(found).__name__} that cannot")
        can = found is not None or kind is HasStats  # the seal has statistics of its own
        passed_on = wrapped.capability(kind) is not None
        expect(passed_on == can, f"{asked} of a wrapper says {passed_on}; of the backend {can}")
    expect(backend.capability(_OfTheFuture) is None, "capability of an unknown kind is not None")


@rule(
    "delete removes its keys, ignores absent ones, and touches no others.", requires=Feature.DELETE
)
def delete_removes(h: Harness) -> None:
    keys, absent = h.keys(5), h.keys(2, "absent")
    h.put(h.backend, keys, _PAGE)
    h.backend.delete([absent[0], keys[1], absent[1], keys[3]])
    for gone in (keys[1], keys[3]):
        expect(h.backend.get(gone) is None, "get finds an object that was deleted")
    for left in (keys[0], keys[2], keys[4]):
        expect_hit(h.backend, left, sum(_PAGE))
    h.backend.delete([])
    put_each(h.backend, keys[1:2], sum(_PAGE))
    h.expect_pages(h.backend, keys[:3], _PAGE)


@rule(
    "A key that is removed between exists and get is a miss, and ends the count.",
    requires=Feature.DELETE,
    needs=("delete_removes", "get_counts_leading"),
)
def evicted_after_exists(h: Harness) -> None:
    for gone in (0, 3, 5):
        keys = h.keys(6, f"gone {gone}")
        h.put(h.backend, keys, _PAGE)
        expect(h.backend.batch_exists(keys) == len(keys), "batch_exists does not see all pages")
        expect(h.backend.exists(keys[gone]), "exists does not see a stored page")
        h.backend.delete([keys[gone]])
        n_filled = h.leading_hits(h.backend, keys, _PAGE)
        expect(n_filled == gone, f"page {gone} was deleted; batch_get counts {n_filled}")
        expect(h.backend.get(keys[gone]) is None, "get finds a page that was deleted")


@rule("list_keys gives the keys that start with its prefix, and no others.", requires=Feature.LIST)
def lists_by_prefix(h: Harness) -> None:
    backend = required(h.backend, Listable)
    keys = h.keys(5)
    h.put(h.backend, keys, _PAGE)
    listed = sorted(backend.list_keys(f"{h.namespace}/"))
    expect(listed == sorted(keys), f"list_keys gives {len(listed)} keys of a namespace that has 5")
    one = list(backend.list_keys(keys[0]))
    expect(one == keys[:1], f"list_keys with a whole key as prefix gives {len(one)} keys")
    none = list(backend.list_keys(f"{h.namespace[::-1]}/"))
    expect(not none, f"list_keys gives {len(none)} keys of a namespace that has none")


@rule("clear removes what starts with its prefix, and counts it.", requires=Feature.CLEAR)
def clears_by_prefix(h: Harness) -> None:
    backend = required(h.backend, Clearable)
    keys = h.keys(4)
    (foreign,) = h.remember([f"{h.namespace[::-1]}/{keys[0].partition('/')[2]}"])
    h.put(h.backend, [*keys, foreign], _PAGE)
    n_cleared = backend.clear(f"{h.namespace}/")
    expect(n_cleared == len(keys), f"clear counts {n_cleared} of {len(keys)} removed keys")
    for key in keys:
        expect(h.backend.get(key) is None, "get finds an object that was cleared")
    expect_hit(h.backend, foreign, sum(_PAGE))
    again = backend.clear(f"{h.namespace}/")
    expect(again == 0, f"clear of an empty namespace counts {again}")
    h.put(h.backend, keys, _PAGE)
    h.expect_pages(h.backend, keys, _PAGE)


@rule("stats returns numbers by name.", requires=Feature.STATS)
def counts_in_stats(h: Harness) -> None:
    h.put(h.backend, h.keys(2), _PAGE)
    stats = required(h.backend, HasStats).stats()
    for name, value in stats.items():
        fits = isinstance(name, str) and isinstance(value, (int, float))
        expect(fits, f"stats has {name!r}: {type(value).__name__}; a name and a number are due")


@rule(
    "diagnose yields findings; on a healthy store none of them is an error.",
    requires=Feature.DIAGNOSE,
)
def diagnoses(h: Harness) -> None:
    findings = list(required(h.backend, Diagnosable).diagnose())
    expect(findings, "diagnose yields nothing; say at least that all is well")
    for finding in findings:
        expect(isinstance(finding, Finding), f"diagnose yields a {type(finding).__name__}")
        expect(finding.topic and finding.message, "diagnose yields a finding without text")
        expect(finding.level != "error", f"diagnose: {finding.topic}: {finding.message}")


@rule("Pages in registered memory round-trip.", requires=Feature.REGISTER_MEMORY)
def registered_memory(h: Harness) -> None:
    nbytes, n_pages = 4096, 4
    headers, payload = bytearray(64 * n_pages), bytearray(nbytes * n_pages)
    backend = h.another(register=False)
    required(backend, RegistersMemory).register_memory([memoryview(headers), memoryview(payload)])
    pages = [
        (
            memoryview(headers)[n * 64 : (n + 1) * 64],
            memoryview(payload)[n * nbytes : (n + 1) * nbytes],
        )
        for n in range(n_pages)
    ]
    keys = h.keys(n_pages)
    for key, page in zip(keys, pages, strict=True):
        scatter(content(key, nbytes_of(page)), page)
    n_stored = backend.batch_set(keys, pages)
    expect(n_stored == n_pages, f"batch_set from registered memory is {n_stored}")
    for page in pages:
        scribble(page)
    n_filled = backend.batch_get(keys, pages)
    expect(n_filled == n_pages, f"batch_get to registered memory is {n_filled}")
    for key, page in zip(keys, pages, strict=True):
        wrong = page_difference(key, page)
        expect(not wrong, f"a page in registered memory: {wrong}")
