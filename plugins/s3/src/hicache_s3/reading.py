"""Reads a batch of pages: those that are objects of their own, and runs of those in packs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hicache_core.storage.segments import nbytes_of
from hicache_core.types import Page
from hicache_s3.index import PackIndex
from hicache_s3.pages import Found, Pages
from hicache_s3.search import Search


class Run(NamedTuple):
    """Neighbours in a pack, read by one request; positions in the batch."""

    pack: PackIndex
    start: int
    stop: int


def read_batch(keys: Sequence[str], pages: Sequence[Page], *, stride: int, store: Pages) -> int:
    """Fills leading pages; how many.

    Args:
        keys: keys of the pages.
        pages: memory to fill.
        stride: how many pages of this size a pack is likely to have; 1 if they are not packed.
        store: the pages that are stored.
    """
    search = Search(keys, stride)
    search.know(store.cache.find)
    filled = [False] * len(keys)

    def ask(n: int) -> Found:
        found = store.read(keys[n], pages[n])
        filled[n] = found is not None and not isinstance(found, PackIndex)
        return found

    search.run(store.threads, ask)
    lost = _read_runs(search, pages, filled, store)
    if lost:
        # The packs may have been known for long, and the pages may be elsewhere by now: once more.
        for run in lost:
            store.cache.drop(run.pack)
            for n in range(run.start, run.stop):
                search.places[n] = None
        search.run(store.threads, ask)
        for run in _read_runs(search, pages, filled, store):
            store.forget(run.pack)
            search.miss(run.start)
    return search.end


def _read_runs(
    search: Search, pages: Sequence[Page], filled: list[bool], store: Pages
) -> list[Run]:
    """Reads what lies in packs and is not filled yet; the runs whose pack is gone."""
    lost: list[Run] = []

    def read(run: Run) -> None:
        span = slice(run.start, run.stop)
        if store.read_run(run.pack, search.keys[span], pages[span]):
            filled[span] = [True] * (run.stop - run.start)
        else:
            lost.append(run)

    store.threads.run(read, _runs(search, pages, filled))
    return lost


def _runs(search: Search, pages: Sequence[Page], filled: Sequence[bool]) -> list[Run]:
    """The longest runs of leading pages; a slot of another length than its page is a miss."""
    runs: list[Run] = []
    for n in range(search.end):
        index = search.places[n]
        if not isinstance(index, PackIndex) or filled[n]:
            continue
        slot = index.slots[search.keys[n]]
        if slot.nbytes != nbytes_of(pages[n]):
            search.miss(n)
            break
        if runs and runs[-1].stop == n and runs[-1].pack is index:
            before = index.slots[search.keys[n - 1]]
            if before.offset + before.nbytes == slot.offset:
                runs[-1] = runs[-1]._replace(stop=n + 1)
                continue
        runs.append(Run(index, n, n + 1))
    return runs
