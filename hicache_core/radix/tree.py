"""The prefix index: which pages of KV are cached for a prefix of token ids, and in which tier.

A radix tree over packed token ids whose edges end on page boundaries. Tokens are compared with
memcmp, never one by one, and a lookup costs one hash of a page for each node on the way.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from hicache_core.errors import IntegrityError, InvalidTokens
from hicache_core.kv.keys import DIGEST_NBYTES, TOKEN_NBYTES
from hicache_core.radix.audit import check_tree, tree_nbytes
from hicache_core.radix.inflight import InFlight
from hicache_core.radix.node import (
    Node,
    descendants,
    equal_pages,
    keep_tokens,
    node_digests,
    path_to_root,
    require_in_tree,
)
from hicache_core.radix.results import Dropped, InsertResult, Match


class RadixTree(InFlight):
    """The prefix index over both tiers; each seed (tenant, LoRA) has a tree of its own.

    Example:
        >>> from array import array
        >>> from hicache_core.kv.keys import pack_tokens
        >>> from hicache_core.radix.eviction import LRU
        >>> tree = RadixTree(page_size=4, device_policy=LRU(), host_policy=LRU())
        >>> _ = tree.insert(pack_tokens(range(8)), array("i", [5, 3]))
        >>> tree.match(pack_tokens(range(6))).device_pages
        array('i', [5])
    """

    def match(self, tokens: bytes, seed: bytes = b"", *, touch: bool = True) -> Match:
        """Find the longest cached prefix of ``tokens``, in whole pages.

        Args:
            tokens: packed token ids; a tail shorter than a page is ignored.
            seed: chain seed of the namespace.
            touch: count as a use: recency and hits of the path, and a split where the match ends
                inside a node, so that ``Match.node`` ends with the match. False only reads:
                ``Match.node`` is then the deepest node that is matched whole.

        Raises:
            InvalidTokens: ``tokens`` is not a whole number of tokens.
        """
        match = self._walk(tokens, seed, split=touch)
        if touch:
            for used in path_to_root(match.node):
                used.hit_count += 1
            self._renew(match.node, used=True)
        return match

    def locate(self, tokens: bytes, seed: bytes = b"") -> Match:
        """As :meth:`match`, with the split but without counting as a use: to insert below it."""
        return self._walk(tokens, seed, split=True)

    def _walk(self, tokens: bytes, seed: bytes, *, split: bool) -> Match:
        end = self._whole_pages_nbytes(tokens)
        page_nbytes = self._page_nbytes
        device_pages, host_pages = array("i"), array("i")
        node = self._root(seed)
        at = 0
        while at < end:
            child = node.children.get(tokens[at : at + page_nbytes])
            if child is None or not self._is_readable(child):
                break
            pages = child.best_pages
            n_equal = equal_pages(child, tokens, at, page_nbytes)
            if n_equal < child.n_pages:
                if split:
                    child = self._split(child, n_equal)
                pages = pages[:n_equal]
            (host_pages if child.device_pages is None else device_pages).extend(pages)
            if len(pages) < child.n_pages:
                break
            at += len(pages) * page_nbytes
            node = child
        device_node = node
        while device_node.device_pages is None and device_node.parent is not None:
            device_node = device_node.parent
        return Match(device_pages, host_pages, device_node, node, self.page_size)

    def insert(
        self, tokens: bytes, device_pages: array[int], seed: bytes = b"", *, priority: int = 0
    ) -> InsertResult:
        """Record that ``device_pages`` hold the KV of ``tokens``.

        Nodes that are on the device keep their pages, and the caller's come back as duplicates.
        Nodes that only the host has, pending ones too, get the caller's. The rest is a new leaf.

        Args:
            tokens: packed token ids; a tail shorter than a page is ignored.
            device_pages: one id for each whole page of ``tokens``; copied.
            seed: chain seed of the namespace.
            priority: for the priority policy; raises that of the whole path.

        Raises:
            InvalidTokens: ``tokens`` is not a whole number of tokens.
            IntegrityError: the number of pages does not fit the tokens.
        """
        n_total = self._whole_pages_nbytes(tokens) // self._page_nbytes
        if len(device_pages) != n_total:
            raise IntegrityError(
                f"insert of {len(device_pages)} device pages for {n_total} whole pages of tokens"
            )
        pages, duplicates = array("i"), array("i")
        new_nodes: list[Node] = []
        n_known = at = 0
        node = self._root(seed)
        while at < n_total:
            child, is_new = self._descend(node, tokens, at, n_total - at)
            mine = device_pages[at : at + child.n_pages]
            if child.device_pages is None:
                self._gain_device(child, mine)
                new_nodes.append(child)
            else:
                n_known += child.n_pages
                if mine != child.device_pages:
                    both = zip(mine, child.device_pages, strict=True)
                    duplicates.extend(page for page, known in both if page != known)
            pages.extend(child.best_pages)
            at += child.n_pages
            node = child
            if is_new:
                child.priority = priority
                break
        for used in path_to_root(node):
            used.priority = max(used.priority, priority)
        self._renew(node, inserted=bool(new_nodes))
        return InsertResult(node, pages, duplicates, n_known, new_nodes)

    def digests(self, node: Node) -> bytes:
        """Page digests of ``node``, 32 bytes each, packed; computed once and kept in the nodes."""
        require_in_tree(node)
        return node_digests(node, self.page_size)

    def adopt_digests(self, node: Node, n_pages: int, digests: bytes) -> None:
        """Keep the digests of the run of ``n_pages`` that ends at ``node``, computed elsewhere."""
        start = 0
        for member in self.run(node, n_pages):
            stop = start + member.n_pages * DIGEST_NBYTES
            if member.digests is None:
                member.digests = digests[start:stop]
            start = stop

    def last_digest(self, node: Node) -> bytes:
        """Digest of the last page of ``node``, which the next page chains; a root's seed."""
        return self.digests(node)[-DIGEST_NBYTES:] if node.n_pages else node.key

    def path(self, node: Node) -> list[Node]:
        """The nodes from the first page down to ``node``, without the root."""
        return list(path_to_root(node))[::-1]

    def split(self, node: Node, n_pages: int) -> Node:
        """Cut ``node`` behind its first ``n_pages``; returns the new node that holds those.

        Raises:
            IntegrityError: the cut is not inside the node.
        """
        require_in_tree(node)
        if not 0 < n_pages < node.n_pages:
            raise IntegrityError(f"split of {node} behind {n_pages} pages")
        return self._split(node, n_pages)

    def path_digests(self, node: Node) -> bytes:
        """Page digests of the whole prefix that ends at ``node``."""
        self.digests(node)
        return b"".join([at.digests or b"" for at in path_to_root(node)][::-1])

    # -- eviction ----------------------------------------------------------------------------

    def may_drop_device(self, node: Node) -> bool:
        """Nothing below ``node`` is on the device, and no lock keeps its device pages."""
        return (
            node.device_pages is not None
            and node.lock_count == 0
            and node.n_device_children == 0
            and (node.host_lock_count == 0 or node.on_host)
        )

    def may_drop_host(self, node: Node) -> bool:
        """Nothing below ``node`` has host pages, and no lock keeps its own."""
        return (
            node.on_host
            and node.host_lock_count == 0
            and node.n_host_children == 0
            and (node.lock_count == 0 or node.on_device)
        )

    def may_spare_host(self, node: Node) -> bool:
        """As :meth:`may_drop_host`, or the device has the pages and nobody reads the host's.

        Nodes below may have host pages then: they keep their place as long as ``node`` has its own.
        """
        is_spare = node.on_host and node.on_device and node.n_host_readers == 0
        return is_spare or self.may_drop_host(node)

    def may_back_up(self, node: Node) -> bool:
        """As :meth:`may_drop_device`, but for a copy to the host that comes first."""
        return (
            node.device_pages is not None
            and node.host_pages is None
            and node.lock_count == 0
            and node.n_device_children == 0
        )

    def may_leave_or_back_up(self, node: Node) -> bool:
        """:meth:`may_drop_device`, or may after a copy to the host, though pages below are in use.

        That is a node whose host copy has to come first, since host pages below it are being
        stored.
        """
        return self.may_drop_device(node) or self.may_back_up(node)

    def may_orphan(self, node: Node) -> bool:
        """It could leave but for pages below it that only the host has, which are being stored."""
        return (
            node.device_pages is not None
            and node.host_pages is None
            and node.lock_count == 0
            and node.n_device_children == 0
        )

    def device_victim(
        self, max_pages: int, may_leave: Callable[[Node], bool] | None = None
    ) -> Node | None:
        """The node whose device pages go next, or None; it stays in the tree.

        A longer node is split, so that its last ``max_pages`` go first.

        Args:
            max_pages: pages of the victim at most.
            may_leave: which nodes count; :meth:`may_drop_device` by default.
        """
        node = self._device_order.victim(may_leave or self.may_drop_device)
        return None if node is None else self._last_pages(node, max_pages)

    def host_victim(self, max_pages: int) -> Node | None:
        """The node whose host pages go next, or None; else as :meth:`device_victim`."""
        node = self._host_order.victim(self.may_drop_host)
        return None if node is None else self._last_pages(node, max_pages)

    def drop_device(self, node: Node) -> Dropped:
        """Give up the device pages of ``node``.

        Without host copy it leaves the tree, and all below it, which only the host has, too.

        Raises:
            IntegrityError: :meth:`may_drop_device` is False.
        """
        require_in_tree(node)
        if not self.may_drop_device(node):
            raise IntegrityError(f"device pages of {node} are in use")
        device_pages = self._lose_device(node)
        host_pages = array("i")
        if not node.on_host:
            host_pages = self._remove_below(node)
            self._remove(node)
        return Dropped(device_pages, host_pages)

    def drop_host(self, node: Node) -> Dropped:
        """Give up the host pages of ``node``; without device pages it leaves the tree.

        Raises:
            IntegrityError: :meth:`may_spare_host` is False.
        """
        require_in_tree(node)
        if not self.may_spare_host(node):
            raise IntegrityError(f"host pages of {node} are in use")
        host_pages = self._lose_host(node)
        if not node.on_device:
            host_pages.extend(self._remove_below(node))
            self._remove(node)
        return Dropped(array("i"), host_pages)

    def reset(self) -> Dropped:
        """Forget everything; the pages of both tiers are returned, to be freed.

        Raises:
            IntegrityError: something is locked or in flight.
        """
        nodes = self.nodes()
        for node in nodes:
            if node.lock_count or node.host_lock_count:
                raise IntegrityError(f"reset while {node} is in use")
        self._device_order.clear()
        self._host_order.clear()
        dropped = Dropped(array("i"), array("i"))
        for node in reversed(nodes):
            if node.on_device:
                dropped.device_pages.extend(self._lose_device(node))
            if node.host_pages is not None:
                dropped.host_pages.extend(self._lose_host(node))
            self._remove(node)
        return dropped

    def nodes(self) -> list[Node]:
        """All nodes but the roots, parents before children."""
        return [node for root in self._roots.values() for node in descendants(root)]

    # -- audit -------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Check every invariant; walks the whole tree.

        Raises:
            IntegrityError: one does not hold; the message says which and where.
        """
        check_tree(self)

    def memory_nbytes(self) -> int:
        """Bytes of Python memory that the tree keeps alive; walks the whole tree."""
        return tree_nbytes(self)

    # -- helpers -----------------------------------------------------------------------------

    def _whole_pages_nbytes(self, tokens: bytes) -> int:
        if len(tokens) % TOKEN_NBYTES:
            raise InvalidTokens(
                f"packed token ids are {len(tokens)} bytes, not a multiple of {TOKEN_NBYTES}; "
                "pack them with pack_tokens()"
            )
        return len(tokens) - len(tokens) % self._page_nbytes

    def _is_readable(self, node: Node) -> bool:
        return node.device_pages is not None or not (node.host_pending or node in self._doomed)

    def _descend(self, node: Node, tokens: bytes, at: int, n_left: int) -> tuple[Node, bool]:
        """The child of ``node`` that starts ``tokens`` at page ``at``, split or made to fit."""
        page_nbytes = self._page_nbytes
        start = at * page_nbytes
        child = node.children.get(tokens[start : start + page_nbytes])
        if child is None:
            view = memoryview(tokens)[start : start + n_left * page_nbytes]
            return self._add_child(node, keep_tokens(view), n_left), True
        n_equal = equal_pages(child, tokens, start, page_nbytes)
        if n_equal < child.n_pages:
            child = self._split(child, n_equal)
        return child, False

    def _last_pages(self, node: Node, max_pages: int) -> Node:
        if max_pages < 1:
            raise IntegrityError(f"a victim of at most {max_pages} pages was asked for")
        if node.n_pages > max_pages:
            self._split(node, node.n_pages - max_pages)
        return node
