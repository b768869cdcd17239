"""Holdings: which nodes have units of a group of layers, what keeps them, and who leaves first.

A node's full pages are in the tree itself. A group needs less: a window only the last pages of a
prefix, a state one snapshot at its end. So a node holds either all its pages of a window group or
none, and of a state the snapshot at its last page or none. Its units come and go independently of
its full pages, and go for good when the node leaves the tree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

from hicache_core.errors import IntegrityError
from hicache_core.kv.spec import Group, GroupKind
from hicache_core.pools.pins import PinnedUnits
from hicache_core.radix.ghosts import last_page_name, page_names
from hicache_core.radix.node import Node, cut, path_to_root
from hicache_core.radix.order import EvictionOrder, EvictionPolicy, TierView
from hicache_core.radix.results import LACKING, Units
from hicache_core.types import Tier

Split = Callable[[Node, int], Node]
"""Cuts a node after its first pages; returns the new node above it, which has those."""

Part = tuple[Node, int]
"""A node of a path, and how many of its leading pages are meant."""


class Holding:
    """What one node has of a group; never empty.

    Attributes:
        device: unit ids in the device pool, one for each page of the node (one in all of a state).
        host: unit ids in the host pool.
        stored_in: as ``Node.stored_in``.
        is_copied: a copy from the device to the host has not settled.
        leaves: the device gives it up as soon as the host has it, or cannot get it, and no lock
            keeps it.
    """

    __slots__ = ("device", "host", "is_copied", "leaves", "stored_in")

    def __init__(self) -> None:
        self.device: array[int] | None = None
        self.host: array[int] | None = None
        self.stored_in = 0
        self.is_copied = False
        self.leaves = False


class Run:
    """A node whose units a call reads, and the nodes that are split off it meanwhile, in order.

    Attributes:
        nodes: some of them may have left the tree.
    """

    __slots__ = ("nodes",)

    def __init__(self, node: Node) -> None:
        self.nodes = [node]


class UnitObserver(ABC):
    """Is told which units nodes gain and lose. Owner thread; must not raise."""

    @abstractmethod
    def gained(self, tier: Tier, node: Node) -> None:
        """A tier has the units of ``node`` from now on, readable."""

    @abstractmethod
    def lost(self, tier: Tier, node: Node, cause: str) -> None:
        """A tier has lost the units of ``node``, which is still in the tree.

        Args:
            tier: device or host.
            node: whose units they were.
            cause: one word, such as ``evicted``.
        """


class _Nobody(UnitObserver):
    def gained(self, tier: Tier, node: Node) -> None:
        pass

    def lost(self, tier: Tier, node: Node, cause: str) -> None:
        pass


class Holdings:
    """The units of one group, by node. Owner thread; the tree tells it of splits and removals.

    Attributes:
        group: the group.
        page_size: tokens of a page of the tree.
        device: units of the device pool.
        host: units of the host pool; None without a host tier.
        n_device_units: units on the device that nodes have.
        n_host_units: likewise on the host.
        observer: is told of gains and losses.
    """

    def __init__(
        self,
        group: Group,
        page_size: int,
        policies: tuple[EvictionPolicy, EvictionPolicy],
        device: PinnedUnits,
        host: PinnedUnits | None,
    ) -> None:
        """Holds nothing yet.

        Args:
            group: the group.
            page_size: tokens of a page of the tree.
            policies: make the orders in which units leave the device and the host.
            device: units of the device pool.
            host: units of the host pool; None without a host tier.
        """
        self.group = group
        self.page_size = page_size
        self.device = device
        self.host = host
        self.n_device_units = 0
        self.n_host_units = 0
        self.observer: UnitObserver = _Nobody()
        is_state = group.kind is GroupKind.STATE
        names = last_page_name if is_state else page_names
        view = TierView(page_size, _no_children, self.n_units, names)
        self._device_order = policies[0].order(view)
        self._host_order = policies[1].order(view)
        self._held: dict[Node, Holding] = {}
        self._locks: dict[Node, int] = {}
        self._runs: dict[Node, list[Run]] = {}

    def get(self, node: Node) -> Holding | None:
        """What ``node`` has; None for nothing."""
        return self._held.get(node)

    def nodes(self) -> Iterable[Node]:
        """All nodes that have units."""
        return self._held.keys()

    # A prefix.

    def cover(self, path: Sequence[Part], *, on_device: bool = False) -> bool:
        """Whether one can go on after ``path``: every unit that is needed there is held.

        Args:
            path: nodes from the first page on.
            on_device: units that only the host has do not count.
        """
        node, n_pages = path[-1]
        if self.group.kind is GroupKind.STATE:
            return n_pages == node.n_pages and self._has(node, on_device=on_device)
        first = self.group.first_needed(node.depth_pages + n_pages, self.page_size)
        for at, _ in reversed(path):
            if not self._has(at, on_device=on_device):
                return False
            if at.depth_pages <= first:
                break
        return True

    def _has(self, node: Node, *, on_device: bool) -> bool:
        holding = self._held.get(node)
        return holding is not None and not (on_device and holding.device is None)

    def units(self, path: Sequence[Part]) -> Units:
        """The units that are needed to go on after ``path``, as far as they are held."""
        found = Units(0, array("i"), array("i"))
        if not path:
            return found
        node, n_pages = path[-1]
        end = node.depth_pages + n_pages
        first = self.group.first_needed(end, self.page_size)
        runs: list[tuple[array[int], array[int]]] = []
        for at, n_used in reversed(path):
            holding = self._held.get(at)
            if holding is None:
                break
            start = max(0, first - at.depth_pages)
            runs.append(_run(holding, self._slice(at, start, n_used)))
            if at.depth_pages <= first or self.group.kind is GroupKind.STATE:
                break
        for device, host in reversed(runs):
            found.device.extend(device)
            found.host.extend(host)
        return Units(end - len(found.device), found.device, found.host)

    def _slice(self, node: Node, start: int, stop: int) -> slice:
        """Where units of pages ``start`` to ``stop`` of a node are in its holding."""
        if self.group.kind is GroupKind.STATE:
            return slice(0, int(stop == node.n_pages))
        return slice(start, stop)

    def n_units(self, node: Node) -> int:
        """Units that a node holds, if it holds any."""
        return 1 if self.group.kind is GroupKind.STATE else node.n_pages

    def renew(self, node: Node, split: Split, *, used: bool, keep_end: bool = True) -> None:
        """Tells both orders that the prefix which ends at ``node`` was used, or inserted.

        Args:
            node: the end of the prefix.
            split: cuts a node that it needs in part, and of which the rest leaves.
            used: False if it was inserted.
            keep_end: what it needs stays on the device, even if a longer prefix, which did not,
                brought it.
        """
        first = self.group.first_needed(node.depth_pages + node.n_pages, self.page_size)
        touch_device = self._device_order.touch(used=used, inserted=not used)
        touch_host = self._host_order.touch(used=used, inserted=not used)
        for at in self.trailing(node):
            holding = self._held.get(at)
            if holding is None:
                continue
            if holding.leaves and keep_end:
                if at.depth_pages < first:
                    split(at, first - at.depth_pages)
                holding.leaves = False
            if touch_device is not None and holding.device is not None:
                touch_device(at)
            if touch_host is not None and holding.host is not None:
                touch_host(at)

    def trailing(self, node: Node) -> Iterator[Node]:
        """The nodes with units that one needs to go on after ``node``, deepest first."""
        first = self.group.first_needed(node.depth_pages + node.n_pages, self.page_size)
        for at in path_to_root(node):
            if at.depth_pages + at.n_pages <= first:
                break
            yield at
            if self.group.kind is GroupKind.STATE:
                break

    # Gains and losses.

    def gain_device(self, node: Node, units: array[int]) -> array[int]:
        """Gives device units to a node; returns those that it has already, under other ids."""
        assert len(units) == self.n_units(node)
        holding = self._held.get(node)
        if holding is None:
            holding = self._held[node] = Holding()
        if holding.device is not None:
            both = zip(units, holding.device, strict=True)
            return array("i", [mine for mine, known in both if mine != known])
        holding.device = units
        self.n_device_units += len(units)
        self._device_order.place(node)
        self.observer.gained(Tier.DEVICE, node)
        return array("i")

    def gain_host(self, node: Node, units: array[int], stored_in: int = 0) -> bool:
        """Gives host units, which hold their bytes, to a node; False if it has some already.

        Args:
            node: the node.
            units: one for each page of the node, or one in all of a state.
            stored_in: number of the storage attachment that has them; 0 for none.
        """
        assert len(units) == self.n_units(node)
        holding = self._held.get(node)
        if holding is None:
            holding = self._held[node] = Holding()
        if holding.host is not None:
            return False
        holding.host = units
        holding.stored_in = stored_in or holding.stored_in
        self.n_host_units += len(units)
        self._host_order.place(node)
        self.observer.gained(Tier.HOST, node)
        if stored_in:
            self.observer.gained(Tier.STORAGE, node)
        return True

    def drop_device(self, node: Node, cause: str = "evicted") -> int:
        """Frees the device units of a node; returns how many. ``cause`` is one word for metrics."""
        holding = self._held[node]
        units, holding.device = holding.device, None
        assert units is not None
        holding.leaves = False
        self._device_order.discard(node)
        self.n_device_units -= len(units)
        self.observer.lost(Tier.DEVICE, node, cause)
        self._forget_if_empty(node, holding)
        self.device.free(units)
        return len(units)

    def drop_host(self, node: Node, cause: str = "evicted") -> int:
        """Frees the host units of a node; returns how many. ``cause`` is one word for metrics."""
        holding = self._held[node]
        units, holding.host = holding.host, None
        assert units is not None
        assert self.host is not None
        self._host_order.discard(node)
        self.n_host_units -= len(units)
        self.observer.lost(Tier.HOST, node, cause)
        self._forget_if_empty(node, holding)
        self.host.free(units)
        return len(units)

    def remove(self, node: Node, cause: str = "evicted") -> None:
        """Frees what a node has, which is about to leave the tree."""
        holding = self._held.get(node)
        if holding is None:
            return
        if holding.device is not None:
            self.drop_device(node, cause)
        if holding.host is not None:
            self.drop_host(node, cause)

    def _forget_if_empty(self, node: Node, holding: Holding) -> None:
        if holding.device is None and holding.host is None:
            del self._held[node]

    def split(self, upper: Node, node: Node) -> None:
        """Takes in ``upper``, which was just split off ``node`` with its first pages."""
        if self.group.kind is GroupKind.STATE:
            return  # the snapshot is that of the end of ``node``
        if node in self._locks:
            self._locks[upper] = self._locks[node]
        for run in self._runs.get(node, ()):
            run.nodes.insert(run.nodes.index(node), upper)
            self._runs.setdefault(upper, []).append(run)
        holding = self._held.get(node)
        if holding is None:
            return
        above = self._held[upper] = Holding()
        above.device, holding.device = cut(holding.device, upper.n_pages)
        above.host, holding.host = cut(holding.host, upper.n_pages)
        above.stored_in, above.is_copied = holding.stored_in, holding.is_copied
        above.leaves = holding.leaves
        for order, units in ((self._device_order, above.device), (self._host_order, above.host)):
            if units is not None:
                order.split(upper, node)
                order.place(upper)  # a queue lets it rest for its child, which keeps no units of it

    # Locks.

    def lock(self, node: Node, split: Split) -> None:
        """Keeps the units that one needs to go on after ``node``, until ``unlock``.

        A node that is needed in part is split there, so that ``unlock`` finds the same nodes.
        """
        first = self.group.first_needed(node.depth_pages + node.n_pages, self.page_size)
        for at in self.trailing(node):
            if at.depth_pages < first and self.group.kind is GroupKind.WINDOW:
                split(at, first - at.depth_pages)
            self._locks[at] = self._locks.get(at, 0) + 1

    def unlock(self, node: Node) -> None:
        """Takes back one ``lock`` of ``node``.

        Raises:
            IntegrityError: it is not locked.
        """
        for at in self.trailing(node):
            count = self._locks.get(at, 0) - 1
            if count < 0:
                raise IntegrityError(f"group {self.group.name!r}: {at} is not locked")
            self._locks[at] = count
            if count == 0:
                del self._locks[at]
                self._place(at)

    def _place(self, node: Node) -> None:
        """Lists a node again, which a search for a victim may have passed over."""
        holding = self._held.get(node)
        if holding is None:
            return
        if holding.device is not None:
            self._device_order.place(node)
        if holding.host is not None:
            self._host_order.place(node)

    # Calls that read units: they pin them, and follow the nodes.

    def follow(self, node: Node) -> Run:
        """Keeps track of what ``node`` is split into, until ``unfollow``."""
        run = Run(node)
        self._runs.setdefault(node, []).append(run)
        return run

    def unfollow(self, run: Run) -> None:
        """Ends a ``follow``, after its units were unpinned."""
        for node in run.nodes:
            runs = self._runs[node]
            runs.remove(run)
            if not runs:
                del self._runs[node]
            self._place(node)

    # Who leaves.

    def device_victim(self, max_units: int, split: Split) -> Node | None:
        """The node whose device units go next, or None.

        A longer run is cut, so that its first ``max_units`` go first: the last are worth most.
        """
        node = self._device_order.victim(self.may_drop_device)
        return None if node is None else self._first_units(node, max_units, split)

    def host_victim(self, max_units: int, split: Split) -> Node | None:
        """As ``device_victim``, for the host."""
        node = self._host_order.victim(self.may_drop_host)
        return None if node is None else self._first_units(node, max_units, split)

    def _first_units(self, node: Node, max_units: int, split: Split) -> Node:
        return split(node, max_units) if self.n_units(node) > max_units else node

    def may_drop_device(self, node: Node) -> bool:
        """Whether no lock and no call keeps the device units of a node."""
        holding = self._held.get(node)
        return (
            holding is not None
            and holding.device is not None
            and node not in self._locks
            and self.device.are_idle(holding.device)
        )

    def may_drop_host(self, node: Node) -> bool:
        """Whether no lock and no call keeps the host units of a node."""
        holding = self._held.get(node)
        assert self.host is not None
        return (
            holding is not None
            and holding.host is not None
            and (holding.device is not None or node not in self._locks)
            and self.host.are_idle(holding.host)
        )

    # Audit.

    def check_integrity(self, nodes: set[Node]) -> None:
        """Checks the holdings against ``nodes``, the whole tree.

        Raises:
            IntegrityError: names what does not hold.
        """
        device, host = array("i"), array("i")
        for node, holding in self._held.items():
            self._require(node in nodes, node, "holds units, but has left the tree")
            for units in (holding.device, holding.host):
                fits = units is None or len(units) == self.n_units(node)
                self._require(fits, node, "does not hold a unit for each page")
            kept = holding.device is not None or holding.host is not None
            self._require(kept, node, "has an empty holding")
            device.extend(holding.device or ())
            host.extend(holding.host or ())
        for node, runs in self._runs.items():
            followed = all(node in run.nodes for run in runs)
            self._require(followed, node, "is followed by a run that does not know it")
        for node in self._locks:
            locked = node in nodes and node.lock_count > 0
            self._require(locked, node, "has locked units, but is not locked")
        for tier, units, count in (
            ("device", device, self.n_device_units),
            ("host", host, self.n_host_units),
        ):
            if len(set(units)) != len(units) or len(units) != count:
                raise IntegrityError(
                    f"group {self.group.name!r}: {len(units)} {tier} units of nodes, "
                    f"{len(set(units))} different ones, {count} are counted"
                )
        self._check_order(self._device_order, lambda holding: holding.device)
        self._check_order(self._host_order, lambda holding: holding.host)

    def _check_order(
        self, order: EvictionOrder, units: Callable[[Holding], array[int] | None]
    ) -> None:
        there = {node for node, holding in self._held.items() if units(holding) is not None}
        listed = set(order)
        for node in listed - there:
            self._require(False, node, "is listed in an order, but has no units in that tier")
        for node in there - listed:
            may_be_out = node in self._locks or node in self._runs
            self._require(may_be_out, node, "is not listed in the order of its tier")

    def _require(self, holds: bool, node: Node, rule: str) -> None:
        if not holds:
            raise IntegrityError(f"group {self.group.name!r}: {node} {rule}")


def _no_children(_: Node) -> int:
    return 0  # no node keeps the units of another


def _run(holding: Holding, part: slice) -> tuple[array[int], array[int]]:
    """Device and host ids of a part of a holding, each ``LACKING`` where the other one is used."""
    if holding.device is not None:
        device = holding.device[part]
        return device, array("i", [LACKING]) * len(device)
    assert holding.host is not None
    host = holding.host[part]
    return array("i", [LACKING]) * len(host), host
