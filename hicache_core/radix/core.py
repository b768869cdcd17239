"""The tree's structure: roots, splits, removal, locks, and the counts and orders of both tiers.

Every change of a node's copies goes through ``_gain_*`` and ``_lose_*``, so that counts, the
parents' child counts and the eviction orders follow in one place.
"""

from __future__ import annotations

from array import array
from operator import attrgetter

from hicache_core.errors import IntegrityError, SpecError
from hicache_core.kv.keys import TOKEN_NBYTES
from hicache_core.radix.node import Node, descendants, path_to_root, require_in_tree, split_node
from hicache_core.radix.order import EvictionPolicy, TierView


class TreeCore:
    """Nodes, locks and counts. One thread, the tree's owner, makes all calls."""

    def __init__(
        self, page_size: int, device_policy: EvictionPolicy, host_policy: EvictionPolicy
    ) -> None:
        if page_size < 1:
            raise SpecError(f"page_size is {page_size}; it is at least 1 token")
        self.page_size = page_size
        self._page_nbytes = page_size * TOKEN_NBYTES
        self._roots: dict[bytes, Node] = {}
        device = TierView(page_size, attrgetter("n_device_children"))
        host = TierView(page_size, attrgetter("n_host_children"))
        self._device_order = device_policy.order(device)
        self._host_order = host_policy.order(host)
        # Device pages of nodes below a failed load_back; their own copies still write into them.
        self._doomed: dict[Node, array[int]] = {}
        self._n_doomed_pages = 0
        self._n_nodes = 0
        self._n_device_pages = 0
        self._n_host_pages = 0
        self._n_locked_device_pages = 0

    @property
    def n_nodes(self) -> int:
        """Nodes, without the roots."""
        return self._n_nodes

    @property
    def n_device_pages(self) -> int:
        """Device pages that the tree owns, those of copies in flight too."""
        return self._n_device_pages + self._n_doomed_pages

    @property
    def n_host_pages(self) -> int:
        """Host pages that the tree owns, pending ones too."""
        return self._n_host_pages

    @property
    def n_evictable_device_pages(self) -> int:
        """Device pages of nodes without a lock."""
        return self._n_device_pages - self._n_locked_device_pages

    # -- locks -------------------------------------------------------------------------------

    def lock(self, node: Node) -> None:
        """Keep the best copy of ``node`` and of all pages before it, until :meth:`unlock`.

        Device pages stay on the device; pages that only the host has stay there.
        """
        require_in_tree(node)
        for at in path_to_root(node):
            if at.lock_count == 0 and at.device_pages is not None:
                self._n_locked_device_pages += at.n_pages
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
                    self._n_locked_device_pages -= at.n_pages
                    self._device_order.place(at)
                if at.on_host:
                    self._host_order.place(at)

    def lock_host(self, node: Node, n_pages: int) -> None:
        """Keep the host pages of the run of ``n_pages`` that ends at ``node``.

        The device copy may go meanwhile, except where it alone keeps a node above in the tree.

        Raises:
            IntegrityError: the run has no host pages, or starts inside a node.
        """
        members = self.run(node, n_pages)
        for member in members:
            if member.host_pages is None:
                raise IntegrityError(f"host lock of {member}, which has no host pages")
        for member in members:
            member.n_host_readers += 1
        for at in path_to_root(node):
            at.host_lock_count += 1

    def unlock_host(self, node: Node, n_pages: int) -> None:
        """Take back one :meth:`lock_host` with the same arguments."""
        members = self.run(node, n_pages)
        for member in members:
            if member.n_host_readers < 1:
                raise IntegrityError(f"host unlock of {member}, whose host pages are not locked")
        for member in members:
            member.n_host_readers -= 1
        for at in path_to_root(node):
            at.host_lock_count -= 1

    def run(self, node: Node, n_pages: int) -> list[Node]:
        """The nodes that make up exactly the ``n_pages`` that end at ``node``, top to bottom.

        Raises:
            IntegrityError: the run starts inside a node or before the root.
        """
        require_in_tree(node)
        members: list[Node] = []
        missing = n_pages
        for at in path_to_root(node):
            if missing <= 0:
                break
            members.append(at)
            missing -= at.n_pages
        if missing:
            raise IntegrityError(f"no run of {n_pages} pages ends at {node}")
        members.reverse()
        return members

    # -- structure ---------------------------------------------------------------------------

    def _root(self, seed: bytes) -> Node:
        """The seed's root; it counts as the tree's only once it has a child."""
        return self._roots.get(seed) or Node(None, seed, b"", 0)

    def _add_child(self, parent: Node, tokens: bytes | memoryview, n_pages: int) -> Node:
        if parent.parent is None:
            parent = self._roots.setdefault(parent.key, parent)
        key = bytes(tokens[: self._page_nbytes])
        child = parent.children[key] = Node(parent, key, tokens, n_pages)
        self._n_nodes += 1
        return child

    def _split(self, node: Node, at: int) -> Node:
        """Split off the first ``at`` pages of ``node`` as a new node above it; returns that."""
        upper = split_node(node, at, self._page_nbytes)
        self._device_order.split(upper, node)
        self._host_order.split(upper, node)
        if node in self._doomed:
            pages = self._doomed[node]
            self._doomed[upper], self._doomed[node] = pages[:at], pages[at:]
        self._n_nodes += 1
        return upper

    def _remove(self, node: Node) -> None:
        """Take a node without pages and without children out of the tree."""
        parent = node.parent
        if parent is None or node.children or node.lock_count or node.host_lock_count:
            raise IntegrityError(f"{node} cannot leave the tree: it is in use")
        del parent.children[node.key]
        node.parent = None
        self._n_nodes -= 1
        if parent.parent is None and not parent.children:
            del self._roots[parent.key]

    def _remove_below(self, node: Node) -> array[int]:
        """Remove all descendants of a node; they have host pages only, which are returned."""
        freed = array("i")
        for below in reversed(list(descendants(node))):
            freed.extend(self._lose_host(below))
            self._remove(below)
        return freed

    # -- copies ------------------------------------------------------------------------------

    def _gain_device(self, node: Node, pages: array[int]) -> None:
        """Attach ``pages``, which the node now owns; the caller puts it into the order."""
        assert node.device_pages is None
        assert node.parent is not None
        node.device_pages = pages
        node.parent.n_device_children += 1
        self._n_device_pages += node.n_pages
        if node.lock_count:
            self._n_locked_device_pages += node.n_pages

    def _lose_device(self, node: Node) -> array[int]:
        assert node.device_pages is not None
        assert node.parent is not None
        pages, node.device_pages, node.device_pending = node.device_pages, None, False
        node.parent.n_device_children -= 1
        self._n_device_pages -= node.n_pages
        if node.lock_count:
            self._n_locked_device_pages -= node.n_pages
        self._device_order.discard(node)
        return pages

    def _gain_host(self, node: Node, pages: array[int]) -> None:
        """Attach ``pages`` as pending, which the node now owns."""
        assert node.host_pages is None
        assert node.parent is not None
        node.host_pages, node.host_pending = pages, True
        node.parent.n_host_children += 1
        self._n_host_pages += node.n_pages

    def _lose_host(self, node: Node) -> array[int]:
        assert node.host_pages is not None
        assert node.parent is not None
        pages, node.host_pages, node.host_pending = node.host_pages, None, False
        node.parent.n_host_children -= 1
        self._n_host_pages -= node.n_pages
        self._host_order.discard(node)
        return pages

    def _renew(self, node: Node, *, used: bool = False, inserted: bool = False) -> None:
        """Tell the orders of both tiers of a path that was matched or inserted, deepest first."""
        touch_device = self._device_order.touch(used=used, inserted=inserted)
        touch_host = self._host_order.touch(used=used, inserted=False)
        for at in path_to_root(node):
            if touch_device is not None and at.device_pages is not None:
                touch_device(at)
            if touch_host is not None and at.on_host:
                touch_host(at)
