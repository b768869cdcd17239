"""The objects of prompts: the leading pages that a store has of each, and the units they need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress

from hicache_core.kv.keys import DIGEST_NBYTES, chain_seed, object_keys, page_digests
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.moving.store import Part
from hicache_core.types import Namespace


@dataclass(frozen=True, slots=True)
class CacheOfPrompts:
    """The cache that stored the prompts.

    Attributes:
        namespace: of its full pages; empty if it stores none.
        groups: the namespaces of its windows and states.
        page_size: tokens in a page.
        request: salt, key and adapter of the requests.
    """

    namespace: str
    groups: Sequence[str]
    page_size: int
    request: Namespace = field(default_factory=Namespace)


@dataclass(frozen=True, slots=True)
class FoundPrompt:
    """What a store has of one prompt.

    Attributes:
        n_pages: whole pages of the prompt.
        n_stored: leading pages of which the store has something.
    """

    n_pages: int
    n_stored: int


def parts_of(
    backend: StorageBackend, cache: CacheOfPrompts, prompts: Iterable[bytes]
) -> tuple[list[Part], list[FoundPrompt]]:
    """Looks up the objects of prompts. Pages behind a gap are left out: no prefix reaches them.

    Args:
        backend: open; only asked for presence.
        cache: the cache that stored them.
        prompts: packed token ids of each.

    Returns:
        The objects by namespace, each once, and what there is of each prompt.

    Raises:
        InvalidTokens: a prompt is not packed token ids.
        BackendError: the store cannot answer.
    """
    names = [name for name in (cache.namespace, *cache.groups) if name]
    keys: dict[str, dict[str, None]] = {name: {} for name in names}
    found = []
    for tokens in prompts:
        digests = page_digests(tokens, cache.page_size, chain_seed(cache.request))
        n_pages = n_stored = len(digests) // DIGEST_NBYTES
        if cache.namespace:
            own = object_keys(cache.namespace, digests)
            n_stored = backend.batch_exists(own)
            keys[cache.namespace].update(dict.fromkeys(own[:n_stored]))
        n_units = 0
        for group in cache.groups:
            units = object_keys(group, digests)[:n_stored]
            there = backend.exists_each(units)
            keys[group].update(dict.fromkeys(compress(units, there)))
            n_units = max([n_units, *(n + 1 for n, yes in enumerate(there) if yes)])
        found.append(FoundPrompt(n_pages, n_stored if cache.namespace else n_units))
    return [Part(name, list(its)) for name, its in keys.items()], found
