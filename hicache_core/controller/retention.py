"""Host retention: whether the host keeps pages that storage has; one small object a choice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from hicache_core.radix.node import Node, path_to_root
from hicache_core.radix.tree import RadixTree

NOWHERE = 0
"""The epoch where no storage is attached: no page is stored in it."""


class HostRetention(ABC):
    """Decides which host copies of stored pages there are. Owner thread only; ranks decide alike.

    A page is stored from when a write of it was acknowledged on all ranks.
    """

    @abstractmethod
    def wants(self, node: Node, epoch: int) -> bool:
        """Whether the host is to get a copy of pages that only the device has.

        Args:
            node: the pages.
            epoch: of the storage that is attached; ``NOWHERE`` without one.
        """

    @abstractmethod
    def spare(self, tree: RadixTree, node: Node, epoch: int) -> Iterator[Node]:
        """Nodes whose host pages may go, now that a write of ``node`` has ended, deepest first.

        The caller drops each before it asks for the next.
        """


class KeepOnHost(HostRetention):
    """The host is a cache: pages stay until others need their room."""

    def wants(self, node: Node, epoch: int) -> bool:  # noqa: ARG002
        # docstring inherited
        return True

    def spare(self, tree: RadixTree, node: Node, epoch: int) -> Iterator[Node]:  # noqa: ARG002
        # docstring inherited
        return iter(())


class FreeOnceStored(HostRetention):
    """The host is where pages pass through: storage has them, and others load them from there.

    A page that a request or a copy needs on the host when its write ends stays until it is evicted,
    as does one whose write failed.
    """

    def wants(self, node: Node, epoch: int) -> bool:
        # docstring inherited
        return epoch == NOWHERE or node.stored_in != epoch

    def spare(self, tree: RadixTree, node: Node, epoch: int) -> Iterator[Node]:
        # docstring inherited; the nodes above may have waited for this one
        for at in list(path_to_root(node)):
            if epoch != NOWHERE and at.stored_in == epoch and tree.may_spare_host(at):
                yield at
