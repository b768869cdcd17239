"""Prefixes and groups: where every group has what it needs, and which nodes get new units."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from hicache_core.errors import IntegrityError
from hicache_core.kv.spec import GroupKind
from hicache_core.radix.holdings import Holdings, Part, Split
from hicache_core.radix.node import Node, last_on_device, path_to
from hicache_core.radix.results import InsertResult, Match, NewUnits, Units


class Grouped:
    """The groups of one tree. Owner thread; called by the tree if there is a group.

    Attributes:
        groups: what nodes hold of each, in the order of the spec.
    """

    def __init__(self, groups: Sequence[Holdings], page_size: int, split: Split) -> None:
        """Holds nothing yet.

        Args:
            groups: what nodes hold of each group.
            page_size: tokens of a page.
            split: splits a node of the tree.
        """
        self.groups = tuple(groups)
        self._page_size = page_size
        self._split = split  # which calls ``split`` of this object too

    def renew(self, node: Node, *, used: bool) -> None:
        """As ``Residency.renew``, for the units of the prefix that ends at ``node``."""
        for held in self.groups:
            held.renew(node, self._split, used=used)

    def lock(self, node: Node) -> None:
        """Keeps the units that the prefix which ends at ``node`` needs."""
        for held in self.groups:
            held.lock(node, self._split)

    def unlock(self, node: Node) -> None:
        """Takes back one ``lock`` of ``node``."""
        for held in self.groups:
            held.unlock(node)

    def split(self, upper: Node, node: Node) -> None:
        """Takes in ``upper``, which was just split off ``node`` with its first pages."""
        for held in self.groups:
            held.split(upper, node)

    def remove(self, node: Node) -> None:
        """Frees what a node has, which is about to leave the tree."""
        for held in self.groups:
            held.remove(node)

    def check_integrity(self, nodes: Sequence[Node]) -> None:
        """Checks every group against ``nodes``, the whole tree.

        Raises:
            IntegrityError: names what does not hold.
        """
        known = set(nodes)
        for held in self.groups:
            held.check_integrity(known)

    def cut(self, match: Match, tail: Node | None = None, *, on_device: bool = False) -> Match:
        """The longest part of a match at whose end every group has what it needs.

        Args:
            match: by full pages.
            tail: a node below it whose first pages the match ends with, not split off.
            on_device: units that only the host has do not count.
        """
        n_pages = match.n_tokens // self._page_size
        path: list[Part] = [(node, node.n_pages) for node in path_to(match.node)]
        if tail is not None:
            path.append((tail, n_pages - tail.depth_pages))
        cut_by = ""
        while path:
            lacking = self._lacking(path, on_device=on_device)
            if lacking is None:
                break
            cut_by = cut_by or lacking.group.name
            path.pop()
        node, n_used = path[-1] if path else (_root_of(match.node), 0)
        n_left = node.depth_pages + n_used
        if n_used < node.n_pages and node.parent is not None:
            node = node.parent
        device_pages = match.device_pages[:n_left]
        return Match(
            device_pages,
            match.host_pages[: n_left - len(device_pages)],
            last_on_device(node),
            node,
            self._page_size,
            tuple(held.units(path) for held in self.groups),
            cut_by,
            n_pages * self._page_size,
        )

    def _lacking(self, path: Sequence[Part], *, on_device: bool) -> Holdings | None:
        """The first group without all that one needs to go on after ``path``."""
        for held in self.groups:
            if not held.cover(path, on_device=on_device):
                return held
        return None

    def insert(
        self,
        result: InsertResult,
        n_pages: int,
        groups: Sequence[Sequence[NewUnits]],
        *,
        keep_end: bool,
    ) -> InsertResult:
        """Gives units to the nodes of a prefix that was just inserted.

        Args:
            result: of the insert; its list of new nodes follows the splits.
            n_pages: pages of the prefix.
            groups: as for ``RadixTree.insert``.
            keep_end: likewise.

        Raises:
            IntegrityError: units are not of pages of the prefix.
        """

        def split(node: Node, n_pages: int) -> Node:
            return self._split_new(node, node.depth_pages + n_pages, result.new_nodes)

        duplicates: list[array[int]] = []
        for held, runs in zip(self.groups, groups or [()] * len(self.groups), strict=True):
            duplicates.append(array("i"))
            for run in runs:
                duplicates[-1].extend(
                    self._insert_run(result, n_pages, held, run, keep_end=keep_end)
                )
            held.renew(result.node, split, used=False, keep_end=keep_end)
        units = self.units(result.node)
        return result._replace(unit_duplicates=tuple(duplicates), units=units)

    def units(self, node: Node) -> tuple[Units, ...]:
        """By group, what the prefix that ends at ``node`` has."""
        path = [(at, at.n_pages) for at in path_to(node)]
        return tuple(held.units(path) for held in self.groups)

    def _insert_run(
        self,
        result: InsertResult,
        n_pages: int,
        held: Holdings,
        run: NewUnits,
        *,
        keep_end: bool,
    ) -> array[int]:
        """Gives the units of one run to the nodes of an inserted path; returns the duplicates.

        ::

            pages of the path   0 ........ run.first ........ needed ........ run's end .... n_pages
            units of a window              | leave the device | stay, if ``keep_end`` |
        """
        is_state = held.group.kind is GroupKind.STATE
        stop = run.first + (1 if is_state else len(run.device))
        if not 0 <= run.first < stop <= n_pages or (is_state and len(run.device) != 1):
            raise IntegrityError(
                f"group {held.group.name!r}: {len(run.device)} units from page {run.first} on, of "
                f"a prefix of {n_pages} pages"
            )
        if is_state:
            (node,) = self._between(result.node, stop - 1, stop, result.new_nodes, only_end=True)
            return held.gain_device(node, run.device[:])
        duplicates = array("i")
        needed = held.group.first_needed(n_pages, self._page_size)
        middle = min(max(run.first, needed), stop)
        for start, end in ((run.first, middle), (middle, stop)):
            for node in self._between(result.node, start, end, result.new_nodes):
                at = node.depth_pages - run.first
                had = held.get(node)
                is_new = had is None or had.device is None
                duplicates.extend(held.gain_device(node, run.device[at : at + node.n_pages]))
                holding = held.get(node)
                if is_new and (end <= needed or not keep_end) and holding is not None:
                    holding.leaves = True
        return duplicates

    def insert_host(
        self, node: Node, held: Holdings, first: int, units: array[int], stored_in: int
    ) -> array[int]:
        """Gives host units that hold their bytes to the nodes of a prefix.

        Args:
            node: the end of the prefix.
            held: the group.
            first: index of the page that the first unit belongs to.
            units: of consecutive pages; the tree takes over those that it lacks.
            stored_in: number of the storage attachment that has them; 0 for none.

        Returns:
            The others, to be freed.
        """
        is_state = held.group.kind is GroupKind.STATE
        freed = array("i")
        stop = min(first + len(units), node.depth_pages + node.n_pages)
        for at in self._between(node, first, stop, [], only_end=is_state):
            start = 0 if is_state else at.depth_pages - first
            mine = units[start : start + held.n_units(at)]
            if not held.gain_host(at, mine, stored_in):
                freed.extend(mine)
        freed.extend(units[max(0, stop - first) :])
        return freed

    def _between(
        self, end: Node, start: int, stop: int, new_nodes: list[Node], *, only_end: bool = False
    ) -> list[Node]:
        """The nodes of a path that have exactly its pages from ``start`` to ``stop``.

        Args:
            end: the last node of the path.
            start: index of the first page.
            stop: index after the last page.
            new_nodes: a list that gets the new node of each split beside the node that was split.
            only_end: look for the one node that ends at ``stop``, wherever it starts.
        """
        nodes: list[Node] = []
        at: Node | None = end
        while start < stop and at is not None and at.n_pages:
            if at.depth_pages < stop < at.depth_pages + at.n_pages:
                at = self._split_new(at, stop, new_nodes)
            if at.depth_pages < start < at.depth_pages + at.n_pages and not only_end:
                self._split_new(at, start, new_nodes)
            if at.depth_pages < stop:
                nodes.append(at)
            if at.depth_pages <= start or (only_end and nodes):
                break
            at = at.parent
        nodes.reverse()
        return nodes

    def _split_new(self, node: Node, n_pages: int, new_nodes: list[Node]) -> Node:
        """Splits a node after ``n_pages`` pages of its path; returns the new node above it."""
        upper = self._split(node, n_pages - node.depth_pages)
        if node in new_nodes:
            new_nodes.insert(new_nodes.index(node), upper)
        return upper


def _root_of(node: Node) -> Node:
    while node.parent is not None:
        node = node.parent
    return node
