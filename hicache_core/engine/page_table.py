"""PageTable: the device pages of one running sequence, its own and those it shares."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partial

from hicache_core.controller.controller import Controller
from hicache_core.engine.units import SequenceUnits
from hicache_core.kv.keys import pack_tokens
from hicache_core.radix.node import Node
from hicache_core.radix.results import InsertResult
from hicache_core.types import Namespace


class PageTable:
    """Holds pages from admission to the end; owner thread only.

    ::

        pages    | of the tree, kept by the lock on a node | mine: not in the tree |

    What is stored goes from the right part to the left one. Where the tree has the pages of these
    tokens already, under other ids, the sequence goes on in those and its own are free at once:
    kept beside them, it would hold two device pages for one, and might never find room.

    Attributes:
        pages: ids in the device pool, one for each page of the sequence, in order.
        units: what the sequence has of groups of layers.
    """

    def __init__(
        self,
        cache: Controller,
        namespace: Namespace,
        priority: int,
        units: SequenceUnits | None = None,
    ) -> None:
        """Starts empty; ``begin`` fills it.

        Args:
            cache: whose pages the table holds.
            namespace: of the request.
            priority: of its pages, under the priority eviction policy.
            units: empty ones of the groups of the spec; None without groups.
        """
        self.pages = array("i")
        self.units = units or SequenceUnits(cache)
        self._cache = cache
        self._namespace = namespace
        self._priority = priority
        self._mine: set[int] = set()
        self._node: Node | None = None
        self._n_stored = 0
        self._is_received = False
        self._is_passed = False  # the windows at the end of what is stored are not kept

    def another(self) -> PageTable:
        """An empty one for the same request."""
        return PageTable(self._cache, self._namespace, self._priority, self.units.another())

    def begin(self, node: Node, shared: array[int], own: array[int]) -> None:
        """Starts with a match.

        Args:
            node: of the match; the caller has locked it, and the lock goes over.
            shared: pages of the match.
            own: pages behind them, the caller's, which go over too.
        """
        self._node = node
        self._n_stored = len(shared)
        self.pages = shared + own
        self._mine = set(own)

    @property
    def is_sent(self) -> bool:
        """Whether a transfer reads ``pages`` and ``units``.

        Until ``release``, ``pages`` then stay the same, even where the tree has other pages with
        the same tokens, and no unit of the sequence is freed for the tree's.
        """
        return self.units.is_sent

    @is_sent.setter
    def is_sent(self, value: bool) -> None:
        self.units.is_sent = value

    @property
    def n_tokens(self) -> int:
        """Tokens that there is room for."""
        return len(self.pages) * self._cache.page_size

    @property
    def n_stored(self) -> int:
        """Leading pages that the tree knows of."""
        return self._n_stored

    @property
    def has_spares(self) -> bool:
        """Whether it keeps pages or units beside those that the tree has for the same tokens."""
        has_pages = len(self._mine) > len(self.pages) - self._n_stored
        return has_pages or self.units.has_spares

    def extend(self, n_tokens: int) -> None:
        """Makes room for ``n_tokens`` in all.

        Raises:
            PoolExhausted: there is none; nothing changed.
        """
        n_missing = -(-n_tokens // self._cache.page_size) - len(self.pages)
        if n_missing > 0:
            added = self._cache.allocate(n_missing)
            self.pages.extend(added)
            self._mine.update(added)

    def store(self, tokens: Sequence[int], *, keep_end: bool = True) -> None:
        """Puts the whole pages of ``tokens``, all of them computed, into the tree.

        Args:
            tokens: of the sequence, from the first on.
            keep_end: as of ``Controller.insert``.
        """
        n_pages = self.units.n_kept(len(tokens)) // self._cache.page_size
        is_kept_now = keep_end and self._is_passed
        if n_pages > self._n_stored or self._is_received or is_kept_now:
            self._is_received = False
            self._is_passed = self.units.has_windows and not keep_end
            self._put(partial(self._cache.insert, keep_end=keep_end), tokens, n_pages)

    def receive(self, tokens: Sequence[int]) -> None:
        """As ``store``, for a prompt that another node computed: it goes down with what follows."""
        n_pages = len(tokens) // self._cache.page_size
        if n_pages > self._n_stored:
            self._is_received = True
            self._put(self._cache.insert_received, tokens, n_pages)

    def _put(
        self, insert: Callable[..., InsertResult], tokens: Sequence[int], n_pages: int
    ) -> None:
        result = insert(
            pack_tokens(tokens[: n_pages * self._cache.page_size]),
            self.pages[:n_pages],
            self._namespace,
            priority=self._priority,
            groups=self.units.runs(n_pages),
        )
        self._cache.lock(result.node)
        if self._node is not None:
            self._cache.unlock(self._node)
        self._node = result.node
        self._n_stored = n_pages
        self.units.stored(result, n_pages)
        self._mine = set(self.pages[n_pages:])
        if self.is_sent:
            self._mine.update(result.duplicates)
        elif result.duplicates:
            assert self._cache.loads_settled, "the tree's pages may not have arrived yet"
            self.pages[:n_pages] = result.pages
            self._cache.free(result.duplicates)

    def release(self) -> None:
        """Gives everything back; what was stored stays in the cache as long as it may."""
        self.units.release()
        if self._mine:
            self._cache.free(array("i", sorted(self._mine)))
        if self._node is not None:
            self._cache.unlock(self._node)
        self.pages, self._mine, self._node, self._n_stored = array("i"), set(), None, 0
        self._is_received = self._is_passed = False
