"""Residency: which nodes have pages in which tier, what keeps them there, and who leaves first."""

from __future__ import annotations

from array import array
from operator import attrgetter

from hicache_core.errors import IntegrityError
from hicache_core.radix.node import Node, path_to_root, require_in_tree, run_of
from hicache_core.radix.order import EvictionPolicy, TierView


class Residency:
    """The pages of both tiers, by node. Owner thread.

    Every change of a node's pages or locks goes through here, so that the counts, the parents'
    counts of children and the eviction orders follow in one place.

    Attributes:
        device_order: the nodes on the device, in the order in which they would leave it.
        host_order: likewise of the host.
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
            host_policy: likewise of the host.
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
        """Attach ``pages``, which the node now owns; the caller puts it into the order."""
        assert node.device_pages is None
        assert node.parent is not None
        node.device_pages = pages
        node.parent.n_device_children += 1
        self._n_device_pages += node.n_pages
        if node.lock_count:
            self.n_locked_device_pages += node.n_pages

    def lose_device(self, node: Node) -> array[int]:
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
        """Attach ``pages`` as pending, which the node now owns."""
        assert node.host_pages is None
        assert node.parent is not None
        node.host_pages, node.host_pending = pages, True
        node.parent.n_host_children += 1
        self.n_host_pages += node.n_pages

    def lose_host(self, node: Node) -> array[int]:
        assert node.host_pages is not None
        assert node.parent is not None
        pages, node.host_pages, node.host_pending = node.host_pages, None, False
        node.parent.n_host_children -= 1
        self.n_host_pages -= node.n_pages
        self.host_order.discard(node)
        return pages

    def renew(self, node: Node, *, used: bool = False, inserted: bool = False) -> None:
        """Tell the orders of both tiers of a path that was matched or inserted, deepest first."""
        touch_device = self.device_order.touch(used=used, inserted=inserted)
        touch_host = self.host_order.touch(used=used, inserted=False)
        for at in path_to_root(node):
            if touch_device is not None and at.device_pages is not None:
                touch_device(at)
            if touch_host is not None and at.on_host:
                touch_host(at)

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
        """Know ``upper``, which was just split off ``node`` with the first of its pages."""
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
        """Keep the best copy of ``node`` and of all pages before it, until :meth:`unlock`.

        Device pages stay on the device; pages that only the host has stay there.
        """
        require_in_tree(node)
        for at in path_to_root(node):
            if at.lock_count == 0 and at.device_pages is not None:
                self.n_locked_device_pages += at.n_pages
            at.lock_count += 1

    def unlock(self, node: Node) -> None:
        """Take back one :meth:`lock` of ``node``.

        Raises:
            IntegrityError: it is not locked.
        """
        require_in_tree(node)
        if node.n_pages and node.lock_count < 1:
            raise IntegrityError(f"unlock of {node}, which is not locked")
        for at in path_to_root(node):
            at.lock_count -= 1
            if at.lock_count == 0:
                if at.device_pages is not None:
                    self.n_locked_device_pages -= at.n_pages
                    self.device_order.place(at)
                if at.on_host:
                    self.host_order.place(at)

    def lock_host(self, node: Node, n_pages: int) -> None:
        """Keep the host pages of the run of ``n_pages`` that ends at ``node``.

        The device copy may go meanwhile, except where it alone keeps a node above in the tree.

        Raises:
            IntegrityError: the run has no host pages, or starts inside a node.
        """
        members = run_of(node, n_pages)
        for member in members:
            if member.host_pages is None:
                raise IntegrityError(f"host lock of {member}, which has no host pages")
        for member in members:
            member.n_host_readers += 1
        for at in path_to_root(node):
            at.host_lock_count += 1

    def unlock_host(self, node: Node, n_pages: int) -> None:
        """Take back one :meth:`lock_host` with the same arguments."""
        members = run_of(node, n_pages)
        for member in members:
            if member.n_host_readers < 1:
                raise IntegrityError(f"host unlock of {member}, whose host pages are not locked")
        for member in members:
            member.n_host_readers -= 1
        for at in path_to_root(node):
            at.host_lock_count -= 1
