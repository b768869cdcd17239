"""Pages that leave a tier are counted by tier and cause."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from hicache_core.controller.journal import PageRun
from hicache_core.controller.removals import RemovalCounts
from hicache_core.types import Tier

CAUSES = ["evicted", "corrupt", "reset", "failed"]
LOSSES = st.tuples(st.sampled_from(list(Tier)), st.sampled_from(CAUSES), st.integers(1, 9))


@given(st.lists(LOSSES))
def test_every_lost_page_is_counted_once(losses: list[tuple[Tier, str, int]]) -> None:
    counts, model = RemovalCounts(), Counter[tuple[str, str]]()
    for tier, cause, n_pages in losses:
        run = PageRun(b"", bytes(32 * n_pages), bytes(16 * n_pages), b"")
        counts.stored(tier, run)
        counts.removed(tier, run, cause)
        counts.cleared()
        model[tier.value, cause] += n_pages
    assert {(item.tier, item.cause): item.n_pages for item in counts.evicted_pages()} == model
