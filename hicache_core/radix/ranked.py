"""Policies that rank nodes: the lowest rank leaves first, and within a rank the oldest.

A child always comes before its parent, and its rank is at most its parent's. So the first node of
the lowest rank is a leaf, and finding it needs no scan.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import insort
from collections.abc import Callable, Iterator
from sys import getsizeof
from typing import ClassVar

from hicache_core.errors import IntegrityError
from hicache_core.radix.node import Node, path_to_root
from hicache_core.radix.order import Entry, EvictionOrder, EvictionPolicy, TierView


class RankedPolicy(EvictionPolicy):
    """Ranks nodes. The lowest rank is evicted first, and within a rank the oldest.

    Attributes:
        renewed_by_use: whether a match makes a node the youngest of its rank.
    """

    renewed_by_use: ClassVar[bool] = True

    @abstractmethod
    def rank(self, node: Node) -> int:
        """The node's rank. It never falls, and is at least that of every child."""

    def order(self, tier: TierView) -> EvictionOrder:  # noqa: ARG002 - the nodes say enough
        # docstring inherited
        return RankedOrder(self)


class LRU(RankedPolicy):
    """Evicts the least recently used page first."""

    name = "lru"

    def rank(self, node: Node) -> int:  # noqa: ARG002 - all nodes are equal
        # docstring inherited
        return 0


class FIFO(RankedPolicy):
    """Evicts the page first that was inserted first; a prefix counts with its last suffix."""

    name = "fifo"
    renewed_by_use = False

    def rank(self, node: Node) -> int:  # noqa: ARG002 - all nodes are equal
        # docstring inherited
        return 0


class LFU(RankedPolicy):
    """Evicts the least often matched page first, and the oldest of those. Counts stop at 255."""

    name = "lfu"

    def rank(self, node: Node) -> int:
        # docstring inherited
        return min(node.hit_count, 255)


class SLRU(RankedPolicy):
    """Evicts pages last that were matched ``protected_hits`` times; LRU within both groups."""

    name = "slru"

    def __init__(self, protected_hits: int = 2) -> None:
        self.protected_hits = protected_hits

    def rank(self, node: Node) -> int:
        # docstring inherited
        return int(node.hit_count >= self.protected_hits)


class Priority(RankedPolicy):
    """Evicts the lowest priority first, LRU among equals. A prefix has its suffixes' highest."""

    name = "priority"

    def rank(self, node: Node) -> int:
        # docstring inherited
        return node.priority


class RankedOrder(EvictionOrder):
    """One linked list per rank, in which a child comes before its parent.

    A node that is not listed has no pages in the tier, or was locked when its turn came.
    """

    def __init__(self, policy: RankedPolicy) -> None:
        self.policy = policy
        self._entries: dict[Node, Entry] = {}
        self._heads: dict[int, Entry] = {}
        self._ranks: list[int] = []

    def __iter__(self) -> Iterator[Node]:
        # docstring inherited
        for rank in self._ranks:
            head = self._heads[rank]
            entry = head.next
            while entry.node is not None:
                yield entry.node
                entry = entry.next

    def touch(self, *, used: bool, inserted: bool) -> Callable[[Node], None] | None:  # noqa: ARG002
        # docstring inherited; a path that is inserted again counts as used
        return self.renew if inserted or self.policy.renewed_by_use else None

    def renew(self, node: Node) -> None:
        """Make ``node`` the youngest of its rank. The caller renews its ancestors after it."""
        entry = self._entries.get(node)
        if entry is None:
            entry = self._entries[node] = Entry(node)
        else:
            entry.unlink()
        entry.insert_before(self._head(self.policy.rank(node)))

    def place(self, node: Node) -> None:
        # docstring inherited; right before its nearest ancestor, else as the youngest
        if node in self._entries:
            return
        rank = self.policy.rank(node)
        other = self._head(rank)
        for ancestor in path_to_root(node):
            if ancestor in self._entries:
                if self.policy.rank(ancestor) == rank:
                    other = self._entries[ancestor]
                break
        entry = self._entries[node] = Entry(node)
        entry.insert_before(other)

    def split(self, upper: Node, node: Node) -> None:
        # docstring inherited
        entry = self._entries.get(node)
        if entry is not None:
            self._entries[upper] = above = Entry(upper)
            above.insert_before(entry.next)

    def discard(self, node: Node) -> None:
        # docstring inherited
        entry = self._entries.pop(node, None)
        if entry is not None:
            entry.unlink()

    def clear(self) -> None:
        # docstring inherited
        self._entries.clear()
        self._heads.clear()
        self._ranks.clear()

    def victim(self, may_leave: Callable[[Node], bool]) -> Node | None:
        # docstring inherited. Locked nodes met on the way are taken out (their unlock places them
        # again), so they cost one step for each lock and not for each eviction.
        for rank in self._ranks.copy():
            head = self._heads[rank]
            entry = head.next
            while entry.node is not None:
                node, entry = entry.node, entry.next
                if may_leave(node):
                    return node
                if node.lock_count:
                    self.discard(node)
            if head.next is head:
                del self._heads[rank]
                self._ranks.remove(rank)
        return None

    def may_rest(self, node: Node) -> bool:  # noqa: ARG002 - none may
        # docstring inherited
        return False

    def check_integrity(self) -> None:
        # docstring inherited
        passed: set[Node] = set()
        for node in self:
            for ancestor in path_to_root(node):
                if ancestor in passed:
                    raise IntegrityError(f"{node} is listed after {ancestor}, which is above it")
            passed.add(node)
        if passed != set(self._entries):
            raise IntegrityError("the lists hold other nodes than the order knows")

    def memory_nbytes(self) -> int:
        # docstring inherited
        entries = sum(map(getsizeof, self._entries.values()))
        return entries + getsizeof(self._entries) + getsizeof(self._heads) + getsizeof(self._ranks)

    def _head(self, rank: int) -> Entry:
        head = self._heads.get(rank)
        if head is None:
            head = self._heads[rank] = Entry(None)
            insort(self._ranks, rank)
        return head
