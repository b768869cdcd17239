"""Why a request missed, where its full pages were there and the units of a group were not."""

from __future__ import annotations

from pathlib import Path

from hicache_core.controller.explain import Explanation, Reason
from tests.page_path.grouped_world import PAGE_SIZE, GroupedWorld, make_grouped_world


def explained(world: GroupedWorld) -> Explanation:
    """The record of the latest request."""
    explanation = world.cache.explain(f"request-{world.n_requests}")
    assert explanation is not None
    return explanation


def test_a_branch_without_a_snapshot_is_cut_by_the_state() -> None:
    world = make_grouped_world("full and state")
    world.request(range(40))
    assert explained(world).cut_by == ""
    world.request([*range(32), *range(100, 108)])
    why = explained(world)
    assert (why.reason, why.cut_by, why.uncut_tokens) == (Reason.CUT_BY_GROUP, "mamba", 32)
    assert why.device_tokens == 6 * PAGE_SIZE
    assert "'mamba'" in why.detail
    assert "up to token 32" in why.detail
    assert why.as_dict()["cut_by"] == "mamba"
    world.close()


def test_units_that_have_left_are_named_with_tier_and_cause() -> None:
    """The full pages stay on the device; the units of the window go, for want of room."""
    world = make_grouped_world("full and window", n_units=12, enable_hierarchical_cache=False)
    world.request(range(40))
    world.cache.free_units(0, world.cache.allocate_units(0, 12))
    world.request(range(44))
    why = explained(world)
    assert (why.reason, why.cut_by, why.uncut_tokens) == (Reason.CUT_BY_GROUP, "swa", 40)
    assert why.device_tokens == 0
    assert "it left the device" in why.detail
    assert "(outside_window)" in why.detail
    world.close()


def test_a_store_that_lacks_units_is_told_from_one_that_lacks_pages(tmp_path: Path) -> None:
    settings = {"path": str(tmp_path)}
    world = make_grouped_world("full and state", backend="file", storage=settings)
    world.request(range(40))
    world.close()
    other = make_grouped_world("full and state", backend="file", storage=settings)
    outcome = other.request([*range(32), *range(100, 108)])
    assert outcome.storage == 6 * PAGE_SIZE
    why = explained(other)
    assert why.reason is Reason.CUT_BY_GROUP
    assert "storage has full pages further on" in why.detail
    other.request(range(200, 240))
    assert explained(other).reason is Reason.NEVER_SEEN
    other.close()
