"""Who leaves first: the eviction policies and the order that they keep.

One linked list a rank holds the nodes of a tier, and a child always stands before its parent. So
the first node of the lowest rank is a leaf, and no scan is needed to find it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Callable, Iterator
from sys import getsizeof
from typing import ClassVar

from hicache_core.errors import ConfigError
from hicache_core.radix.node import Node, path_to_root


class EvictionPolicy(ABC):
    """Ranks nodes; the lowest rank is evicted first, and within a rank the oldest.

    Attributes:
        name: its name in the config.
        renewed_by_use: a match makes a node the youngest of its rank.
    """

    name: ClassVar[str]
    renewed_by_use: ClassVar[bool] = True

    @abstractmethod
    def rank(self, node: Node) -> int:
        """The node's rank: it never falls, and no child's is above its parent's."""


class LRU(EvictionPolicy):
    """The least recently used page first."""

    name = "lru"

    def rank(self, node: Node) -> int:  # noqa: ARG002 - all nodes are equal
        # docstring inherited
        return 0


class FIFO(EvictionPolicy):
    """The page first that was inserted first; a prefix counts as inserted with its last suffix."""

    name = "fifo"
    renewed_by_use = False

    def rank(self, node: Node) -> int:  # noqa: ARG002 - all nodes are equal
        # docstring inherited
        return 0


class LFU(EvictionPolicy):
    """The least often matched page first, and the oldest of those; counts stop at 255."""

    name = "lfu"

    def rank(self, node: Node) -> int:
        # docstring inherited
        return min(node.hit_count, 255)


class SLRU(EvictionPolicy):
    """Pages that were matched ``protected_hits`` times leave after all others; LRU within both."""

    name = "slru"

    def __init__(self, protected_hits: int = 2) -> None:
        self.protected_hits = protected_hits

    def rank(self, node: Node) -> int:
        # docstring inherited
        return int(node.hit_count >= self.protected_hits)


class Priority(EvictionPolicy):
    """The lowest priority first, LRU among equals; a prefix has the highest of its suffixes."""

    name = "priority"

    def rank(self, node: Node) -> int:
        # docstring inherited
        return node.priority


_POLICIES: dict[str, type[EvictionPolicy]] = {p.name: p for p in (LRU, LFU, FIFO, SLRU, Priority)}
POLICY_NAMES = tuple(_POLICIES)
"""Every policy's name in the config."""


def eviction_policy(name: str) -> EvictionPolicy:
    """The policy of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _POLICIES:
        raise ConfigError(f"no eviction policy {name!r}; allowed: {', '.join(POLICY_NAMES)}")
    return _POLICIES[name]()


class _Entry:
    """A place in a list; the list's head is an entry without node."""

    __slots__ = ("next", "node", "prev")

    def __init__(self, node: Node | None) -> None:
        self.node = node
        self.prev = self
        self.next = self

    def unlink(self) -> None:
        self.prev.next = self.next
        self.next.prev = self.prev

    def insert_before(self, other: _Entry) -> None:
        before = other.prev
        self.prev = before
        self.next = other
        before.next = other.prev = self


class EvictionOrder:
    """The nodes of one tier in the order in which they would leave it.

    A node may stand here though it cannot leave now; :meth:`victim` passes over it. A node that is
    not here has no copy in the tier, or was locked when its turn came.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self._entries: dict[Node, _Entry] = {}
        self._heads: dict[int, _Entry] = {}
        self._ranks: list[int] = []

    def __len__(self) -> int:
        """Nodes in the order."""
        return len(self._entries)

    def __contains__(self, node: Node) -> bool:
        """Whether the node stands in the order."""
        return node in self._entries

    def __iter__(self) -> Iterator[Node]:
        """All nodes, first to leave first."""
        for rank in self._ranks:
            head = self._heads[rank]
            entry = head.next
            while entry.node is not None:
                yield entry.node
                entry = entry.next

    def renew(self, node: Node) -> None:
        """Make ``node`` the youngest of its rank. Its ancestors are to be renewed after it."""
        entry = self._entries.get(node)
        if entry is None:
            entry = self._entries[node] = _Entry(node)
        else:
            entry.unlink()
        entry.insert_before(self._head(self.policy.rank(node)))

    def place(self, node: Node) -> None:
        """Put ``node`` in if it is not: right before its nearest ancestor, else as the youngest."""
        if node in self._entries:
            return
        rank = self.policy.rank(node)
        other = self._head(rank)
        for ancestor in path_to_root(node):
            if ancestor in self._entries:
                if self.policy.rank(ancestor) == rank:
                    other = self._entries[ancestor]
                break
        entry = self._entries[node] = _Entry(node)
        entry.insert_before(other)

    def split(self, upper: Node, node: Node) -> None:
        """Give ``upper`` the place right after ``node``, from which it was split."""
        entry = self._entries.get(node)
        if entry is not None:
            self._entries[upper] = above = _Entry(upper)
            above.insert_before(entry.next)

    def discard(self, node: Node) -> None:
        """Take ``node`` out if it is in."""
        entry = self._entries.pop(node, None)
        if entry is not None:
            entry.unlink()

    def victim(self, may_leave: Callable[[Node], bool]) -> Node | None:
        """The first node that may leave, or None; it stays where it is.

        Locked nodes met on the way are taken out (their unlock places them again), so they cost
        one step for each lock and not for each eviction.
        """
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

    def memory_nbytes(self) -> int:
        """Bytes of the order's own objects, without the nodes."""
        entries = sum(map(getsizeof, self._entries.values()))
        return entries + getsizeof(self._entries) + getsizeof(self._heads) + getsizeof(self._ranks)

    def _head(self, rank: int) -> _Entry:
        head = self._heads.get(rank)
        if head is None:
            head = self._heads[rank] = _Entry(None)
            insort(self._ranks, rank)
        return head
