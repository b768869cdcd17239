"""A turn: one prompt that is computed over the pages of a cache."""

from __future__ import annotations

import itertools
import logging
import sys
import time
from array import array

from hicache_core.controller.controller import Controller
from hicache_core.errors import InvalidTokens, PoolExhausted, UseAfterClose
from hicache_core.integrations.identity import ModelIdentity
from hicache_core.integrations.overrides import Overrides
from hicache_core.integrations.paged_cache import PagedCache, TurnCache
from hicache_core.integrations.tokens import Tokens, token_list
from hicache_core.integrations.turn_units import TurnUnits
from hicache_core.kv.keys import TOKEN_NBYTES, pack_tokens
from hicache_core.pools.device import DevicePool
from hicache_core.process.shield import shield
from hicache_core.radix.node import Node
from hicache_core.radix.results import cached_tokens
from hicache_core.types import CachedTokens, Namespace

log = logging.getLogger(__name__)

# How long to sleep between two polls of a running prefetch.
_POLL_S = 0.0005

_numbers = itertools.count(1)


class Turn:
    """One prompt that is being computed; made by ``CachedModel.turn``.

    Every lock and page that it takes is recorded in the same step, which no signal interrupts, so
    that ``end`` releases all of them wherever the turn was left.

    Attributes:
        past: the cache to pass to the model, for one ``generate`` or for forward passes of the
            caller; it holds the prefix that was found.
        cached: tokens of the prompt that were cached, by tier.
    """

    past: PagedCache
    cached: CachedTokens

    def __init__(
        self,
        cache: Controller,
        pool: DevicePool,
        identity: ModelIdentity,
        overrides: Overrides,
        snapshot_interval: int,
    ) -> None:
        """Takes no lock and no page before ``begin``.

        Args:
            cache: the cache; the calling thread owns it.
            pool: its device pool.
            identity: tells when weights or adapters of the model have changed.
            overrides: settings of the model that a turn changes while it lasts.
            snapshot_interval: tokens from one snapshot of a state to the next.
        """
        self._cache = cache
        self._pool = pool
        self._identity = identity
        self._overrides = overrides
        page_size = pool.page_size
        self._snapshot_interval = -(-snapshot_interval // page_size) * page_size
        self._n_storable = sys.maxsize
        self._ended = ""
        # What ``end`` must release:
        self._request_id: str | None = None
        self._node: Node | None = None
        self._new_pages = array("i")
        self._units = TurnUnits(cache, pool)

    def begin(
        self, tokens: bytes, namespace: Namespace, inputs: str | None, *, from_nothing: bool
    ) -> None:
        """Finds, fetches and loads the longest cached prefix.

        Args:
            tokens: the prompt, packed.
            namespace: the caller's namespace.
            inputs: a digest of what the KV depends on besides tokens; None for nothing.
            from_nothing: ignore what is cached and compute the whole prompt.
        """
        self._asked_for = namespace, inputs
        self._namespace = self._identity.namespace(namespace, inputs)
        self._overrides.apply()
        usable = b"" if from_nothing else tokens[:-TOKEN_NBYTES]
        with shield:
            self._cache.poll()
        from_storage = 0 if from_nothing else self._fetch(tokens)
        with shield:
            match = self._cache.match_prefix(
                usable,
                self._namespace,
                request_id=self._request_id,
                n_behind=(len(tokens) - len(usable)) // TOKEN_NBYTES,
            )
            self._cache.lock(match.node)
            self._node = match.node
            self._match = loaded = self._cache.load_back(match)
            self._units.note_loaded(match, loaded)
            if loaded.node is not match.node:  # a shorter prefix needs other units of its groups
                self._cache.lock(loaded.node)
                self._cache.unlock(match.node)
                self._node = loaded.node
        self.cached = cached_tokens(match, loaded, from_storage)
        self.past = TurnCache(
            self._pool, loaded.device_pages, self._cache.wait_layer, loaded.groups
        )

    def boundaries(self, n_prompt: int) -> list[int]:
        """Where forward passes over a prompt end, so that ``snapshot`` can be called there.

        They are the last page boundary that leaves a token to compute, where the full pages that
        were found end, and one in each snapshot interval. Without a state, there are none.
        """
        if not self.past.has_state:
            return []
        last = (n_prompt - 1) // self._pool.page_size * self._pool.page_size
        wanted = {last, self._match.n_uncut_tokens, *range(0, last, self._snapshot_interval)}
        return sorted(at for at in wanted if self.past.get_seq_length() < at <= last)

    def keep_only(self, n_tokens: int) -> None:
        """Stores no more than the first ``n_tokens`` tokens, later on."""
        self._n_storable = n_tokens

    def snapshot(self, *, of_answer: bool = False) -> None:
        """Keeps the states of the model as they are now, if the sequence ends with a page.

        Args:
            of_answer: keep only the last one of these.
        """
        self._units.snapshot(self.past, replacing=of_answer)

    def _fetch(self, tokens: bytes) -> int:
        """Asks storage for what device and host lack, and waits as long as the policy allows.

        Returns:
            Tokens that storage delivered.
        """
        self._request_id = request_id = f"turn-{next(_numbers)}"
        with shield:
            asked = self._cache.prefetch(request_id, tokens, self._namespace)
        while asked:
            with shield:
                asked = not self._cache.prefetch_ready(request_id)
            if asked:
                time.sleep(_POLL_S)
                with shield:
                    self._cache.poll()
        with shield:
            return self._cache.finish_prefetch(request_id)

    def store(self, tokens: Tokens, *, priority: int = 0) -> int:
        """Inserts the whole pages that the model computed into the cache.

        Args:
            tokens: the prompt and all following tokens. The last token of an answer may be among
                them, although the model has not seen it: only what ``past`` holds is stored.
            priority: for the eviction policy ``priority``.

        Returns:
            How many tokens of the sequence are cached now: all up to the last whole page, or only
            the prefix if the device pool has no room, or if weights or adapters have changed since
            the turn began.

        Raises:
            InvalidTokens: fewer tokens than the model has seen.
            UseAfterClose: the turn has ended.
        """
        if self._ended:
            raise UseAfterClose(self._ended)
        ids = token_list(tokens)
        n_seen = self.past.get_seq_length()
        if len(ids) < n_seen:
            raise InvalidTokens(
                f"the model has seen {n_seen} tokens; only {len(ids)} were given (a generate of "
                "your own with use_cache=False shows it all of them again at each step)"
            )
        n_seen = min(n_seen, self.past.pure.n_rows, self._n_storable)
        page_size = self._cache.page_size
        n_pages, n_shared = n_seen // page_size, self.past.n_shared_pages
        if self._identity.namespace(*self._asked_for) != self._namespace:
            log.warning("nothing is stored: weights or adapters changed while the turn lasted")
            return n_shared * page_size
        packed = pack_tokens(ids[: n_pages * page_size])
        stored = self._match.device_pages[:n_shared]
        try:
            with shield:
                self._new_pages = self._cache.allocate(n_pages - n_shared)
            self.past.write_pages(n_shared, self._new_pages)
            for stop in self._units.stops(n_shared, n_pages):
                stored = self._insert(packed, stored, stop, priority)
        except PoolExhausted as error:
            log.warning("%d tokens are not cached: %s", n_seen - len(stored) * page_size, error)
        finally:
            self._give_back_pages()
        return len(stored) * page_size

    def _insert(self, packed: bytes, stored: array[int], stop: int, priority: int) -> array[int]:
        """Inserts a sequence up to page ``stop``; the pages ``stored`` are in the tree already.

        Returns:
            The pages that are in the tree now, ``stop`` of them.
        """
        groups = self._units.fill(self.past, len(stored), stop)
        with shield:
            n_new = stop - len(stored)
            result = self._cache.insert(
                packed[: stop * self._cache.page_size * TOKEN_NBYTES],
                stored + self._new_pages[:n_new],
                self._namespace,
                priority=priority,
                groups=groups,
                keep_end=n_new == len(self._new_pages),
            )
            self._new_pages = self._new_pages[n_new:]
            self._cache.free(result.duplicates)
            self._units.note_inserted(groups, result)
            self._cache.poll()
        return result.pages

    def _give_back_pages(self) -> None:
        with shield:
            pages, self._new_pages = self._new_pages, array("i")
            if pages:
                self._cache.free(pages)

    def end(self, reason: str) -> None:
        """Releases everything that the turn has taken; a second call does nothing.

        Args:
            reason: the message of the error that later uses raise.
        """
        with shield:
            if self._ended:
                return
            self._ended = reason
            if hasattr(self, "past"):
                self.past.end(reason)
            self._overrides.undo()
            if self._request_id is not None:
                self._cache.finish_prefetch(self._request_id)
            self._give_back_pages()
            self._units.give_back()
            if self._node is not None:
                self._cache.unlock(self._node)
