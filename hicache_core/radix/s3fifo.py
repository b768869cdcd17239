"""S3-FIFO: three first-in, first-out queues, for pages that are mostly used once.

Yang, Zhang, Qiu, Yue, Vinayak: «FIFO queues are all you need for cache eviction», SOSP 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from hicache_core.errors import IntegrityError
from hicache_core.radix.ghosts import Ghosts
from hicache_core.radix.node import Node
from hicache_core.radix.order import EvictionOrder, EvictionPolicy, TierView
from hicache_core.radix.queues import NEW, PROVEN, QueueEntry, QueueOrder

_MOST_USES = 3


class S3FIFO(EvictionPolicy):
    """Passes new pages through a small queue; those used twice in it, or missed soon after, stay.

    The small queue holds a tenth of the tier's pages. A page whose turn comes there goes to the
    main queue if it was used at least twice. Otherwise it leaves the tier and becomes a ghost;
    there are as many ghosts as the main queue has pages. In the main queue each use, up to three,
    buys one more round.

    This differs from the paper, since this is a tree of runs and not a table of objects. A run of
    pages has one counter. A page leaves after the pages that follow it, and then its turn comes at
    once. The pages before a page move to the main queue with it. A run joins the main queue if half
    of its pages are ghosts. An eviction ends with the first run that leaves, even if moves have
    filled the main queue.
    """

    name: ClassVar[str] = "s3fifo"

    def order(self, tier: TierView) -> EvictionOrder:
        # docstring inherited
        return S3FIFOOrder(tier)


class S3FIFOOrder(QueueOrder):
    """``NEW`` is the paper's queue S, ``PROVEN`` its M, and ``uses`` its counter of two bits."""

    def __init__(self, tier: TierView) -> None:
        super().__init__(tier)
        self._ghosts = Ghosts()

    def _use(self, node: Node) -> None:
        # docstring inherited
        entry = self._entries.get(node)
        if entry is not None and entry.uses < _MOST_USES:
            entry.uses += 1

    def _enters(self, node: Node) -> int:
        # docstring inherited
        if not len(self._ghosts):
            return NEW
        known = self._ghosts.take(self._names(node))
        return PROVEN if 2 * known >= self._size(node) else NEW

    def _left(self, node: Node, queue: int) -> None:
        # docstring inherited
        if queue == NEW:
            self._ghosts.add(self._names(node))
            self._ghosts.trim(self._capacity * 9 // 10)

    def victim(self, may_leave: Callable[[Node], bool]) -> Node | None:
        # docstring inherited. It ends: a promotion takes from NEW for good, a round costs a use.
        while True:
            first = NEW if 10 * self._n_pages[NEW] >= self._capacity else PROVEN
            entry = self._oldest(first, may_leave) or self._oldest(1 - first, may_leave)
            if entry is None or entry.node is None:
                return None
            if entry.queue == NEW and self._is_worth_keeping(entry):
                continue
            if entry.queue == PROVEN and entry.uses:
                entry.uses -= 1
                self._move(entry, PROVEN)
                continue
            return entry.node

    def _is_worth_keeping(self, entry: QueueEntry) -> bool:
        """Promote the node, or only its prefix, which is at least as old, so its turn came too."""
        node = entry.node
        assert node is not None
        if entry.uses > 1:
            self._prove(node)
            return True
        above = None if node.parent is None else self._entries.get(node.parent)
        if above is not None and above.node is not None and above.uses > 1:
            self._prove(above.node)
        return False

    def clear(self) -> None:
        # docstring inherited
        super().clear()
        self._ghosts.clear()

    def check_integrity(self) -> None:
        # docstring inherited
        super().check_integrity()
        if 10 * len(self._ghosts) > 9 * self._capacity:
            raise IntegrityError(f"{len(self._ghosts)} ghosts are too many")

    def memory_nbytes(self) -> int:
        # docstring inherited
        return super().memory_nbytes() + self._ghosts.memory_nbytes()
