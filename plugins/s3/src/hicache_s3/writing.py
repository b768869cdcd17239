"""Writes a batch of pages: adjacent small ones into packs, the others one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from hicache_core.errors import BackendFull
from hicache_core.plugin.backends import nbytes_of, parse_key
from hicache_core.types import Page
from hicache_s3.index import MAX_PACK_PAGES, PackIndex
from hicache_s3.pages import Alone, Found, Pages, page_name
from hicache_s3.search import Search

MIN_PACK_PAGES = 4
"""Minimum number of pages in a pack: smaller ones save too few requests for their indexes."""


def pages_per_pack(page_nbytes: int, pack_nbytes: int) -> int:
    """Returns how many pages of this size make a pack; 1 if they are too large to be packed."""
    n_pages = min(MAX_PACK_PAGES, round(pack_nbytes / max(page_nbytes, 1)))
    return n_pages if n_pages >= MIN_PACK_PAGES else 1


def write_batch(
    keys: Sequence[str],
    pages: Sequence[Page],
    *,
    pack_nbytes: int,
    store: Pages,
    leaving: Callable[[int], None],
) -> list[bool]:
    """Stores pages. Those that a full store refuses are left out, and the others written.

    Args:
        keys: one for each page.
        pages: what to store.
        pack_nbytes: size of a pack; 0 packs nothing.
        store: where to.
        leaving: called with the index of a page before it is stored, on the thread that stores it.

    Returns:
        For each page whether it is stored afterwards.
    """
    stored = _already_stored(keys, pages, pack_nbytes, store)
    sizes = [nbytes_of(page) for page in pages]
    groups = plan(keys, sizes, [n for n in range(len(keys)) if not stored[n]], pack_nbytes)
    indexes: list[PackIndex] = []

    def write(group: list[int]) -> None:
        for n in group:
            leaving(n)
        try:
            if len(group) == 1:
                store.objects.store(page_name(keys[group[0]]), pages[group[0]])
            else:
                index = PackIndex.of({keys[n]: sizes[n] for n in group})
                body = tuple(itertools.chain.from_iterable(pages[n] for n in group))
                store.objects.store(index.pack_name, body)
                indexes.append(index)
                return
        except BackendFull:
            return
        stored[group[0]] = True

    def write_index(item: tuple[str, PackIndex]) -> None:
        try:
            store.write_index(*item)
        except BackendFull:
            return
        indexed.add(item[0])

    indexed: set[str] = set()
    store.threads.run(write, groups)
    # Only now, when the packs are complete, may keys refer to them.
    store.threads.run(write_index, [(key, index) for index in indexes for key in index.slots])
    for index in indexes:
        store.cache.add(index)
    alone = {keys[n] for n in range(len(keys)) if stored[n]}
    return [key in alone or key in indexed for key in keys]


def _already_stored(
    keys: Sequence[str], pages: Sequence[Page], pack_nbytes: int, store: Pages
) -> list[bool]:
    """Returns for each page whether it is stored already.

    Keys form a chain: if the first one is absent the others nearly always are, so that takes one
    request. Writing a page twice does no harm.
    """
    stored = [False] * len(keys)
    if not keys:
        return stored
    stride = pages_per_pack(nbytes_of(pages[0]), pack_nbytes)
    if store.find(keys[0], packed=stride > 1) is None:
        return stored
    search = Search(keys, stride, leading=False)

    def ask(n: int) -> Found:
        return store.find(keys[n], packed=search.stride > 1)

    search.run(store.threads, ask)
    for n, place in enumerate(search.places):
        if isinstance(place, Alone):
            stored[n] = place.nbytes == nbytes_of(pages[n])
        elif place is not None:
            stored[n] = place.slots[keys[n]].nbytes == nbytes_of(pages[n])
    return stored


def plan(
    keys: Sequence[str], sizes: Sequence[int], wanted: Sequence[int], pack_nbytes: int
) -> list[list[int]]:
    """Groups the pages that are written as one object; each key once, in order.

    Args:
        keys: of the batch.
        sizes: length of each page in bytes.
        wanted: indexes of the pages to write, ascending.
        pack_nbytes: size of a pack; 0 packs nothing.

    Returns:
        Indexes of the pages of each object.
    """
    groups: list[list[int]] = []
    seen: set[str] = set()
    for n in wanted:
        if keys[n] in seen:
            continue
        seen.add(keys[n])
        if groups and _fits(keys, sizes, groups[-1], n, pack_nbytes):
            groups[-1].append(n)
        else:
            groups.append([n])
    return [part for group in groups for part in _worth_packing(group)]


def _fits(
    keys: Sequence[str], sizes: Sequence[int], group: list[int], n: int, pack_nbytes: int
) -> bool:
    """Returns whether the page at index ``n`` can be appended to ``group``."""
    before = group[-1]
    if before != n - 1 or sizes[before] != sizes[n]:
        return False
    if len(group) >= pages_per_pack(sizes[n], pack_nbytes):
        return False
    return (
        _is_page_key(keys[n]) and keys[before][:17] == keys[n][:17] and _is_page_key(keys[before])
    )


def _worth_packing(group: list[int]) -> list[list[int]]:
    return [group] if len(group) >= MIN_PACK_PAGES else [[n] for n in group]


def _is_page_key(key: str) -> bool:
    try:
        parse_key(key)
    except ValueError:
        return False
    return True
