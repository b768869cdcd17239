"""Rules about a backend behind the seal that is around every backend in use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from hicache_core.storage.base import Buffer, StorageBackend
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend, seal
from hicache_core.storage.segments import join
from hicache_core.storage.visiting import VisitsPages
from hicache_core.storage.wrapper import Adapters, BackendWrapper
from hicache_core.testing.content import content
from hicache_core.testing.features import Feature
from hicache_core.testing.harness import Harness, each_answer, expect
from hicache_core.testing.rules.rule import RuleBook
from hicache_core.types import Page

_book = RuleBook("delete_removes", "get_gives_its_own_bytes", "says_what_it_can")
RULES = _book.rules

_NBYTES = 1000


@dataclass(frozen=True, slots=True)
class _BadVisits:
    """As the link, for a backend that shows its pages while it reads them."""

    link: _BadLink
    inner: VisitsPages

    def batch_get_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> int:
        """Spoils each page before it is shown."""

        def spoilt(n: int) -> bool:
            self.link.spoilt(pages[n][-1])
            return arrived(n)

        return self.inner.batch_get_visiting(keys, pages, spoilt)

    def batch_set_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> int:
        """Stores what is right."""
        return self.inner.batch_set_visiting(keys, pages, leaving)


class _BadLink(BackendWrapper):
    """Spoils what comes back: a byte of each page, another value with each read."""

    adapters: ClassVar[Adapters] = {VisitsPages: _BadVisits}

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__(inner)
        self.n_good = 0
        """So many reads come through as they are, after the first one."""
        self._n_reads = 0

    def get(self, key: str) -> Buffer | None:
        value = self.inner.get(key)
        return None if value is None else self.spoilt(bytearray(value))

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        n_filled = self.inner.batch_get(keys, pages)
        for page in pages[:n_filled]:
            self.spoilt(page[-1])
        return n_filled

    def spoilt(self, value: bytearray | memoryview) -> bytearray | memoryview:
        """``value`` with its last byte changed, unless it is the turn of a good read."""
        self._n_reads += 1
        if not 1 < self._n_reads <= 1 + self.n_good:
            value[-1] ^= self._n_reads % 255 + 1
        return value


def _behind_bad_link(backend: StorageBackend, n_good: int) -> SealedBackend:
    link = _BadLink(backend)
    link.n_good = n_good
    return SealedBackend(link)


def _page(h: Harness) -> Page:
    return h.blank((HEADER_NBYTES, _NBYTES))


def _sealed(h: Harness, key: str) -> Page:
    page = _page(h)
    page[1][:] = content(key, _NBYTES)
    seal(key, page)
    return page


@_book.rule(
    "Behind the seal, a reader whose link damages bytes removes nothing; an object "
    "damaged in the store is removed.",
    requires=Feature.DELETE,
)
def bad_link_removes_nothing(h: Harness) -> None:
    backend = h.backend  # first, since it says where pages may lie
    good, damaged = h.keys(2)
    spoilt = _sealed(h, damaged)
    spoilt[1][0] ^= 1
    n_stored = backend.batch_set([good, damaged], [_sealed(h, good), spoilt])
    expect(n_stored == 2, f"batch_set stored {n_stored} of 2 pages")
    reader = _behind_bad_link(backend, 0)
    expect(reader.batch_get([good], [_page(h)]) == 0, "batch_get counts a page that was spoilt")
    expect(reader.get(good) is None, "get gives an object that was spoilt on its way")
    expect(backend.exists(good), "a good object went since it was spoilt on its way to a reader")
    page = _page(h)
    n_filled = _behind_bad_link(backend, 1).batch_get([good], [page])
    expect(n_filled == 1, "a page that is good at the second read is not a hit")
    expect(page[1] == content(good, _NBYTES), "a page is wrong that was good at the second read")
    reader = SealedBackend(backend)
    expect(reader.batch_get([damaged], [_page(h)]) == 0, "batch_get counts a damaged page")
    expect(not backend.exists(damaged), "a damaged object stays where each read refuses it")
    n_stored = reader.batch_set([damaged], [_page(h)])
    expect(n_stored == 1, "a good page cannot take the place of a damaged one")


@_book.rule(
    "Behind the seal and a guard, get_each reads pages behind gaps, and a damaged one is a miss of "
    "its own.",
    requires=Feature.DELETE,
    needs=("bad_link_removes_nothing", "set_each_stores_all"),
)
def sealed_each(h: Harness) -> None:
    backend = h.backend
    sealed = SealedBackend(backend)
    reader = GuardedBackend(sealed, GuardConfig())
    keys = h.keys(6)
    present = [n not in (0, 3) for n in range(len(keys))]
    pages = [_sealed(h, key) for key in keys]
    for page in pages:
        page[0][:] = bytes(HEADER_NBYTES)  # it is the seal that must write the header
    some = list(itertools.compress(keys, present))
    some_pages = list(itertools.compress(pages, present))
    stored = each_answer("set_each", reader.set_each(some, some_pages), len(some))
    expect(all(stored), f"set_each behind the seal stored {sum(stored)} of {len(some)} pages")
    damaged = _sealed(h, keys[4])
    damaged[1][0] ^= 1
    backend.delete([keys[4]])
    backend.set(keys[4], join(damaged))
    found = each_answer("exists_each", reader.exists_each(keys), len(keys))
    expect(found == present, "exists_each behind the seal and a guard differs from what is stored")
    pages = [_page(h) for _ in keys]
    filled = each_answer("get_each", reader.get_each(keys, pages), len(keys))
    expect(not filled[4], "get_each says it filled the page of a damaged object")
    expect(
        filled == [one and n != 4 for n, one in enumerate(present)],
        f"get_each behind the seal filled {sum(filled)} of {len(some) - 1} good pages among gaps",
    )
    for key, page in itertools.compress(zip(keys, pages, strict=True), filled):
        expect(page[1] == content(key, _NBYTES), "get_each behind the seal filled a wrong page")
    refused = sealed.rejections()
    expect(sum(refused.values()) == 1, f"1 object is damaged; the seal has refused {refused}")
