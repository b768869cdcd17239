"""The prefix index: which pages of KV are cached for a prefix of token ids, and in which tier.

A radix tree over packed token ids, whose nodes hold whole pages. It compares tokens with memcmp,
never one by one, and a lookup hashes one page for each node on its way.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence

from hicache_core.errors import IntegrityError, InvalidTokens, SpecError
from hicache_core.kv.keys import DIGEST_NBYTES, TOKEN_NBYTES
from hicache_core.radix.audit import check_nodes, check_residency, tree_nbytes
from hicache_core.radix.grouped import Grouped
from hicache_core.radix.holdings import Holdings
from hicache_core.radix.node import (
    Node,
    descendants,
    equal_pages,
    keep_tokens,
    last_on_device,
    loads_below,
    node_digests,
    pending_run,
    raise_priority,
    require_in_tree,
    run_of,
    split_node,
)
from hicache_core.radix.order import EvictionPolicy
from hicache_core.radix.residency import Residency
from hicache_core.radix.results import Dropped, InsertResult, Match, NewUnits, Units


class RadixTree:
    """The prefix index of device and host. Each seed (tenant, LoRA) has a tree of its own.

    One thread, the owner, makes all calls.

    Attributes:
        page_size: tokens a page.
        groups: what nodes hold of groups of layers that need fewer pages than all.

    Example:
        >>> from array import array
        >>> from hicache_core.kv.keys import pack_tokens
        >>> from hicache_core.radix.eviction import LRU
        >>> tree = RadixTree(page_size=4, device_policy=LRU(), host_policy=LRU())
        >>> _ = tree.insert(pack_tokens(range(8)), array("i", [5, 3]))
        >>> tree.match(pack_tokens(range(6))).device_pages
        array('i', [5])
    """

    def __init__(
        self,
        page_size: int,
        device_policy: EvictionPolicy,
        host_policy: EvictionPolicy,
        groups: Sequence[Holdings] = (),
    ) -> None:
        """An empty tree.

        Args:
            page_size: tokens a page.
            device_policy: decides which pages leave the device first.
            host_policy: decides which pages leave the host first.
            groups: what nodes hold of groups of layers, in the order of the spec.

        Raises:
            SpecError: ``page_size`` is less than 1.
        """
        if page_size < 1:
            raise SpecError(f"page_size is {page_size}; it is at least 1 token")
        self.page_size = page_size
        self._page_nbytes = page_size * TOKEN_NBYTES
        self._roots: dict[bytes, Node] = {}
        self._n_nodes = 0
        self._residency = Residency(page_size, device_policy, host_policy)
        self._grouped = Grouped(groups, page_size, self._split)
        self.groups = self._grouped.groups

    @property
    def n_nodes(self) -> int:
        """Number of nodes, without the roots."""
        return self._n_nodes

    @property
    def n_device_pages(self) -> int:
        """Number of device pages that the tree owns, including those of unsettled copies."""
        return self._residency.n_device_pages

    @property
    def n_host_pages(self) -> int:
        """Number of host pages that the tree owns, including pending ones."""
        return self._residency.n_host_pages

    @property
    def n_evictable_device_pages(self) -> int:
        """Number of device pages of nodes without a lock."""
        return self._residency.n_evictable_device_pages

    @property
    def roots(self) -> Collection[Node]:
        """One root for each namespace that has pages, in the order of their first use."""
        return self._roots.values()

    def nodes(self) -> list[Node]:
        """All nodes but the roots, parents before children."""
        return [node for root in self._roots.values() for node in descendants(root)]

    # -- match and insert --------------------------------------------------------------------

    def match(self, tokens: bytes, seed: bytes = b"", *, touch: bool = True) -> Match:
        """Find the longest cached prefix of ``tokens``, in whole pages.

        Args:
            tokens: packed token ids; a tail shorter than a page is ignored.
            seed: chain seed of the namespace.
            touch: True counts as a use, for recency and hits, and splits the node in which the
                match ends. False only reads: ``Match.node`` is the last that matches as a whole.

        Raises:
            InvalidTokens: ``tokens`` is not a whole number of tokens.
        """
        match, tail = self._walk(tokens, seed, split=touch)
        if self.groups:
            match = self._grouped.cut(match, tail)
        if touch:
            used = match.node
            while used.parent is not None:
                used.hit_count += 1
                used = used.parent
            self._residency.renew(match.node, used=True)
            if self.groups:
                self._grouped.renew(match.node, used=True)
        return match

    def locate(self, tokens: bytes, seed: bytes = b"") -> Match:
        """The longest prefix by its full pages alone, without counting as a use: to insert below.

        It splits as :meth:`match` does.
        """
        return self._walk(tokens, seed, split=True)[0]

    def device_part(self, match: Match) -> Match:
        """The longest part of a match that needs nothing of the host."""
        match = match._replace(host_pages=array("i"), node=match.device_node)
        return self._grouped.cut(match, on_device=True) if self.groups else match

    def units(self, node: Node) -> tuple[Units, ...]:
        """By group, what the prefix that ends at ``node`` has."""
        return self._grouped.units(node)

    def insert_host_units(
        self, node: Node, group: int, first: int, units: array[int], stored_in: int
    ) -> array[int]:
        """Give host units of a group, which hold their bytes, to the nodes of a prefix.

        Args:
            node: the end of the prefix.
            group: index of the group.
            first: index of the page that the first unit belongs to.
            units: of consecutive pages; the tree takes over those that it lacks.
            stored_in: number of the storage attachment that has them; 0 for none.

        Returns:
            The others, to be freed.
        """
        return self._grouped.insert_host(node, self.groups[group], first, units, stored_in)

    def _walk(self, tokens: bytes, seed: bytes, *, split: bool) -> tuple[Match, Node | None]:
        """The longest prefix by full pages; and the node that it ends inside of, if not split."""
        tail: Node | None = None
        end = self._whole_pages_nbytes(tokens)
        page_nbytes = self._page_nbytes
        device_pages, host_pages = array("i"), array("i")
        node = self._root(seed)
        at = 0
        while at < end:
            child = node.children.get(tokens[at : at + page_nbytes])
            if child is None or not self._residency.is_readable(child):
                break
            pages = child.best_pages
            n_equal = equal_pages(child, tokens, at, page_nbytes)
            if n_equal < child.n_pages:
                if split:
                    child = self._split(child, n_equal)
                pages = pages[:n_equal]
            (host_pages if child.device_pages is None else device_pages).extend(pages)
            if len(pages) < child.n_pages:
                tail = child
                break
            at += len(pages) * page_nbytes
            node = child
        device_node = last_on_device(node)
        n_tokens = (len(device_pages) + len(host_pages)) * self.page_size
        match = Match(
            device_pages, host_pages, device_node, node, self.page_size, n_uncut_tokens=n_tokens
        )
        return match, tail

    def insert(
        self,
        tokens: bytes,
        device_pages: array[int],
        seed: bytes = b"",
        *,
        priority: int = 0,
        groups: Sequence[Sequence[NewUnits]] = (),
        keep_end: bool = True,
    ) -> InsertResult:
        """Record that ``device_pages`` hold the KV of ``tokens``.

        Nodes on the device keep their pages, and the caller's come back as duplicates. Nodes that
        only the host has, even pending ones, get the caller's pages. The rest becomes a new leaf.

        Args:
            tokens: packed token ids; a tail shorter than a page is ignored.
            device_pages: one id for each whole page of ``tokens``; copied.
            seed: chain seed of the namespace.
            priority: for the priority policy; raises the priority of the whole path.
            groups: by group, runs of filled units; the tree takes over those that it lacks.
            keep_end: False if only a lock keeps the units that the end needs on the device.

        Raises:
            InvalidTokens: ``tokens`` is not a whole number of tokens.
            IntegrityError: the number of pages does not fit the tokens, or units are of others.
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
                self._residency.gain_device(child, mine)
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
        raise_priority(node, priority)
        self._residency.renew(node, inserted=bool(new_nodes))
        result = InsertResult(node, pages, duplicates, n_known, new_nodes)
        if self.groups:
            result = self._grouped.insert(result, n_total, groups, keep_end=keep_end)
        return result

    def digests(self, node: Node) -> bytes:
        """Page digests of ``node``, 32 bytes each, packed; computed once and kept in the nodes."""
        require_in_tree(node)
        return node_digests(node, self.page_size)

    def last_digest(self, node: Node) -> bytes:
        """Digest of the last page of ``node``, which the next page chains; of a root, its seed."""
        return self.digests(node)[-DIGEST_NBYTES:] if node.n_pages else node.key

    def split(self, node: Node, n_pages: int) -> Node:
        """Cut ``node`` after its first ``n_pages``; returns the new node that holds those.

        Raises:
            IntegrityError: the cut is not inside the node.
        """
        require_in_tree(node)
        if not 0 < n_pages < node.n_pages:
            raise IntegrityError(f"split of {node} behind {n_pages} pages")
        return self._split(node, n_pages)

    # -- locks -------------------------------------------------------------------------------

    def lock(self, node: Node) -> None:
        """Keep the best copy of ``node`` and of all pages before it, until :meth:`unlock`.

        Pages that only the host has stay on the host. Locks are counted.

        Raises:
            IntegrityError: the node has left the tree.
        """
        self._residency.lock(node)
        if self.groups:
            self._grouped.lock(node)

    def unlock(self, node: Node) -> None:
        """Take back one :meth:`lock` of ``node``.

        Raises:
            IntegrityError: it is not locked.
        """
        self._residency.unlock(node)
        if self.groups:
            self._grouped.unlock(node)

    def lock_host(self, node: Node, n_pages: int) -> None:
        """Keep the host pages of the run of ``n_pages`` that ends at ``node``.

        The device copy may go meanwhile, except where it alone keeps a node above in the tree.

        Raises:
            IntegrityError: the run has no host pages, or starts inside a node.
        """
        self._residency.lock_host(node, n_pages)

    def unlock_host(self, node: Node, n_pages: int) -> None:
        """Take back one :meth:`lock_host` with the same arguments.

        Raises:
            IntegrityError: the host pages of the run are not locked.
        """
        self._residency.unlock_host(node, n_pages)

    # -- copies in flight: backup, prefetch and load_back begin with attach, end with settle -----
    # From attach to settle the run is locked and its new pages are pending: owned first, filled
    # after. Its last node and its length name a run, so nodes may be split in between.

    def insert_host(
        self, parent: Node, tokens: bytes | memoryview, host_pages: array[int]
    ) -> Node | None:
        """Prefetch begins: add a pending, locked leaf below ``parent``; the host alone has it.

        Args:
            parent: the node after which the pages come (``Match.node``).
            tokens: packed tokens of these pages alone; a view must be of immutable bytes.
            host_pages: one id for each page; the tree owns them now.

        Returns:
            The leaf. None, and nothing has changed, if the tree already has a child with this first
            page: it was computed, or another prefetch reads it.

        Raises:
            IntegrityError: the pages do not fit the tokens, or ``parent`` itself is still pending.
        """
        require_in_tree(parent)
        if not host_pages or len(tokens) != len(host_pages) * self._page_nbytes:
            raise IntegrityError(
                f"{len(host_pages)} host pages for {len(tokens)} bytes of tokens; "
                f"a page has {self._page_nbytes}"
            )
        if parent.host_pending and not parent.on_device:
            raise IntegrityError(f"prefetch below {parent}, whose own pages have not arrived")
        if parent.parent is None:
            parent = self._roots.get(parent.key, parent)
        if bytes(tokens[: self._page_nbytes]) in parent.children:  # a view hashes its whole buffer
            return None
        leaf = self._add_child(parent, keep_tokens(tokens), len(host_pages))
        leaf.priority = parent.priority
        self._residency.gain_host(leaf, host_pages[:])
        self._residency.lock(leaf)
        return leaf

    def attach_host(self, node: Node, host_pages: array[int]) -> None:
        """Backup begins: ``node`` gets pending host pages, and a lock.

        Raises:
            IntegrityError: its device pages have not arrived, it has host pages, or the number of
                pages differs.
        """
        require_in_tree(node)
        if not node.on_device or node.device_pending or node.host_pages is not None:
            raise IntegrityError(f"backup of {node}, which has no device pages or has host pages")
        if len(host_pages) != node.n_pages:
            raise IntegrityError(f"{len(host_pages)} host pages for {node}")
        self._residency.gain_host(node, host_pages[:])
        self._residency.lock(node)

    def commit_host(self, node: Node, n_pages: int, n_ready: int) -> list[Node]:
        """A part of a run has arrived: its first ``n_ready`` pages are hits from now on.

        The run stays locked. Its other ``n_pages - n_ready`` pages are settled later, even if there
        are none.

        Args:
            node: the end of the run.
            n_pages: pages of the run that are pending.
            n_ready: leading pages of them that have arrived.

        Returns:
            The nodes that became valid, top to bottom.

        Raises:
            IntegrityError: the run is not pending, or ``n_ready`` is not within it.
        """
        ready: list[Node] = []
        for member in pending_run(node, n_pages, n_ready):
            if n_ready == 0:
                break
            arrived = self._split(member, n_ready) if n_ready < member.n_pages else member
            arrived.host_pending = False
            n_ready -= arrived.n_pages
            ready.append(arrived)
        for arrived in reversed(ready):
            self._residency.host_order.place(arrived)
        return ready

    def settle_host(self, node: Node, n_pages: int, n_valid: int) -> array[int]:
        """Backup or prefetch ends: the first ``n_valid`` of the run's pages hold their KV.

        Args:
            node: what :meth:`attach_host` was given or :meth:`insert_host` returned.
            n_pages: pages of the run that are pending.
            n_valid: leading pages that arrived.

        Returns:
            Host pages of the others, to be freed. Nodes without device pages leave the tree.

        Raises:
            IntegrityError: the run is not pending, or ``n_valid`` is not within it.
        """
        freed = array("i")
        failed: list[Node] = []
        for member in pending_run(node, n_pages, n_valid):
            if 0 < n_valid < member.n_pages:
                self._split(member, n_valid).host_pending = False
                n_valid = 0
            elif n_valid:
                member.host_pending = False
                n_valid -= member.n_pages
                continue
            freed.extend(self._residency.lose_host(member))
            failed.append(member)
        self._residency.unlock(node)
        for member in reversed(failed):
            if not member.on_device:
                self._remove(member)
        return freed

    def attach_device(self, node: Node, n_pages: int, device_pages: array[int]) -> None:
        """load_back begins: the run of ``n_pages`` that ends at ``node`` gets device pages.

        A match finds them at once, since readers wait for each layer. Until it is settled the run
        is locked, and so are its host pages, which are being read.

        Args:
            node: the end of the run.
            n_pages: pages of the run.
            device_pages: one id for each page; copied.

        Raises:
            IntegrityError: the run is not on the host alone, or its prefix is not on the device.
        """
        members = run_of(node, n_pages)
        if len(device_pages) != n_pages or not members:
            raise IntegrityError(f"{len(device_pages)} device pages for a run of {n_pages}")
        above = members[0].parent
        if above is not None and above.parent is not None and not above.on_device:
            raise IntegrityError(f"load_back of {members[0]}, whose prefix is not on the device")
        for member in members:
            if member.on_device or not member.on_host or member in self._residency.doomed:
                raise IntegrityError(f"load_back of {member}, which is not on the host alone")
        start = 0
        for member in members:
            self._residency.gain_device(member, device_pages[start : start + member.n_pages])
            member.device_pending = True
            start += member.n_pages
        self._residency.lock(node)
        self._residency.lock_host(node, n_pages)
        self._residency.renew(node, inserted=True)

    def settle_device(self, node: Node, n_pages: int, *, ok: bool) -> array[int]:
        """load_back ends. If it failed, the run loses its device pages.

        Loads below a failed run are worthless too: they lose their pages now, and their own settle
        returns them, whatever its ``ok`` is.

        Args:
            node: the end of the run.
            n_pages: pages of the run.
            ok: whether the pages hold their KV.

        Returns:
            Device pages to be freed; none if all is well.

        Raises:
            IntegrityError: the run was not being loaded, or it failed and something was computed
                from its pages and inserted, before the load was known to be good.
        """
        members = run_of(node, n_pages)
        doomed = [member for member in members if member in self._residency.doomed]
        if not doomed and not all(member.device_pending for member in members):
            raise IntegrityError(f"settle of {n_pages} pages up to {node}, which are not loading")
        loading = [] if doomed or ok else loads_below(members)
        self._residency.unlock_host(node, n_pages)
        self._residency.unlock(node)
        freed = array("i")
        for member in doomed:
            freed.extend(self._residency.take_doomed(member))
        if doomed:
            return freed
        for member in members:
            if ok:
                member.device_pending = False
            else:
                freed.extend(self._residency.lose_device(member))
        for below in loading:
            self._residency.doom(below)
        return freed

    # -- eviction ----------------------------------------------------------------------------

    def device_victim(
        self, max_pages: int, may_leave: Callable[[Node], bool] | None = None
    ) -> Node | None:
        """The node whose device pages go next, or None. It stays in the tree.

        A longer node is split, so that its last ``max_pages`` go first.

        Args:
            max_pages: most pages of the victim.
            may_leave: which nodes count; ``Node.may_drop_device`` by default.
        """
        node = self._residency.device_order.victim(may_leave or Node.may_drop_device)
        return None if node is None else self._last_pages(node, max_pages)

    def host_victim(self, max_pages: int) -> Node | None:
        """The node whose host pages go next, or None; otherwise as :meth:`device_victim`."""
        node = self._residency.host_order.victim(Node.may_drop_host)
        return None if node is None else self._last_pages(node, max_pages)

    def drop_device(self, node: Node) -> Dropped:
        """Give up the device pages of ``node``.

        A node without host copy leaves the tree, with all below it, which only the host has.

        Raises:
            IntegrityError: ``Node.may_drop_device`` is False.
        """
        require_in_tree(node)
        if not node.may_drop_device():
            raise IntegrityError(f"device pages of {node} are in use")
        device_pages = self._residency.lose_device(node)
        host_pages = array("i")
        if not node.on_host:
            host_pages = self._remove_below(node)
            self._remove(node)
        return Dropped(device_pages, host_pages)

    def drop_host(self, node: Node) -> Dropped:
        """Give up the host pages of ``node``. Without device pages it leaves the tree.

        Raises:
            IntegrityError: ``Node.may_spare_host`` is False.
        """
        require_in_tree(node)
        if not node.may_spare_host():
            raise IntegrityError(f"host pages of {node} are in use")
        host_pages = self._residency.lose_host(node)
        if not node.on_device:
            host_pages.extend(self._remove_below(node))
            self._remove(node)
        return Dropped(array("i"), host_pages)

    def reset(self) -> Dropped:
        """Forget everything. Returns the pages of both tiers, to be freed.

        Raises:
            IntegrityError: something is locked or in flight.
        """
        nodes = self.nodes()
        for node in nodes:
            if node.lock_count or node.host_lock_count:
                raise IntegrityError(f"reset while {node} is in use")
        self._residency.device_order.clear()
        self._residency.host_order.clear()
        dropped = Dropped(array("i"), array("i"))
        for node in reversed(nodes):
            if node.on_device:
                dropped.device_pages.extend(self._residency.lose_device(node))
            if node.host_pages is not None:
                dropped.host_pages.extend(self._residency.lose_host(node))
            self._remove(node)
        return dropped

    def check_integrity(self) -> None:
        """Check every invariant. Walks the whole tree.

        Raises:
            IntegrityError: one does not hold; the message says which one and where.
        """
        nodes = check_nodes(self._roots, self._page_nbytes)
        if len(nodes) != self._n_nodes:
            raise IntegrityError(
                f"the tree has {len(nodes)} nodes, but {self._n_nodes} are counted"
            )
        check_residency(self._residency, nodes)
        self._grouped.check_integrity(nodes)

    def memory_nbytes(self) -> int:
        """Bytes of Python memory that the tree keeps alive. Walks the whole tree."""
        return tree_nbytes(self._roots.values(), self._residency)

    # -- structure ---------------------------------------------------------------------------

    def _whole_pages_nbytes(self, tokens: bytes) -> int:
        if len(tokens) % TOKEN_NBYTES:
            raise InvalidTokens(
                f"packed token ids are {len(tokens)} bytes, not a multiple of {TOKEN_NBYTES}; "
                "pack them with pack_tokens()"
            )
        return len(tokens) - len(tokens) % self._page_nbytes

    def _root(self, seed: bytes) -> Node:
        """The root of ``seed``; it belongs to the tree only once it has a child."""
        return self._roots.get(seed) or Node(None, seed, b"", 0)

    def _add_child(self, parent: Node, tokens: bytes | memoryview, n_pages: int) -> Node:
        if parent.parent is None:
            parent = self._roots.setdefault(parent.key, parent)
        key = bytes(tokens[: self._page_nbytes])
        child = parent.children[key] = Node(parent, key, tokens, n_pages)
        self._n_nodes += 1
        return child

    def _split(self, node: Node, at: int) -> Node:
        """Split off the first ``at`` pages of ``node`` as a new node above it; returns that one."""
        upper = split_node(node, at, self._page_nbytes)
        self._residency.split(upper, node)
        if self.groups:
            self._grouped.split(upper, node)
        self._n_nodes += 1
        return upper

    def _remove(self, node: Node) -> None:
        """Take a node without pages and without children out of the tree."""
        parent = node.parent
        if parent is None or node.children or node.lock_count or node.host_lock_count:
            raise IntegrityError(f"{node} cannot leave the tree: it is in use")
        if self.groups:
            self._grouped.remove(node)
        del parent.children[node.key]
        node.parent = None
        self._n_nodes -= 1
        if parent.parent is None and not parent.children:
            del self._roots[parent.key]

    def _remove_below(self, node: Node) -> array[int]:
        """Remove all descendants of a node, which have host pages only; returns those."""
        freed = array("i")
        for below in reversed(list(descendants(node))):
            freed.extend(self._residency.lose_host(below))
            self._remove(below)
        return freed

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
