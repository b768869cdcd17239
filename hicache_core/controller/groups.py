"""The ways of a group's units: device → host → storage, and host → device.

What ``write_path`` and ``load_back`` do for the full pages of a prefix. Units are simpler: nobody
waits for them in the tree. A unit that is being filled belongs to the call that fills it, and only
what has arrived is given to a node. A unit that is being read is pinned, so its node may lose it,
or leave the tree, at any time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from hicache_core.controller.attachment import Attachment
from hicache_core.controller.parts import GroupParts, Parts
from hicache_core.controller.unit_records import UnitRecords
from hicache_core.copies.base import Ticket
from hicache_core.errors import LoadFailed, PoolExhausted
from hicache_core.kv.keys import PageKeys
from hicache_core.kv.spec import GroupKind
from hicache_core.observe.journal import PageRun
from hicache_core.radix.holdings import Holding, Run
from hicache_core.radix.node import Node, path_to_root
from hicache_core.radix.results import LACKING, Match, Units
from hicache_core.types import WriteJob


@dataclass(slots=True, eq=False)
class _Store:
    """Units of a node that are being stored."""

    group: GroupParts
    run: Run
    units: array[int]
    epoch: int
    pages: PageRun | None
    n_batches: int = 0
    is_whole: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class _Load:
    """Units that are being copied to the device."""

    group: GroupParts
    runs: tuple[Run, ...]
    ticket: Ticket
    host_units: array[int]
    device_units: array[int]


class GroupPaths:
    """Moves units of all groups. Owner thread; all ranks decide alike.

    Attributes:
        n_failed: settled copies to the device that failed on some rank.
    """

    def __init__(self, parts: Parts, wait_for_copy: Callable[[], bool]) -> None:
        """Nothing is on its way.

        Args:
            parts: of the cache.
            wait_for_copy: waits for the oldest copy and settles it; False if there is none.
        """
        self._parts = parts
        self._wait_for_copy = wait_for_copy
        self._records = [UnitRecords(parts, index) for index in range(len(parts.groups))]
        for group, records in zip(parts.groups, self._records, strict=True):
            group.held.observer = records
        self._n_backups = 0
        self._stores: list[_Store] = []
        self._loads: list[_Load] = []
        self._failed: list[_Load] = []
        self.n_failed = 0

    @property
    def idle(self) -> bool:
        """Whether every backup and store has settled."""
        return not self._n_backups and not self._stores

    @property
    def loads_settled(self) -> bool:
        """Whether every copy to the device has settled."""
        return not self._loads

    def tell_everything_again(self) -> None:
        """Tells the journal, which knows nothing, what device and host hold of all groups."""
        for records in self._records:
            records.tell_all_again()

    def count_cut(self, match: Match) -> None:
        """Counts a match that a group has made shorter."""
        for group in self._parts.groups:
            if group.held.group.name == match.cut_by:
                group.counters.cut_matches += 1
                group.counters.cut_tokens += match.n_uncut_tokens - match.n_tokens

    def _records_of(self, group: GroupParts) -> UnitRecords:
        return self._records[self._parts.groups.index(group)]

    # Room.

    def allocate(self, group: GroupParts, n: int) -> array[int]:
        """Takes device units, and evicts others if there are too few.

        Raises:
            PoolExhausted: too few may leave the device; nothing was taken.
        """
        pool = group.held.device
        n_leaving = 0  # they are free once the host has them
        while pool.n_free < n:
            n_lacking = n - pool.n_free - n_leaving
            n_sent = self._evict_device(group, n_lacking) if n_lacking > 0 else None
            if n_sent is not None:
                n_leaving += n_sent
            elif self._wait_for_copy():
                n_leaving = 0
            else:
                break
        if pool.n_free < n:
            raise PoolExhausted(
                f"{n} units of group {group.held.group.name!r} are needed; {pool.n_free} of "
                f"{pool.n_units} are free and the others are in use"
            )
        return pool.allocate(n)

    def _evict_device(self, group: GroupParts, n: int) -> int | None:
        """Frees up to ``n`` device units of one node, or has them copied to the host first.

        Returns:
            How many leave with the end of a copy; None if nothing can leave.
        """
        held = group.held
        victim = held.device_victim(n, self._parts.tree.split)
        if victim is None:
            return None
        holding = held.get(victim)
        assert holding is not None
        backs_up = self._parts.policies.write.backs_up_before_eviction
        if backs_up and self._wants_backup(holding) and self._backup(group, victim):
            holding.leaves = True
            return held.n_units(victim)
        held.drop_device(victim)
        return 0

    def allocate_host(self, group: GroupParts, n: int) -> array[int]:
        """Takes up to ``n`` host units, and evicts what may go; never waits."""
        held = group.held
        if held.host is None:
            return array("i")
        while held.host.n_free < n:
            victim = held.host_victim(n - held.host.n_free, self._parts.tree.split)
            if victim is None:
                break
            held.drop_host(victim)
        return held.host.allocate(min(n, held.host.n_free))

    # Down.

    def consider(self, node: Node) -> None:
        """Copies down, or stores, what the policy wants of the path to ``node``."""
        path = list(path_to_root(node))  # the last units first: they are worth most
        for group in self._parts.groups:
            needed = set(group.held.trailing(node))  # whoever has inserted them locks them next
            for at in path:
                holding = group.held.get(at)
                if holding is not None:
                    self._consider(group, at, holding, leaves=holding.leaves and at not in needed)

    def unlocked(self, node: Node) -> None:
        """Lets units of the prefix that ends at ``node`` leave, if only its lock kept them."""
        for group in self._parts.groups:
            for at in group.held.trailing(node):
                holding = group.held.get(at)
                if holding is not None and holding.leaves and group.held.may_drop_device(at):
                    self._consider(group, at, holding, leaves=True)

    def _consider(self, group: GroupParts, node: Node, holding: Holding, *, leaves: bool) -> None:
        policy = self._parts.policies.write
        if holding.device is not None and self._wants_backup(holding):
            goes = leaves and policy.backs_up_before_eviction
            if policy.backs_up(1 + node.hit_count) or goes:
                self._backup(group, node)
        self._store_if_new(group, node)
        if leaves:
            self._let_leave(group, node)

    def _wants_backup(self, holding: Holding) -> bool:
        parts = self._parts
        if parts.host is None or holding.host is not None or holding.is_copied:
            return False
        epoch = parts.epoch
        is_stored = epoch != 0 and holding.stored_in == epoch
        return parts.retention.keeps_stored or not is_stored

    def _let_leave(self, group: GroupParts, node: Node) -> None:
        """Frees the device units of a node that no prefix ends with, unless somebody needs them."""
        held, holding = group.held, group.held.get(node)
        if holding is None or not holding.leaves or holding.is_copied:
            return
        if held.may_drop_device(node):
            held.drop_device(node, "outside_window")

    def _backup(self, group: GroupParts, node: Node) -> bool:
        """Starts to copy the device units of a node to the host; False if the host has no room."""
        held, parts = group.held, self._parts
        holding = held.get(node)
        assert holding is not None
        assert holding.device is not None
        device_units = holding.device[:]
        host_units = self.allocate_host(group, len(device_units))
        assert held.host is not None
        if len(host_units) < len(device_units):
            held.host.free(host_units)
            group.counters.backup_skipped_units += len(device_units)
            return False
        holding.is_copied = True
        held.device.pin(device_units)
        held.host.n_lent += len(host_units)
        self._n_backups += 1
        assert group.transfer is not None
        ticket = group.transfer.to_host(device_units, host_units)
        settle = partial(self._backed_up, group, held.follow(node), device_units, host_units)
        parts.jobs.add_copy(ticket, len(device_units), settle)
        return True

    def _backed_up(
        self,
        group: GroupParts,
        run: Run,
        device_units: array[int],
        host_units: array[int],
        n_copied: int,
    ) -> None:
        held = group.held
        assert held.host is not None
        self._n_backups -= 1
        held.device.unpin(device_units)
        held.host.n_lent -= len(host_units)
        held.unfollow(run)
        is_whole = n_copied == len(device_units)
        group.counters.backup_units += len(device_units) if is_whole else 0
        start = 0
        for at in run.nodes:
            mine = host_units[start : start + held.n_units(at)]
            start += len(mine)
            holding = held.get(at)
            if holding is not None:
                holding.is_copied = False
            if not (is_whole and at.in_tree and held.gain_host(at, mine)):
                held.host.free(mine)
            self._store_if_new(group, at)
            self._let_leave(group, at)

    def _store_if_new(self, group: GroupParts, node: Node) -> None:
        storage, holding = self._attached(), group.held.get(node)
        if storage is None or holding is None or holding.host is None:
            return
        if holding.stored_in != storage.epoch:
            self._store(group, node, storage)

    def _attached(self) -> Attachment | None:
        tier = self._parts.storage
        return None if tier is None else tier.current

    def _store(self, group: GroupParts, node: Node, storage: Attachment) -> None:
        """Starts to write the host units of a node to storage."""
        parts, held = self._parts, group.held
        holding = held.get(node)
        assert holding is not None
        assert holding.host is not None
        assert held.host is not None
        assert group.host is not None
        assert parts.storage is not None
        pages_told = self._records_of(group).to_store(node)
        store = _Store(group, held.follow(node), holding.host[:], storage.epoch, pages_told)
        holding.stored_in = storage.epoch
        held.host.pin(store.units)
        self._stores.append(store)
        keys = self._keys(group, node, storage)
        pages, object_nbytes = group.host.pages(store.units), group.host.object_nbytes
        jobs: list[WriteJob] = []
        for start in range(0, len(keys), parts.batch_pages):
            part = slice(start, min(start + parts.batch_pages, len(keys)))
            n_units = part.stop - part.start
            job_id = parts.jobs.add_write(partial(self._stored, store, n_units))
            jobs.append(WriteJob(job_id, keys[part], pages[part], n_units * object_nbytes))
        store.n_batches = len(jobs)
        parts.storage.submit_all(storage, jobs)

    def _keys(self, group: GroupParts, node: Node, storage: Attachment) -> PageKeys:
        """The storage keys of a node's units: of a state, that of the node's last page."""
        parts = self._parts
        assert node.parent is not None
        namespace = storage.group_namespaces[parts.groups.index(group)]
        parent = parts.tree.last_digest(node.parent)
        keys = PageKeys(namespace, node.tokens, parts.page_size, parent)
        return keys[-1:] if group.held.group.kind is GroupKind.STATE else keys

    def _stored(self, store: _Store, n_units: int, n_stored: int) -> None:
        parts, held, counters = self._parts, store.group.held, store.group.counters
        store.n_batches -= 1
        store.is_whole = store.is_whole and n_stored == n_units
        counters.stored_units += n_stored
        counters.store_dropped_units += n_units - n_stored
        if store.n_batches:
            return
        self._stores.remove(store)
        assert held.host is not None
        held.host.unpin(store.units)
        held.unfollow(store.run)
        if store.is_whole:
            self._records_of(store.group).stored(store.pages, store.epoch)
        for at in store.run.nodes:
            holding = held.get(at)
            if holding is not None and not store.is_whole and holding.stored_in == store.epoch:
                holding.stored_in = 0  # the next use tries again
            is_spare = store.is_whole and not parts.retention.keeps_stored
            if is_spare and holding is not None and holding.host and held.may_drop_host(at):
                held.drop_host(at, "stored")

    # Up.

    def allocate_for(self, match: Match) -> tuple[array[int], ...]:
        """Takes device units, by group, for what only the host has of a match.

        Raises:
            PoolExhausted: there are too few; nothing was taken.
        """
        taken: list[array[int]] = []
        try:
            for group, units in zip(self._parts.groups, match.groups, strict=True):
                taken.append(self.allocate(group, units.n_on_host))
        except PoolExhausted:
            self.free(taken)
            raise
        return tuple(taken)

    def free(self, units: Iterable[array[int]]) -> None:
        """Gives device units back, by group."""
        for group, own in zip(self._parts.groups, units, strict=False):
            group.held.device.free(own)

    def load(self, match: Match, own: tuple[array[int], ...]) -> Match:
        """Starts to copy what only the host has of a match into the units ``own``, by group."""
        loaded = tuple(
            self._load(group, match.node, units, mine)
            for group, units, mine in zip(self._parts.groups, match.groups, own, strict=True)
        )
        return match._replace(groups=loaded, own=own)

    def _load(self, group: GroupParts, node: Node, units: Units, own: array[int]) -> Units:
        if not own:
            return units
        parts, held = self._parts, group.held
        host_units = array("i", [unit for unit in units.host if unit != LACKING])
        assert held.host is not None
        assert group.transfer is not None
        held.host.pin(host_units)
        held.device.pin(own)  # their owner may give them back while they are still written
        ticket = group.transfer.to_device(host_units, own)
        runs = tuple(held.follow(at) for at in held.trailing(node))
        load = _Load(group, runs, ticket, host_units, own[:])
        self._loads.append(load)
        parts.jobs.add_copy(ticket, len(own), partial(self._loaded, load))
        taken = iter(own)
        device = array("i", [next(taken) if unit == LACKING else unit for unit in units.device])
        return Units(units.first, device, array("i", [LACKING]) * len(device))

    def _loaded(self, load: _Load, n_copied: int) -> None:
        held = load.group.held
        self._loads.remove(load)
        assert held.host is not None
        held.host.unpin(load.host_units)
        held.device.unpin(load.device_units)
        for run in load.runs:
            held.unfollow(run)
        if n_copied < len(load.host_units):
            self._failed.append(load)
            self.n_failed += 1
        else:
            load.group.counters.loaded_units += n_copied

    def wait_layer(self, layer: int) -> None:
        """Blocks until layer ``layer`` of every running copy of a group has arrived.

        Raises:
            LoadFailed: as ``LoadBackPath.wait_layer``.
        """
        failed, self._failed = self._failed, []
        for load in failed:
            load.ticket.wait_layer(layer)
            raise LoadFailed(f"{len(load.host_units)} units did not arrive on another rank")
        for load in self._loads:
            load.ticket.wait_layer(layer)
