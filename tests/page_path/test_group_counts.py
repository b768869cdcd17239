"""What is counted of groups of layers: units by tier, where they moved, what cut a match short."""

from __future__ import annotations

from pathlib import Path

from hicache_core.observe.metrics import CacheCollector
from hicache_core.observe.snapshot import GroupStatus
from hicache_core.observe.windows import Watch
from hicache_core.radix.picture import take_picture
from tests.page_path.grouped_world import PAGE_SIZE, GroupedWorld, make_grouped_world


def groups(world: GroupedWorld) -> dict[str, GroupStatus]:
    return {group.name: group for group in world.cache.snapshot().groups}


def test_units_are_counted_by_group_on_their_way_down_and_up() -> None:
    world = make_grouped_world(storage={"share": "group counts"})
    world.request(range(40))
    assert world.cache.flush(10.0)
    seen = groups(world)
    # All 10 pages of the window went down. Snapshots are at pages 3, 6, 9 and at the end.
    assert seen["swa"].moved_units == {"load_back": 0, "backup": 10, "prefetch": 0, "store": 10}
    assert seen["mamba"].moved_units == {"load_back": 0, "backup": 4, "prefetch": 0, "store": 4}
    assert (seen["swa"].device.cached_pages, seen["mamba"].device.cached_pages) == (2, 4)
    assert (seen["swa"].host.cached_pages, seen["mamba"].host.cached_pages) == (10, 4)  # type: ignore[union-attr]
    assert (seen["swa"].unit_tokens, seen["mamba"].unit_tokens) == (PAGE_SIZE, 1)
    assert (seen["swa"].unit_nbytes, seen["mamba"].unit_nbytes) == (2 * 2 * 2 * 4, 2 * (24 + 20))
    world.flush_device()
    assert world.request(range(48)).n_tokens == 40
    world.cache.flush(10.0)
    seen = groups(world)
    assert seen["swa"].moved_units["load_back"] == 2  # the last 7 tokens are on 2 pages
    assert seen["mamba"].moved_units["load_back"] == 1
    counters = world.cache.counters
    assert counters.stored_pages == 12  # full pages alone
    world.close()


def test_what_storage_delivers_is_counted_by_group(tmp_path: Path) -> None:
    settings = {"path": str(tmp_path)}
    for n_tokens, prefetched in ((40, {"swa": 0, "mamba": 0}), (48, {"swa": 2, "mamba": 1})):
        world = make_grouped_world(backend="file", storage=settings)
        world.request(range(n_tokens))
        seen = groups(world)
        assert {name: one.moved_units["prefetch"] for name, one in seen.items()} == prefetched
        world.close()


def test_a_page_counts_for_the_farthest_tier_that_something_of_it_came_from(
    tmp_path: Path,
) -> None:
    """Full pages on the device, and the window at the end of a shorter prompt further away."""
    settings = {"path": str(tmp_path)}
    first = make_grouped_world("full and window", backend="file", storage=settings)
    first.request(range(40))
    first.close()
    world = make_grouped_world("full and window", backend="file", storage=settings)
    assert world.request(range(40)).storage == 36  # and with it the window at the end
    for last, farthest in enumerate(("storage", "host")):
        before = world.cache.snapshot().hit_tokens
        assert world.request([*range(24), *[100 + last] * 8]).n_tokens == 24
        after = world.cache.snapshot().hit_tokens
        expected = {"device": 16, "host": 0, "storage": 0, farthest: 8}
        assert {tier: after[tier] - before[tier] for tier in after} == expected
        why = world.cache.explain(f"request-{world.n_requests}")
        assert why is not None
        told = {"device": why.device_tokens, "host": why.host_tokens, "storage": why.storage_tokens}
        assert told == expected
        world.cache.free_units(0, world.cache.allocate_units(0, world.pool.groups[0].n_pages))
    world.close()


def test_a_cut_match_is_counted_for_the_group_that_cuts() -> None:
    world = make_grouped_world()
    world.request(range(40))
    outcome = world.request([*range(32), *range(100, 108)])
    assert outcome.cut_by
    cuts = {name: (one.cut_matches, one.cut_tokens) for name, one in groups(world).items()}
    others = {name: (0, 0) for name in cuts}
    assert cuts == others | {outcome.cut_by: (1, 32 - outcome.n_tokens)}
    world.close()


def test_a_host_without_room_for_units_is_counted() -> None:
    world = make_grouped_world("full and window", n_units=12, device_pages=12, hicache_ratio=0.25)
    world.request(range(40))
    world.cache.flush(10.0)
    seen = groups(world)["swa"]
    assert seen.skipped_units["backup"] + seen.moved_units["backup"] == 10
    assert seen.skipped_units["backup"] > 0
    assert world.cache.counters.backup_skipped_pages == 7  # of 10 full pages, for 3 host pages
    world.close()


def test_the_picture_of_the_tree_says_where_units_are() -> None:
    world = make_grouped_world()
    world.request(range(40))
    assert world.cache.flush(10.0)
    picture = take_picture(world.cache.parts.tree)
    last = max(picture.nodes, key=lambda node: node.depth_tokens)
    assert last.units == {"swa": ("device", "host"), "mamba": ("device", "host")}
    first = next(node for node in picture.nodes if node.tokens)
    assert first.units == {"swa": ("host",), "mamba": ("device", "host")}
    world.close()


def test_real_counts_are_exported() -> None:
    world = make_grouped_world()
    world.request(range(40))
    families = {
        family.name: family for family in CacheCollector(Watch(world.cache.snapshot)).collect()
    }
    units = families["hicache:group_units"].samples
    for group in ("swa", "mamba"):
        for tier in ("device", "host"):
            mine = [
                s.value for s in units if (s.labels["group"], s.labels["tier"]) == (group, tier)
            ]
            assert len(mine) == 3
            assert sum(mine) >= 32
    world.close()
