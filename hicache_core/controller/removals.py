"""The journal that counts: how many pages each tier lost, and why."""

from __future__ import annotations

from collections.abc import Sequence

from hicache_core.controller.journal import Journal, PageRun
from hicache_core.observe.snapshot import EvictedPages
from hicache_core.page_keys import DIGEST_NBYTES
from hicache_core.types import Tier


class RemovalCounts(Journal):
    """Counts pages that leave, by tier and cause. Told by the owner thread, read from any."""

    def __init__(self) -> None:
        """Starts at nothing."""
        self._counts: dict[tuple[Tier, str], int] = {}

    def stored(self, tier: Tier, run: PageRun) -> None:  # noqa: ARG002 - only losses count
        # docstring inherited
        return

    def removed(self, tier: Tier, run: PageRun, cause: str) -> None:
        # docstring inherited
        key = (tier, cause)
        self._counts[key] = self._counts.get(key, 0) + len(run.digests) // DIGEST_NBYTES

    def cleared(self) -> None:
        # docstring inherited; what a cache is rid of on purpose is no loss
        return

    def evicted_pages(self) -> Sequence[EvictedPages]:
        """So far."""
        counts = dict(self._counts)  # one step, so that it may grow meanwhile
        return [EvictedPages(tier.value, cause, n) for (tier, cause), n in counts.items()]
