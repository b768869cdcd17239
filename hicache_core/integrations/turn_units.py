"""The units of a turn: what it loads and computes of windows and states, until they are stored."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence

from hicache_core.controller.controller import Controller
from hicache_core.errors import PoolExhausted
from hicache_core.integrations.paged_cache import PagedCache
from hicache_core.kv.spec import GroupKind
from hicache_core.pools.device import DevicePool
from hicache_core.process.shield import shield
from hicache_core.radix.results import LACKING, InsertResult, Match, NewUnits

log = logging.getLogger(__name__)

Runs = list[list[NewUnits]]


class TurnUnits:
    """Device units of groups that belong to a turn. Owner thread only.

    Each unit is recorded in the step that takes it, which no signal interrupts; ``give_back``
    releases all that the tree has not taken over.
    """

    def __init__(self, cache: Controller, pool: DevicePool) -> None:
        """Takes nothing.

        Args:
            cache: the cache.
            pool: its device pool.
        """
        self._cache = cache
        self._pool = pool
        groups = list(enumerate(pool.spec.groups))
        self._windows = [at for at, group in groups if group.kind is GroupKind.WINDOW]
        self._state = next((at for at, group in groups if group.kind is GroupKind.STATE), None)
        self._taken = [array("i") for _ in groups]
        self._loaded: Runs = [[] for _ in groups]
        self._snapshots: dict[int, int] = {}  # boundary, in tokens: unit; in the order taken
        self._replaceable = 0

    def note_loaded(self, match: Match, loaded: Match) -> None:
        """Records the units that belong to the turn since ``match`` was loaded; under a shield."""
        for at, own in enumerate(loaded.own):
            self._taken[at].extend(own)
            self._loaded[at].extend(_runs(match.groups[at].first, match.groups[at].host, own))

    def snapshot(self, past: PagedCache, *, replacing: bool = False) -> None:
        """Keeps the states as they are now, if the sequence ends with a page.

        Without a free unit, the oldest snapshot of this turn is given up.

        Args:
            past: the cache of the turn, between two forward passes.
            replacing: give up the snapshot that was taken with this argument before.
        """
        n_tokens = past.get_seq_length()
        if self._state is None or not n_tokens or n_tokens % self._pool.page_size:
            return
        unit = self._snapshots.pop(self._replaceable, None) if replacing else None
        if unit is None:
            unit = self._unit_for_snapshot(self._state)
        if unit is None:
            return
        past.write_state(unit)
        self._snapshots[n_tokens] = unit
        if replacing:
            self._replaceable = n_tokens

    def _unit_for_snapshot(self, group: int) -> int | None:
        try:
            (unit,) = self._take(group, 1)
        except PoolExhausted as error:
            if not self._snapshots:
                log.warning("no snapshot is taken: %s", error)
                return None
            unit = self._snapshots.pop(next(iter(self._snapshots)))
        return unit

    def _take(self, group: int, n: int) -> array[int]:
        with shield:
            units = self._cache.allocate_units(group, n)
            self._taken[group].extend(units)
        return units

    def stops(self, n_shared: int, n_pages: int) -> Sequence[int]:
        """Where each of the inserts ends that bring the pages from ``n_shared`` to ``n_pages``.

        It is one insert, unless a window has less room on the device than these pages need.
        """
        if not self._windows:
            return [n_pages]
        step = max(1, min(self._pool.groups[at].n_pages for at in self._windows) // 2)
        return range(n_pages, n_shared, -step)[::-1] or [n_pages]

    def fill(self, past: PagedCache, first: int, stop: int) -> Runs:
        """Copies rows of the sequence into units of the windows, and adds the snapshots there.

        Args:
            past: the cache of the turn.
            first: index of the first page.
            stop: index after the last page.

        Returns:
            What ``insert`` takes, the units that were loaded among it.

        Raises:
            PoolExhausted: a window has no room for so many pages.
        """
        runs, self._loaded = self._loaded, [[] for _ in self._loaded]
        if any(runs):
            for layer in range(self._pool.spec.num_layers):
                self._cache.wait_layer(layer)
        for at in self._windows:
            units = self._take(at, stop - first)
            past.write_pages(first, units, at)
            if units:
                runs[at].append(NewUnits(first, units))
        for boundary, unit in list(self._snapshots.items()):
            page = boundary // self._pool.page_size - 1
            if self._state is not None and first <= page < stop:
                runs[self._state].append(NewUnits(page, array("i", [unit])))
                del self._snapshots[boundary]
        return runs

    def note_inserted(self, runs: Runs, result: InsertResult) -> None:
        """Records that the tree has taken over ``runs``, or handed them back; under a shield."""
        for at, of_group in enumerate(runs):
            given = {unit for run in of_group for unit in run.device}
            self._taken[at] = array("i", [unit for unit in self._taken[at] if unit not in given])
            self._cache.free_units(at, result.unit_duplicates[at])

    def give_back(self) -> None:
        """Releases what the tree has not taken over; under a shield."""
        self._snapshots.clear()
        for at, units in enumerate(self._taken):
            self._taken[at] = array("i")
            if units:
                self._cache.free_units(at, units)


def _runs(first: int, host: array[int], own: array[int]) -> Iterator[NewUnits]:
    """The units ``own``, which were copied from where ``host`` has one, as consecutive runs."""
    own_units = iter(own)
    run = array("i")
    for page, unit in enumerate((*host, LACKING), first):
        if unit != LACKING:
            run.append(next(own_units))
        elif run:
            yield NewUnits(page - len(run), run)
            run = array("i")
