"""What requests hold of groups of layers: what they take, compute, give to the tree and give up."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hicache_core.controller.controller import Controller
from hicache_core.errors import PoolExhausted
from hicache_core.kv.spec import Group, GroupKind
from hicache_core.pools.device import DevicePool
from hicache_core.radix.results import LACKING, InsertResult, Match, NewUnits, Units
from tests.simulation.clock import InvariantBroken
from tests.simulation.content import Contents

SNAPSHOT_PAGES = 2
"""A prompt keeps a snapshot after each multiple of so many pages, and one at its end."""


@dataclass(slots=True)
class Held:
    """Device units of one group that a request has, by page.

    Attributes:
        own: those that it gives to the tree or frees.
        shared: those of the tree, which its lock keeps there.
        filled: pages whose unit holds what it must, or will when its load has ended.
    """

    own: dict[int, int] = field(default_factory=dict)
    shared: dict[int, int] = field(default_factory=dict)
    filled: set[int] = field(default_factory=set)


class RequestUnits:
    """The units of one engine's requests. Each method is deterministic over ranks."""

    def __init__(self, cache: Controller, pool: DevicePool, shard: int) -> None:
        """No request has any yet."""
        self._cache = cache
        self._groups = pool.spec.groups
        self._page_size = pool.page_size
        self.n_layers = pool.spec.num_layers
        self._contents = [
            Contents(part, shard, group.name, pool.page_size)
            for group, part in zip(pool.spec.groups, pool.groups, strict=True)
        ]

    def taken(self, loaded: Match) -> list[Held]:
        """What a match gives to a request.

        Raises:
            InvariantBroken: something is missing that the prefix needs.
        """
        n_pages = loaded.n_tokens // self._page_size
        held: list[Held] = []
        for at, (group, units) in enumerate(zip(self._groups, loaded.groups, strict=True)):
            first = _first_needed(group, n_pages, self._page_size)
            missing = LACKING in units.device or units.first != first
            if missing or units.first + len(units.device) != n_pages:
                raise InvariantBroken(
                    f"every group: {group.name} has {units} of a prefix of {n_pages} pages, which "
                    f"needs all from page {first} on"
                )
            own = set(loaded.own[at]) if loaded.own else set()
            mine = Held()
            for page, unit in enumerate(units.device, units.first):
                (mine.own if unit in own else mine.shared)[page] = unit
                mine.filled.add(page)
            held.append(mine)
        return held

    def allocate(self, held: Sequence[Held], first: int, last: int) -> tuple[int, ...]:
        """Takes units for the pages from ``first`` to ``last`` that are to be computed.

        All that are wanted, else those that one needs to go on, else none.

        Returns:
            How many of each group.
        """
        return tuple(
            self._allocate(at, group, mine, first, last)
            for at, (group, mine) in enumerate(zip(self._groups, held, strict=True))
        )

    def _allocate(self, at: int, group: Group, mine: Held, first: int, last: int) -> int:
        needed = max(first, _first_needed(group, last, self._page_size))
        wanted = list(range(first, last))
        if group.kind is GroupKind.STATE:
            wanted = [page for page in wanted if (page + 1) % SNAPSHOT_PAGES in (0, last + 1)]
            wanted += [last - 1] * (last - 1 >= first and last - 1 not in wanted)
        for pages in (wanted, [page for page in wanted if page >= needed]):
            try:
                units = self._cache.allocate_units(at, len(pages))
            except PoolExhausted:
                continue
            mine.own.update(zip(pages, units, strict=True))
            return len(pages)
        return 0

    def compute(self, held: Sequence[Held], seed: bytes, tokens: bytes) -> None:
        """Fills what is not filled."""
        for contents, mine in zip(self._contents, held, strict=True):
            for page, unit in mine.own.items():
                if page not in mine.filled:
                    contents.write_page(seed, tokens, page, unit)
                    mine.filled.add(page)

    def first_wrong(
        self, held: Sequence[Held], seed: bytes, tokens: bytes, layer: int
    ) -> tuple[str, int] | None:
        """The first filled unit whose layer does not hold what it must: its group and page."""
        for group, contents, mine in zip(self._groups, self._contents, held, strict=True):
            for page, unit in (mine.own | mine.shared).items():
                if page in mine.filled and contents.is_wrong(seed, tokens, page, unit, layer):
                    return group.name, page
        return None

    def runs(self, held: Sequence[Held]) -> list[list[NewUnits]]:
        """What to insert: runs of pages that follow each other."""
        return [
            list(_runs(mine, is_state=group.kind is GroupKind.STATE))
            for group, mine in zip(self._groups, held, strict=True)
        ]

    def inserted(self, held: Sequence[Held], result: InsertResult) -> list[Held]:
        """What a request has after an insert: what the tree has, which its lock keeps.

        Raises:
            InvariantBroken: the tree gives back what the caller did not own.
        """
        for at, mine in enumerate(held):
            duplicates = result.unit_duplicates[at]
            strange = set(duplicates) - set(mine.own.values())
            if strange or len(set(duplicates)) != len(duplicates):
                raise InvariantBroken(f"one owner: {duplicates} are handed back, not of {mine}")
            self._cache.free_units(at, duplicates)
        return [_shared(units) for units in result.units]

    def release(self, held: Sequence[Held]) -> None:
        """Gives up what requests own, however far it is."""
        for at, mine in enumerate(held):
            self._cache.free_units(at, array("i", mine.own.values()))

    def evict(self, n: int) -> tuple[int, ...]:
        """Makes room for ``n`` units of each group; how many there are then, at most ``n``."""
        n_free: list[int] = []
        for at in range(len(self._groups)):
            try:
                units = self._cache.allocate_units(at, n)
            except PoolExhausted:
                units = array("i")
            self._cache.free_units(at, units)
            n_free.append(len(units))
        return tuple(n_free)


def _first_needed(group: Group, n_pages: int, page_size: int) -> int:
    """The first page that one needs to go on, by tokens: a second opinion."""
    if group.kind is GroupKind.STATE:
        return max(n_pages - 1, 0)
    n_tokens = n_pages * page_size
    attended = range(max(n_tokens + 1 - group.window, 0), n_tokens)  # by the next token
    return attended.start // page_size


def _runs(mine: Held, *, is_state: bool) -> Iterator[NewUnits]:
    run = NewUnits(0, array("i"))
    for page, unit in sorted((mine.own | mine.shared).items()):
        if is_state or page != run.first + len(run.device):
            if run.device:
                yield run
            run = NewUnits(page, array("i"))
        run.device.append(unit)
    if run.device:
        yield run


def _shared(units: Units) -> Held:
    shared = {page: unit for page, unit in enumerate(units.device, units.first) if unit != LACKING}
    return Held(shared=shared, filled=set(shared))
