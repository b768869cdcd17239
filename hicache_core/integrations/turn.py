"""A turn: one prompt that is computed over the pages of a cache."""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from collections.abc import Sequence

from hicache_core.controller.controller import Controller
from hicache_core.errors import InvalidTokens, PoolExhausted, UseAfterClose
from hicache_core.integrations.identity import ModelIdentity
from hicache_core.integrations.overrides import Overrides
from hicache_core.integrations.paged_cache import PagedCache, TurnCache
from hicache_core.integrations.tokens import Tokens, token_list
from hicache_core.kv.keys import TOKEN_NBYTES, pack_tokens
from hicache_core.pools.device import DevicePool
from hicache_core.process.shield import shield
from hicache_core.radix.node import Node
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
        windows: Sequence[int],
    ) -> None:
        """Takes no lock and no page before ``begin``.

        Args:
            cache: the cache; the calling thread owns it.
            pool: its device pool.
            identity: tells when weights or adapters of the model have changed.
            overrides: settings of the model that a turn changes while it lasts.
            windows: the window of each layer of the model, 0 for none.
        """
        self._cache = cache
        self._pool = pool
        self._identity = identity
        self._overrides = overrides
        self._windows = windows
        self._ended = ""
        # What ``end`` must release:
        self._request_id: str | None = None
        self._node: Node | None = None
        self._new_pages = array("i")

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
            before = self._cache.match_prefix(usable, self._namespace, touch=False)
        if not from_nothing:
            self._fetch(tokens)
        with shield:
            match = self._cache.match_prefix(
                usable,
                self._namespace,
                request_id=self._request_id,
                n_behind=(len(tokens) - len(usable)) // TOKEN_NBYTES,
            )
            self._cache.lock(match.node)
            self._node = match.node
            self._match = self._cache.load_back(match)
        self.cached = CachedTokens(
            before.n_device_tokens,
            before.n_host_tokens,
            max(0, match.n_tokens - before.n_tokens),
        )
        if self._match.n_tokens < match.n_tokens:  # no room on the device for what the host has
            self.cached = CachedTokens(device=self._match.n_tokens)
        self.past = TurnCache(
            self._pool, self._match.device_pages, self._cache.wait_layer, self._windows
        )

    def _fetch(self, tokens: bytes) -> None:
        """Asks storage for what device and host lack, and waits as long as the policy allows."""
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
            self._cache.finish_prefetch(request_id)

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
        n_seen = min(n_seen, self.past.pure.n_rows)
        page_size = self._cache.page_size
        n_pages, n_shared = n_seen // page_size, self.past.n_shared_pages
        if self._identity.namespace(*self._asked_for) != self._namespace:
            log.warning("nothing is stored: weights or adapters changed while the turn lasted")
            return n_shared * page_size
        try:
            with shield:
                self._new_pages = self._cache.allocate(n_pages - n_shared)
            self.past.write_pages(n_shared, self._new_pages)
            pages = self._match.device_pages[:n_shared] + self._new_pages
            packed = pack_tokens(ids[: n_pages * page_size])
            with shield:
                result = self._cache.insert(packed, pages, self._namespace, priority=priority)
                self._new_pages = array("i")
                self._cache.free(result.duplicates)
                self._cache.poll()
        except PoolExhausted as error:
            log.warning("%d tokens are not cached: %s", n_seen - n_shared * page_size, error)
            return n_shared * page_size
        finally:
            self._give_back_pages()
        return n_pages * page_size

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
            if self._node is not None:
                self._cache.unlock(self._node)
