"""Residency: which nodes have pages in which tier, what keeps them there, and who leaves first."""

from __future__ import annotations

from array import array
from operator import attrgetter

from hicache_core.errors import IntegrityError
from hicache_core.radix.node import Node, require_in_tree, run_of
from hicache_core.radix.order import EvictionPolicy, TierView


class Residency:
    """The pages of both tiers, by node. Owner thread.

    Every change of a node's pages or locks goes through here, so that the counts, the parents'
    counts of children and the eviction orders follow in one place. Walks to the root are plain
    loops: each request makes some thirty of them, and a generator takes as long as the loop.

    Attributes:
        device_order: the nodes on the device, in the order in which they would leave it.
        host_order: the nodes on the host, in the order in which they would leave it.
        doomed: device pages of nodes below a failed load_back, which their own copies still write
            into, by node; the nodes have lost them already.
        n_host_pages: host pages of all nodes, pending ones too.
        n_locked_device_pages: device pages of locked nodes.
    """

    def __init__(
        self, page_size: int, device_policy: EvictionPolicy, host_policy: EvictionPolicy
    ) -> None:
        """Starts without pages.

        Args:
            page_size: tokens a page.
            device_policy: makes the order in which nodes leave the device.
            host_policy: makes the order in which nodes leave the host.
        """
        device = TierView(page_size, attrgetter("n_device_children"))
        host = TierView(page_size, attrgetter("n_host_children"))
        self.device_order = device_policy.order(device)
        self.host_order = host_policy.order(host)
        self.doomed: dict[Node, array[int]] = {}
        self.n_host_pages = 0
        self.n_locked_device_pages = 0
        self._n_device_pages = 0
        self._n_doomed_pages = 0

    @property
    def n_device_pages(self) -> int:
        """Device pages of all nodes, and the doomed ones."""
        return self._n_device_pages + self._n_doomed_pages

    @property
    def n_evictable_device_pages(self) -> int:
        """Device pages of nodes without a lock."""
        return self._n_device_pages - self.n_locked_device_pages

    # Pages.

    def gain_device(self, node: Node, pages: array[int]) -> None:
        """Give ``pages`` to a node that has none; the caller puts it into the order."""
        assert node.device_pages is None
        assert node.parent is not None
        node.device_pages = pages
        node.parent.n_device_children += 1
        self._n_device_pages += node.n_pages
        if node.lock_count:
            self.n_locked_device_pages += node.n_pages

    def lose_device(self, node: Node) -> array[int]:
        """Take its device pages from a node; returns them."""
        assert node.device_pages is not None
        assert node.parent is not None
        pages, node.device_pages, node.device_pending = node.device_pages, None, False
        node.parent.n_device_children -= 1
        self._n_device_pages -= node.n_pages
        if node.lock_count:
            self.n_locked_device_pages -= node.n_pages
        self.device_order.discard(node)
        return pages

    def gain_host(self, node: Node, pages: array[int]) -> None:
        """Give ``pages`` to a node that has none; they are pending."""
        assert node.host_pages is None
        assert node.parent is not None
        node.host_pages, node.host_pending = pages, True
        node.parent.n_host_children += 1
        self.n_host_pages += node.n_pages

    def lose_host(self, node: Node) -> array[int]:
        """Take its host pages from a node; returns them."""
        assert node.host_pages is not None
        assert node.parent is not None
        pages, node.host_pages, node.host_pending = node.host_pages, None, False
        node.parent.n_host_children -= 1
        self.n_host_pages -= node.n_pages
        self.host_order.discard(node)
        return pages

    def renew(self, node: Node, *, used: bool = False, inserted: bool = False) -> None:
        """Tell both orders that a path was matched or inserted.

        Args:
            node: the end of the path.
            used: it was matched.
            inserted: it was inserted, and a node of it is new on the device.
        """
        touch_device = self.device_order.touch(used=used, inserted=inserted)
        touch_host = self.host_order.touch(used=used, inserted=False)
        at = node
        while at.parent is not None:
            if touch_device is not None and at.device_pages is not None:
                touch_device(at)
            if touch_host is not None and at.host_pages is not None and not at.host_pending:
                touch_host(at)
            at = at.parent

    def doom(self, node: Node) -> None:
        """Take the device pages from ``node``, and keep them until its copy has ended."""
        self.doomed[node] = self.lose_device(node)
        self._n_doomed_pages += node.n_pages

    def take_doomed(self, node: Node) -> array[int]:
        """Give up the doomed pages of ``node``, whose copy has ended."""
        pages = self.doomed.pop(node)
        self._n_doomed_pages -= len(pages)
        return pages

    def split(self, upper: Node, node: Node) -> None:
        """Take in ``upper``, which was just split off ``node`` with its first pages."""
        self.device_order.split(upper, node)
        self.host_order.split(upper, node)
        if node in self.doomed:
            pages = self.doomed[node]
            self.doomed[upper], self.doomed[node] = pages[: upper.n_pages], pages[upper.n_pages :]

    def is_readable(self, node: Node) -> bool:
        """Whether a match may use the node's pages, which may still be on their way up."""
        if node.device_pages is not None:
            return True
        return not (node.host_pending or node in self.doomed)

    # Locks.

    def lock(self, node: Node) -> None:
        """See ``RadixTree.lock``."""
        require_in_tree(node)
        at = node
        while at.parent is not None:
            if at.lock_count == 0 and at.device_pages is not None:
                self.n_locked_device_pages += at.n_pages
            at.lock_count += 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        """See ``RadixTree.unlock``."""
        require_in_tree(node)
        if node.n_pages and node.lock_count < 1:
            raise IntegrityError(f"unlock of {node}, which is not locked")
        at = node
        while at.parent is not None:
            at.lock_count -= 1
            if at.lock_count == 0:
                if at.device_pages is not None:
                    self.n_locked_device_pages -= at.n_pages
                    self.device_order.place(at)
                if at.on_host:
                    self.host_order.place(at)
            at = at.parent

    def lock_host(self, node: Node, n_pages: int) -> None:
        """See ``RadixTree.lock_host``."""
        members = run_of(node, n_pages)
        for member in members:
            if member.host_pages is None:
                raise IntegrityError(f"host lock of {member}, which has no host pages")
        for member in members:
            member.n_host_readers += 1
        at = node
        while at.parent is not None:
            at.host_lock_count += 1
            at = at.parent

    def unlock_host(self, node: Node, n_pages: int) -> None:
        """See ``RadixTree.unlock_host``."""
        members = run_of(node, n_pages)
        for member in members:
            if member.n_host_readers < 1:
                raise IntegrityError(f"host unlock of {member}, whose host pages are not locked")
        for member in members:
            member.n_host_readers -= 1
        at = node
        while at.parent is not None:
            at.host_lock_count -= 1
            at = at.parent
