"""Unit records: what the tiers gain and lose of a group is counted and told to the journal."""

from __future__ import annotations

from dataclasses import replace

from hicache_core.controller.parts import Parts
from hicache_core.kv.keys import DIGEST_NBYTES, TOKEN_NBYTES
from hicache_core.kv.spec import GroupKind
from hicache_core.observe.journal import PageRun
from hicache_core.radix.holdings import UnitObserver
from hicache_core.radix.node import Node
from hicache_core.types import Tier


class UnitRecords(UnitObserver):
    """What becomes of the units of one group. Owner thread."""

    def __init__(self, parts: Parts, index: int) -> None:
        """Has heard of nothing yet.

        Args:
            parts: of the cache.
            index: of the group in the spec.
        """
        self._parts = parts
        self._index = index
        self._group = parts.groups[index]

    def gained(self, tier: Tier, node: Node) -> None:
        # docstring inherited
        if self._hears_gains and (tier is not Tier.STORAGE or self._is_stored(node)):
            self._tell(tier, self.run(node))

    def lost(self, tier: Tier, node: Node, cause: str) -> None:
        # docstring inherited
        held = self._group.held
        self._group.counters.removals.add(tier, cause, held.n_units(node))
        journal = self._parts.journal
        if journal is not None:
            journal.removed(tier, self.run(node), cause)

    def to_store(self, node: Node) -> PageRun | None:
        """The units of a node whose store begins, for ``stored``; None if nobody listens."""
        return self.run(node) if self._hears_gains else None

    def stored(self, run: PageRun | None, epoch: int) -> None:
        """Tells that storage has acknowledged all units of ``run``.

        Args:
            run: what ``to_store`` returned.
            epoch: number of the attachment that has them.
        """
        if run is not None and epoch == self._parts.epoch:  # else nobody can load them from there
            self._tell(Tier.STORAGE, replace(run, stored=True))

    def tell_all_again(self) -> None:
        """Tells what device and host hold."""
        held = self._group.held
        for node in list(held.nodes()):
            holding = held.get(node)
            assert holding is not None
            if holding.device is not None:
                self.gained(Tier.DEVICE, node)
            if holding.host is not None:
                self.gained(Tier.HOST, node)

    def run(self, node: Node) -> PageRun:
        """The pages of a node that have units: of a state the last one.

        Computes digests if they are not known.
        """
        run, group = self._parts.page_run(node), self._group.held.group
        if group.kind is GroupKind.STATE:
            page_nbytes = self._parts.page_size * TOKEN_NBYTES
            before, last = run.digests[:-DIGEST_NBYTES], run.digests[-DIGEST_NBYTES:]
            parent = before[-DIGEST_NBYTES:] or run.parent
            tokens = run.tokens[-page_nbytes:]
            run = PageRun(parent, last, tokens, run.seed)
        return replace(run, stored=self._is_stored(node), group=group, group_index=self._index + 1)

    @property
    def _hears_gains(self) -> bool:
        journal = self._parts.journal
        return journal is not None and journal.hears_gains

    def _tell(self, tier: Tier, run: PageRun) -> None:
        assert self._parts.journal is not None
        self._parts.journal.stored(tier, run)

    def _is_stored(self, node: Node) -> bool:
        holding, epoch = self._group.held.get(node), self._parts.epoch
        return holding is not None and epoch != 0 and holding.stored_in == epoch
