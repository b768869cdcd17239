"""Reads a batch of pages: single objects, and runs of pages in packs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hicache_core.plugin.backends import nbytes_of
from hicache_core.types import Page
from hicache_s3.index import PackIndex
from hicache_s3.pages import Found, Pages
from hicache_s3.search import Search


class Run(NamedTuple):
    """Adjacent pages of a pack, read with one request; ``start`` and ``stop`` index the batch."""

    pack: PackIndex
    start: int
    stop: int


def read_batch(
    search: Search, pages: Sequence[Page], store: Pages, arrived: Callable[[int], bool]
) -> list[bool]:
    """Reads the pages of a search that has not begun.

    Args:
        search: for the places of the pages; also says whether those behind a gap matter.
        pages: where to; one for each key of the search.
        store: where from.
        arrived: called with the index of a page that was read, on the thread that read it; a page
            that it refuses is a miss.

    Returns:
        For each page whether it was filled, and not refused.
    """
    search.know(store.cache.find)
    filled = [False] * len(pages)

    def ask(n: int) -> Found:
        found = store.read(search.keys[n], pages[n])
        if found is None or isinstance(found, PackIndex):
            return found
        filled[n] = arrived(n)
        return found if filled[n] else None

    def came(run: Run) -> None:
        for n in range(run.start, run.stop):
            filled[n] = arrived(n)
            if not filled[n]:
                search.miss(n)

    search.run(store.threads, ask)
    lost = _read_runs(search, pages, filled, store, came)
    if lost:
        # The cached index may be old, and the pages may be elsewhere now: look them up again.
        for run in lost:
            store.cache.drop(run.pack)
            for n in range(run.start, run.stop):
                search.places[n] = None
        search.run(store.threads, ask)
        for run in _read_runs(search, pages, filled, store, came):
            store.forget(run.pack)
    return filled


def _read_runs(
    search: Search,
    pages: Sequence[Page],
    filled: Sequence[bool],
    store: Pages,
    came: Callable[[Run], None],
) -> list[Run]:
    """Reads pages in packs that are not filled yet.

    Args:
        search: for the places of the pages.
        pages: where to.
        filled: for each page whether it is there already.
        store: where from.
        came: called with each run that was read, on the thread that read it.

    Returns:
        The runs whose pack is missing.
    """
    lost: list[Run] = []

    def read(run: Run) -> None:
        span = slice(run.start, run.stop)
        if store.read_run(run.pack, search.keys[span], pages[span]):
            came(run)
        else:
            lost.append(run)

    store.threads.run(read, _runs(search, pages, filled))
    return lost


def _runs(search: Search, pages: Sequence[Page], filled: Sequence[bool]) -> list[Run]:
    """Returns the longest runs of pages in packs; a page of another length is a miss."""
    runs: list[Run] = []
    for n, index in enumerate(search.places):
        if n >= search.stop:
            break
        if not isinstance(index, PackIndex) or filled[n]:
            continue
        slot = index.slots[search.keys[n]]
        if slot.nbytes != nbytes_of(pages[n]):
            search.miss(n)
            continue
        if runs and runs[-1].stop == n and runs[-1].pack is index:
            before = index.slots[search.keys[n - 1]]
            if before.offset + before.nbytes == slot.offset:
                runs[-1] = runs[-1]._replace(stop=n + 1)
                continue
        runs.append(Run(index, n, n + 1))
    return runs
