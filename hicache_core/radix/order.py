"""Eviction order: what the tree asks of every policy, and the linked list that they use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

from hicache_core.radix.ghosts import page_names
from hicache_core.radix.node import Node


class Entry:
    """A node's place in a linked list. The head of a list is an entry without a node."""

    __slots__ = ("next", "node", "prev")

    def __init__(self, node: Node | None) -> None:
        self.node = node
        self.prev = self
        self.next = self

    def unlink(self) -> None:
        """Leave the list. The entry keeps its old neighbours' names."""
        self.prev.next = self.next
        self.next.prev = self.prev

    def insert_before(self, other: Entry) -> None:
        """Join the list of ``other``, right before it. The young end is before the head."""
        before = other.prev
        self.prev = before
        self.next = other
        before.next = other.prev = self


class EvictionOrder(ABC):
    """The nodes of one tier in the order in which they would leave it.

    It may list nodes that cannot leave now; :meth:`victim` passes over them. The tree's owner
    thread makes all calls.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[Node]:
        """All nodes that are listed, the first to leave first."""

    @abstractmethod
    def touch(self, *, used: bool, inserted: bool) -> Callable[[Node], None] | None:
        """Returns what to call for each node of a path, deepest first; None for nothing.

        Args:
            used: the path was matched.
            inserted: the path was inserted, and a node of it is new in the tier.
        """

    @abstractmethod
    def place(self, node: Node) -> None:
        """List ``node``, which came into the tier or was unlocked, unless it is listed already."""

    @abstractmethod
    def split(self, upper: Node, node: Node) -> None:
        """Take in ``upper``, which was just split off ``node``, and leaves right after it."""

    @abstractmethod
    def discard(self, node: Node) -> None:
        """Forget ``node``, which has just lost its pages in the tier. It still has its parent."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all nodes, also those that are only remembered."""

    @abstractmethod
    def victim(self, may_leave: Callable[[Node], bool]) -> Node | None:
        """The first node for which ``may_leave`` is True, or None. It stays in the tier."""

    @abstractmethod
    def may_rest(self, node: Node) -> bool:
        """Whether ``node``, which is in the tier and not locked, may be missing in the lists."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Check the order's own invariants.

        Raises:
            IntegrityError: one does not hold.
        """

    @abstractmethod
    def memory_nbytes(self) -> int:
        """Bytes of the order's own objects, without the nodes."""


@dataclass(frozen=True)
class TierView:
    """What an order knows of its tier.

    Attributes:
        page_size: tokens per page.
        n_children: counts the children of a node that have pages in the tier.
        size: pages, or units of a group, that a node has in the tier.
        names: names of these, by node and tokens per page, for orders that remember who left.
    """

    page_size: int
    n_children: Callable[[Node], int]
    size: Callable[[Node], int] = attrgetter("n_pages")
    names: Callable[[Node, int], list[int]] = page_names


class EvictionPolicy(ABC):
    """An eviction policy. It makes the order of a tier.

    Attributes:
        name: the policy's name in the configuration.
    """

    name: ClassVar[str]

    @abstractmethod
    def order(self, tier: TierView) -> EvictionOrder:
        """A new, empty order for one tier."""
