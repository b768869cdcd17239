"""How many bytes of pages each namespace has in the bucket."""

from __future__ import annotations

from collections import Counter

from hicache_core.storage.base import namespace_of
from hicache_s3.index import IndexCache, PackIndex, is_index_nbytes
from hicache_s3.pages import Pages, key_of, page_name


def usage_by_namespace(store: Pages) -> Counter[str]:
    """Lists all pages; asks one request for each pack, since a listing does not tell what is one.

    Raises:
        BackendError: the store cannot answer.
    """
    usage: Counter[str] = Counter()
    unsure: list[str] = []
    for name, nbytes in store.objects.listed(page_name("")):
        key = key_of(name)
        if key is None:
            continue
        if is_index_nbytes(nbytes):
            unsure.append(key)
        else:
            usage[namespace_of(key)] += nbytes
    for key, nbytes in _resolved(store, unsure).items():
        usage[namespace_of(key)] += nbytes
    return usage


def _resolved(store: Pages, keys: list[str]) -> dict[str, int]:
    """The lengths of those pages under ``keys``, which stand there or in packs."""
    asker = Pages(store.objects, IndexCache(1, 1.0))  # one of its own: the other has what is in use
    known: dict[str, int] = {}

    def ask(key: str) -> None:
        if key in known:
            return
        found = asker.find(key, packed=True)
        if isinstance(found, PackIndex):
            known.update({other: slot.nbytes for other, slot in found.slots.items()})
        elif found is not None:
            known[key] = found.nbytes

    store.threads.run(ask, keys)
    return {key: known[key] for key in keys if key in known}
