"""Eviction orders of two queues, between which nodes move: the base of S3-FIFO and ARC.

A node whose turn comes while it is locked, or while it has children in the tier, leaves its queue
and *rests*. Its unlock, or the departure of its last child, puts it back at the old end, since its
turn had come. So a search for a victim passes over each such node once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from sys import getsizeof

from hicache_core.errors import IntegrityError
from hicache_core.radix.node import Node, path_to_root
from hicache_core.radix.order import Entry, EvictionOrder, TierView

NEW, PROVEN = 0, 1


class QueueEntry(Entry):
    """A node's place: in a queue, or resting.

    Attributes:
        queue: ``NEW`` or ``PROVEN``, even while it rests.
        size: pages, or units of a group, that the node has in the tier.
        uses: a count that the policy keeps.
    """

    __slots__ = ("queue", "size", "uses")

    def __init__(self, node: Node | None, queue: int, size: int = 0, uses: int = 0) -> None:
        """Rests: it is in no queue yet.

        Args:
            node: has this place; None for the head of a queue.
            queue: ``NEW`` or ``PROVEN``.
            size: of the node in the tier.
            uses: first value of the policy's count.
        """
        super().__init__(node)
        self.queue = queue
        self.size = size
        self.uses = uses

    @property
    def rests(self) -> bool:
        """Whether it is not in its queue."""
        return self.next is self

    def rest(self) -> None:
        """Leave the queue, if it is in it."""
        self.unlink()
        self.next = self.prev = self


class QueueOrder(EvictionOrder):
    """Two queues of nodes, with their sizes in pages.

    What the papers call capacity is the most pages that the tier has held at once.
    """

    def __init__(self, tier: TierView) -> None:
        self._tier = tier
        self._page_size = tier.page_size
        self._size = tier.size
        self._names_of = tier.names
        self._entries: dict[Node, QueueEntry] = {}
        self._heads = (QueueEntry(None, NEW), QueueEntry(None, PROVEN))
        self._n_pages = [0, 0]
        self._capacity = 0

    # -- what a policy decides ---------------------------------------------------------------

    @abstractmethod
    def _use(self, node: Node) -> None:
        """Count a use of ``node``, which is on a path that was matched. Deeper nodes come first."""

    @abstractmethod
    def _enters(self, node: Node) -> int:
        """The queue that ``node`` joins, which comes into the tier."""

    @abstractmethod
    def _left(self, node: Node, queue: int) -> None:
        """Note that ``node`` left the tier from ``queue``; the sizes still count it."""

    # -- what the tree tells -----------------------------------------------------------------

    def __iter__(self) -> Iterator[Node]:
        # docstring inherited
        for head in self._heads:
            entry = head.next
            while entry.node is not None:
                yield entry.node
                entry = entry.next

    def touch(self, *, used: bool, inserted: bool) -> Callable[[Node], None] | None:
        # docstring inherited
        if used:
            return self._use
        return self.place if inserted else None

    def place(self, node: Node) -> None:
        # docstring inherited
        entry = self._entries.get(node)
        if entry is not None:
            self._wake(node)
            return
        queue = self._enters(node)
        size = self._size(node)
        entry = self._entries[node] = QueueEntry(node, queue, size)
        self._n_pages[queue] += size
        self._capacity = max(self._capacity, sum(self._n_pages))
        entry.insert_before(self._heads[queue])
        if queue == PROVEN and node.parent is not None:
            self._prove(node.parent)

    def split(self, upper: Node, node: Node) -> None:
        # docstring inherited; ``upper`` has a child, so it rests
        entry = self._entries.get(node)
        if entry is not None:
            size = self._size(upper)
            entry.size -= size
            self._entries[upper] = QueueEntry(upper, entry.queue, size, entry.uses)

    def discard(self, node: Node) -> None:
        # docstring inherited
        entry = self._entries.pop(node, None)
        if entry is not None:
            entry.rest()
            self._left(node, entry.queue)
            self._n_pages[entry.queue] -= entry.size
        if node.parent is not None:
            self._wake(node.parent)

    def clear(self) -> None:
        # docstring inherited
        self._entries.clear()
        for head in self._heads:
            head.rest()
        self._n_pages = [0, 0]
        self._capacity = 0

    def may_rest(self, node: Node) -> bool:
        # docstring inherited
        return self._tier.n_children(node) > 0

    # -- moves -------------------------------------------------------------------------------

    def _wake(self, node: Node) -> None:
        """Put a resting node without children back, at the old end of its queue."""
        entry = self._entries.get(node)
        if entry is not None and entry.rests and not self._tier.n_children(node):
            entry.insert_before(self._heads[entry.queue].next)

    def _move(self, entry: QueueEntry, queue: int) -> None:
        """Make a node the youngest of ``queue``."""
        assert entry.node is not None
        self._n_pages[entry.queue] -= entry.size
        self._n_pages[queue] += entry.size
        entry.unlink()
        entry.queue = queue
        entry.insert_before(self._heads[queue])

    def _prove(self, node: Node) -> None:
        """Move ``node`` and all above it to ``PROVEN``: a prefix is worth as much as its suffix."""
        for at in path_to_root(node):
            entry = self._entries.get(at)
            if entry is None:
                continue
            if entry.queue == PROVEN:
                break
            entry.uses = 0
            self._move(entry, PROVEN)

    def _oldest(self, queue: int, may_leave: Callable[[Node], bool]) -> QueueEntry | None:
        """The first of ``queue`` that may leave; nodes before it that cannot are sent to rest."""
        entry = self._heads[queue].next
        while entry.node is not None:
            node, here, entry = entry.node, entry, entry.next
            if may_leave(node):
                assert isinstance(here, QueueEntry)
                return here
            if node.lock_count or self._tier.n_children(node):
                assert isinstance(here, QueueEntry)
                here.rest()
        return None

    def _names(self, node: Node) -> list[int]:
        return self._names_of(node, self._page_size)

    # -- audit -------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        # docstring inherited
        sizes = [0, 0]
        linked = 0
        for node, entry in self._entries.items():
            sizes[entry.queue] += self._size(node)
            linked += not entry.rests
        if sizes != self._n_pages:
            raise IntegrityError(f"queues of {sizes} pages, {self._n_pages} counted")
        if linked != len(list(self)):
            raise IntegrityError(f"{linked} nodes are linked, {len(list(self))} are in a queue")

    def memory_nbytes(self) -> int:
        # docstring inherited
        return getsizeof(self._entries) + sum(map(getsizeof, self._entries.values()))
