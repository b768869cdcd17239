"""What left the tiers is counted by tier and cause."""

from __future__ import annotations

from hicache_core.controller.parts import RemovalCounts
from hicache_core.observe.snapshot import EvictedPages
from hicache_core.types import Tier


def test_pages_add_up_by_tier_and_cause() -> None:
    counts = RemovalCounts()
    counts.add(Tier.DEVICE, "evicted", 3)
    counts.add(Tier.DEVICE, "evicted", 4)
    counts.add(Tier.HOST, "failed", 1)
    assert counts.evicted_pages() == [
        EvictedPages("device", "evicted", 7),
        EvictedPages("host", "failed", 1),
    ]
