"""An order of leaving: what the tree asks of every eviction policy, and the list that they use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from hicache_core.radix.node import Node


class Entry:
    """A node's place in a linked list; the list's head is an entry without node."""

    __slots__ = ("next", "node", "prev")

    def __init__(self, node: Node | None) -> None:
        self.node = node
        self.prev = self
        self.next = self

    def unlink(self) -> None:
        """Leave the list; the entry keeps naming its old neighbours."""
        self.prev.next = self.next
        self.next.prev = self.prev

    def insert_before(self, other: Entry) -> None:
        """Join the list of ``other``; before the head is the young end."""
        before = other.prev
        self.prev = before
        self.next = other
        before.next = other.prev = self


class EvictionOrder(ABC):
    """The nodes of one tier in the order in which they would leave it.

    A node may stand here though it cannot leave now; :meth:`victim` passes over it. The tree's
    owner thread makes all calls.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[Node]:
        """All nodes that stand in a list, first to leave first."""

    @abstractmethod
    def touch(self, *, used: bool, inserted: bool) -> Callable[[Node], None] | None:
        """What to call for each node of a path, deepest first; None if nothing is to be done.

        Args:
            used: the path was matched.
            inserted: it was not, and a node of it came into the tier just now.
        """

    @abstractmethod
    def place(self, node: Node) -> None:
        """Take in ``node``, which came into the tier or was unlocked, if it does not stand here."""

    @abstractmethod
    def split(self, upper: Node, node: Node) -> None:
        """Know ``upper``, which was just split off ``node``: it leaves right after it."""

    @abstractmethod
    def discard(self, node: Node) -> None:
        """Forget ``node``, which has lost its copy in the tier but still has its parent."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all nodes, and all that is remembered of others."""

    @abstractmethod
    def victim(self, may_leave: Callable[[Node], bool]) -> Node | None:
        """The first node that may leave, or None; it stays in the tier."""

    @abstractmethod
    def may_rest(self, node: Node) -> bool:
        """Whether ``node``, which is in the tier and not locked, may be in no list now."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Check what the order knows of its nodes.

        Raises:
            IntegrityError: a rule does not hold.
        """

    @abstractmethod
    def memory_nbytes(self) -> int:
        """Bytes of the order's own objects, without the nodes."""


@dataclass(frozen=True)
class TierView:
    """What an order may know of its tier.

    Attributes:
        page_size: tokens a page.
        n_children: children of a node that have pages in the tier.
    """

    page_size: int
    n_children: Callable[[Node], int]


class EvictionPolicy(ABC):
    """Makes the order of a tier.

    Attributes:
        name: its name in the config.
    """

    name: ClassVar[str]

    @abstractmethod
    def order(self, tier: TierView) -> EvictionOrder:
        """A new, empty order for one tier."""
