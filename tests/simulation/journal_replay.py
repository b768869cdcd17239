"""Rebuilds from the journal alone what each tier holds."""

from __future__ import annotations

from collections import defaultdict

from hicache_core.controller.controller import Controller
from hicache_core.kv.keys import DIGEST_NBYTES
from hicache_core.kv.spec import GroupKind
from hicache_core.observe.journal import Journal, PageRun
from hicache_core.radix.node import Node, run_of
from hicache_core.types import Tier
from tests.simulation.clock import InvariantBroken


class JournalReplay(Journal):
    """The pages of each tier by digest, from what was told alone."""

    def __init__(self) -> None:
        """Empty tiers."""
        self._pages: dict[Tier, set[bytes]] = {tier: set() for tier in Tier}
        self._units: defaultdict[tuple[Tier, int], set[bytes]] = defaultdict(set)

    def stored(self, tier: Tier, run: PageRun) -> None:
        # docstring inherited
        self._of(tier, run).update(_cut(run.digests))

    def removed(self, tier: Tier, run: PageRun, cause: str) -> None:
        # docstring inherited
        gone, known = _cut(run.digests), self._of(tier, run)
        if not known.issuperset(gone):
            name = "" if run.group is None else f", group {run.group.name!r}"
            raise InvariantBroken(
                f"journal: the {tier.value}{name} loses ({cause}) what it never had"
            )
        known.difference_update(gone)

    def cleared(self) -> None:
        # docstring inherited
        for pages in (*self._pages.values(), *self._units.values()):
            pages.clear()

    def _of(self, tier: Tier, run: PageRun) -> set[bytes]:
        return self._units[tier, run.group_index] if run.group else self._pages[tier]

    def check(self, cache: Controller, nodes: list[Node]) -> None:
        """Holds against the tree: exact for device and host; of what storage is believed to have,
        everything was told."""
        tree, storage = cache.parts.tree, cache.parts.storage
        device: list[bytes] = []
        host: list[bytes] = []
        stored: list[bytes] = []
        attached = None if storage is None else storage.current
        has_pages = bool(cache.parts.device.spec.components)  # else storage has units alone
        being_stored = _being_stored(cache)
        for node in nodes:
            pages = _cut(tree.digests(node))
            if node.on_device and not node.device_pending:
                device += pages
            if node.on_host:
                host += pages
            if has_pages and attached is not None and node.stored_in == attached.epoch:
                stored += () if node in being_stored else pages
        for tier, held in ((Tier.DEVICE, device), (Tier.HOST, host)):
            if self._pages[tier] != set(held):
                raise InvariantBroken(
                    f"journal: of the {tier.value}, {len(self._pages[tier])} pages were told, and "
                    f"it holds {len(held)}"
                )
        if not self._pages[Tier.STORAGE].issuperset(stored):
            raise InvariantBroken("journal: storage has pages that were never told")
        self._check_units(cache)

    def _check_units(self, cache: Controller) -> None:
        """Holds the units of groups against the holdings: exact for device and host."""
        for number, group in enumerate(cache.parts.groups, 1):
            found: dict[Tier, set[bytes]] = {Tier.DEVICE: set(), Tier.HOST: set()}
            for node in group.held.nodes():
                holding = group.held.get(node)
                assert holding is not None
                pages = _cut(cache.parts.tree.digests(node))
                units = pages[-1:] if group.held.group.kind is GroupKind.STATE else pages
                if holding.device is not None:
                    found[Tier.DEVICE].update(units)
                if holding.host is not None:
                    found[Tier.HOST].update(units)
            for tier, held in found.items():
                told = self._units[tier, number]
                if told != held:
                    raise InvariantBroken(
                        f"journal: of group {group.held.group.name!r} on the {tier.value}, "
                        f"{len(told)} units were told, and it holds {len(held)}"
                    )


def _being_stored(cache: Controller) -> set[Node]:
    """Nodes whose last word from storage has not come."""
    stores = [store for store in cache._write_path._stores if store.orphans is None]
    return {node for store in stores for node in run_of(store.node, store.n_pages)}


def _cut(digests: bytes) -> list[bytes]:
    return [
        digests[start : start + DIGEST_NBYTES] for start in range(0, len(digests), DIGEST_NBYTES)
    ]
