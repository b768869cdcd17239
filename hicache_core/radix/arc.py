"""ARC: balances recency and frequency, and moves the balance with what is missed.

Megiddo, Modha: «ARC: a self-tuning, low overhead replacement cache», FAST 2003.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from hicache_core.errors import IntegrityError
from hicache_core.radix.ghosts import Ghosts
from hicache_core.radix.node import Node
from hicache_core.radix.order import EvictionOrder, EvictionPolicy, TierView
from hicache_core.radix.queues import NEW, PROVEN, QueueOrder


class ARC(EvictionPolicy):
    """Keeps pages seen once and pages seen again in two LRU lists; their ghosts set their shares.

    A miss of a page that recently left the first list makes that list's share larger; a miss of one
    that left the second makes it smaller. Pages and ghosts together are at most twice the tier's
    pages.

    This differs from the paper, since this is a tree of runs and not a table of objects. Room is
    made before it is known which page comes, so a miss moves the balance only after the eviction
    that it causes. A run of pages has one place. A page leaves after the pages that follow it. The
    pages before a page join the second list with it. A run joins that list if half of its pages are
    ghosts.
    """

    name: ClassVar[str] = "arc"

    def order(self, tier: TierView) -> EvictionOrder:
        # docstring inherited
        return ARCOrder(tier)


class ARCOrder(QueueOrder):
    """``NEW`` is the paper's list T1, ``PROVEN`` its T2; the ghosts are B1 and B2."""

    def __init__(self, tier: TierView) -> None:
        super().__init__(tier)
        self._ghosts = (Ghosts(), Ghosts())
        # The paper's p: pages that NEW may have before it is the one to give.
        self._new_share = 0.0

    def _use(self, node: Node) -> None:
        # docstring inherited
        entry = self._entries.get(node)
        if entry is not None:
            self._move(entry, PROVEN)

    def _enters(self, node: Node) -> int:
        # docstring inherited
        once, again = self._ghosts
        n_once, n_again = len(once), len(again)
        if not n_once and not n_again:
            return NEW
        names = self._names(node)
        missed_once = once.take(names)
        missed_again = again.take(names)
        share = self._new_share
        if missed_once:
            share = min(self._capacity, share + missed_once * max(1.0, n_again / n_once))
        if missed_again:
            share = max(0.0, share - missed_again * max(1.0, n_once / n_again))
        self._new_share = share
        return PROVEN if 2 * (missed_once + missed_again) >= self._size(node) else NEW

    def place(self, node: Node) -> None:
        # docstring inherited
        super().place(node)
        once, again = self._ghosts
        once.trim(self._capacity - self._n_pages[NEW])
        again.trim(2 * self._capacity - sum(self._n_pages) - len(once))

    def _left(self, node: Node, queue: int) -> None:
        # docstring inherited
        self._ghosts[queue].add(self._names(node))

    def victim(self, may_leave: Callable[[Node], bool]) -> Node | None:
        # docstring inherited
        first = NEW if self._n_pages[NEW] > self._new_share else PROVEN
        entry = self._oldest(first, may_leave) or self._oldest(1 - first, may_leave)
        return None if entry is None else entry.node

    def clear(self) -> None:
        # docstring inherited
        super().clear()
        self._new_share = 0.0
        for ghosts in self._ghosts:
            ghosts.clear()

    def check_integrity(self) -> None:
        # docstring inherited
        super().check_integrity()
        once, again = map(len, self._ghosts)
        if self._n_pages[NEW] + once > self._capacity:
            raise IntegrityError(f"{once} ghosts of pages seen once are too many")
        if sum(self._n_pages) + once + again > 2 * self._capacity:
            raise IntegrityError(f"{once} and {again} ghosts are too many")
        if not 0 <= self._new_share <= self._capacity:
            raise IntegrityError(f"the share of new pages is {self._new_share}")

    def memory_nbytes(self) -> int:
        # docstring inherited
        return super().memory_nbytes() + sum(ghosts.memory_nbytes() for ghosts in self._ghosts)
