"""Copies in flight: backup, prefetch and load_back begin with attach and end with settle.

The pages are owned first and filled after: from attach to settle the run is locked and its new
pages are pending. Splits in between are fine, since a run is named by its last node and its length.
"""

from __future__ import annotations

from array import array

from hicache_core.errors import IntegrityError
from hicache_core.radix.core import TreeCore
from hicache_core.radix.node import Node, descendants, keep_tokens, require_in_tree


class InFlight(TreeCore):
    """The part of the tree that knows pages whose bytes are still on their way."""

    def insert_host(
        self, parent: Node, tokens: bytes | memoryview, host_pages: array[int]
    ) -> Node | None:
        """Prefetch begins: add a pending, locked leaf below ``parent``; the host alone has it.

        Args:
            parent: the node after which the pages come (``Match.node``).
            tokens: packed tokens of these pages alone; a view must be of immutable bytes.
            host_pages: one id for each page; the tree owns them now.

        Returns:
            The leaf, or None (and nothing changed) where the tree has a child with this first page
            by now: computed, or under way by another prefetch.

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
        self._gain_host(leaf, host_pages[:])
        self.lock(leaf)
        return leaf

    def attach_host(self, node: Node, host_pages: array[int]) -> None:
        """Backup begins: ``node`` gets pending host pages beside its device pages, and a lock.

        Raises:
            IntegrityError: it has no arrived device pages, has host pages, or the count differs.
        """
        require_in_tree(node)
        if not node.on_device or node.device_pending or node.host_pages is not None:
            raise IntegrityError(f"backup of {node}, which has no device pages or has host pages")
        if len(host_pages) != node.n_pages:
            raise IntegrityError(f"{len(host_pages)} host pages for {node}")
        self._gain_host(node, host_pages[:])
        self.lock(node)

    def commit_host(self, node: Node, n_pages: int, n_ready: int) -> list[Node]:
        """A part of a run has arrived: its first ``n_ready`` pages are hits from now on.

        The run that ends at ``node`` stays locked; what is left of it, ``n_pages - n_ready`` pages,
        is settled later (with 0 pages if nothing is left).

        Returns:
            The nodes that became valid, top to bottom.

        Raises:
            IntegrityError: the run is not pending, or ``n_ready`` is not within it.
        """
        if not 0 <= n_ready <= n_pages:
            raise IntegrityError(f"{n_ready} pages arrived of a run of {n_pages}")
        members = self.run(node, n_pages)
        if not all(member.host_pending for member in members):
            raise IntegrityError(f"pages of the {n_pages} up to {node} arrived, but not all wait")
        ready: list[Node] = []
        for member in members:
            if n_ready == 0:
                break
            arrived = self._split(member, n_ready) if n_ready < member.n_pages else member
            arrived.host_pending = False
            n_ready -= arrived.n_pages
            ready.append(arrived)
        for arrived in reversed(ready):
            self._host_order.place(arrived)
        return ready

    def settle_host(self, node: Node, n_pages: int, n_valid: int) -> array[int]:
        """Backup or prefetch ends: the first ``n_valid`` of the run's pages hold their KV.

        Args:
            node: what :meth:`attach_host` was given or :meth:`insert_host` returned.
            n_pages: the run's length, as it was at the beginning.
            n_valid: leading pages that arrived.

        Returns:
            Host pages of the others, to be freed. Those without a device copy leave the tree.

        Raises:
            IntegrityError: the run is not pending, or ``n_valid`` is not within it.
        """
        if not 0 <= n_valid <= n_pages:
            raise IntegrityError(f"{n_valid} valid pages in a run of {n_pages}")
        members = self.run(node, n_pages)
        if not all(member.host_pending for member in members):
            raise IntegrityError(f"settle of {n_pages} pages up to {node}, which are not pending")
        freed = array("i")
        failed: list[Node] = []
        for member in members:
            if 0 < n_valid < member.n_pages:
                self._split(member, n_valid).host_pending = False
                n_valid = 0
            elif n_valid:
                member.host_pending = False
                n_valid -= member.n_pages
                continue
            freed.extend(self._lose_host(member))
            failed.append(member)
        self.unlock(node)
        for member in reversed(failed):
            if not member.on_device:
                self._remove(member)
        return freed

    def attach_device(self, node: Node, n_pages: int, device_pages: array[int]) -> None:
        """load_back begins: the run of ``n_pages`` that ends at ``node`` gets device pages.

        A match counts them as present at once, since readers wait for each layer. Until settled
        the run is locked, and so are its host pages, which are being read.

        Raises:
            IntegrityError: the run is not one on the host alone, right below the device run.
        """
        members = self.run(node, n_pages)
        if len(device_pages) != n_pages or not members:
            raise IntegrityError(f"{len(device_pages)} device pages for a run of {n_pages}")
        above = members[0].parent
        if above is not None and above.parent is not None and not above.on_device:
            raise IntegrityError(f"load_back of {members[0]}, whose prefix is not on the device")
        for member in members:
            if member.on_device or not member.on_host or member in self._doomed:
                raise IntegrityError(f"load_back of {member}, which is not on the host alone")
        start = 0
        for member in members:
            self._gain_device(member, device_pages[start : start + member.n_pages])
            member.device_pending = True
            start += member.n_pages
        self.lock(node)
        self.lock_host(node, n_pages)
        self._renew(node, inserted=True)

    def settle_device(self, node: Node, n_pages: int, *, ok: bool) -> array[int]:
        """load_back ends; if it failed, the device pages are detached and returned, to be freed.

        Loads in flight below a failed run are worthless too: they are detached now, and their own
        settle returns their pages whatever its ``ok``.

        Raises:
            IntegrityError: the run was not being loaded, or it failed and something was computed
                on top of it, which nobody may insert before the load is known to be good.
        """
        members = self.run(node, n_pages)
        doomed = [member for member in members if member in self._doomed]
        if not doomed and not all(member.device_pending for member in members):
            raise IntegrityError(f"settle of {n_pages} pages up to {node}, which are not loading")
        loading = [] if doomed or ok else self._loads_below(members)
        self.unlock_host(node, n_pages)
        self.unlock(node)
        freed = array("i")
        for member in doomed:
            freed.extend(self._doomed.pop(member))
        self._n_doomed_pages -= len(freed)
        if doomed:
            return freed
        for member in members:
            if ok:
                member.device_pending = False
            else:
                freed.extend(self._lose_device(member))
        for below in loading:
            self._doomed[below] = self._lose_device(below)
            self._n_doomed_pages += below.n_pages
        return freed

    def _loads_below(self, members: list[Node]) -> list[Node]:
        """The nodes below a failed run that have device pages; all of them are still loading."""
        inside = set(members)
        below = [at for at in descendants(members[0]) if at.on_device and at not in inside]
        for at in below:
            if not at.device_pending:
                raise IntegrityError(f"{at} was inserted below a run whose load then failed")
        return below
