"""How many pages each tier lost, and why."""

from __future__ import annotations

from collections.abc import Sequence

from hicache_core.observe.snapshot import EvictedPages
from hicache_core.types import Tier


class RemovalCounts:
    """Counts pages that leave, by tier and cause. Written by the owner thread, read from any."""

    def __init__(self) -> None:
        """Starts at nothing."""
        self._counts: dict[tuple[Tier, str], int] = {}

    def add(self, tier: Tier, cause: str, n_pages: int) -> None:
        """``n_pages`` left ``tier``; ``cause`` is one word, such as ``evicted``."""
        key = (tier, cause)
        self._counts[key] = self._counts.get(key, 0) + n_pages

    def evicted_pages(self) -> Sequence[EvictedPages]:
        """So far."""
        counts = dict(self._counts)  # one step, so that it may grow meanwhile
        return [EvictedPages(tier.value, cause, n) for (tier, cause), n in counts.items()]
