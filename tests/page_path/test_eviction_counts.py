"""What evictions lose is counted; evictions and backups are timed; what storage has is a hit."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from hicache_core.observe.metrics import CacheCollector
from hicache_core.observe.windows import Watch
from tests.page_path import backends
from tests.page_path.test_storage_faults import on, stored
from tests.page_path.world import World, ids, opened

LOST = {"write_back": "host_pressure", "write_through": "write_through_unbacked_eviction"}


def value(world: World, name: str, **labels: str) -> float | None:
    """A sample of the series of a world."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(CacheCollector(Watch(world.cache.snapshot)))
    return registry.get_sample_value(f"hicache:{name}", labels)


def lost_tokens(world: World) -> dict[str, float | None]:
    return {
        policy: value(world, "hicache_dropped_tokens_total", reason=reason, pool="kv")
        for policy, reason in LOST.items()
    }


@pytest.mark.parametrize("policy", LOST)
def test_pages_for_which_the_host_has_no_room_are_lost_by_eviction(
    worlds: list[World], policy: str
) -> None:
    world = opened(worlds, device_pages=16, ratio=0.25, hicache_write_policy=policy)
    world.request(ids(33))
    world.cache.flush(10.0)
    assert world.flush_device() == 8
    n_host = world.cache.snapshot().host.cached_pages
    assert n_host < 8
    assert lost_tokens(world) == {**dict.fromkeys(LOST, 0.0), policy: 4.0 * (8 - n_host)}
    assert value(world, "evicted_tokens_total") == 32


@pytest.mark.parametrize("policy", LOST)
def test_pages_that_the_host_has_are_not_lost(worlds: list[World], policy: str) -> None:
    world = opened(worlds, hicache_write_policy=policy)
    world.request(ids(33))
    world.cache.flush(10.0)
    assert world.flush_device() == 8
    assert lost_tokens(world) == dict.fromkeys(LOST, 0.0)


def test_pages_that_were_not_used_twice_are_not_missed_under_write_through_selective(
    worlds: list[World],
) -> None:
    world = opened(worlds, hicache_write_policy="write_through_selective")
    world.request(ids(33))
    assert world.flush_device() == 8
    assert lost_tokens(world) == dict.fromkeys(LOST, 0.0)


def test_pages_that_only_storage_keeps_are_not_lost(worlds: list[World]) -> None:
    world = on(worlds, backends.Store, hicache_host_retention="free_once_stored")
    world.request(ids(33))
    assert world.cache.flush(10.0)
    assert world.cache.snapshot().host.cached_pages == 0
    assert world.flush_device() == 8
    assert lost_tokens(world) == dict.fromkeys(LOST, 0.0)


def test_without_a_host_there_is_nothing_to_be_copied(worlds: list[World]) -> None:
    world = opened(worlds, enable_hierarchical_cache=False)
    world.request(ids(33))
    assert world.flush_device() == 8
    assert lost_tokens(world) == dict.fromkeys(LOST, None)
    assert value(world, "hicache_backup_duration_seconds_count") is None
    assert value(world, "eviction_duration_seconds_count") == 1


class Clock:
    """One second passes at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_an_eviction_is_timed_if_it_frees_pages(worlds: list[World]) -> None:
    clock = Clock()
    world = opened(worlds, clock=clock, enable_hierarchical_cache=False)
    world.request(ids(33))
    before = clock.now
    assert world.cache.evict(1) > 0
    took = clock.now - before - 1
    assert value(world, "eviction_duration_seconds_count") == 1
    assert value(world, "eviction_duration_seconds_sum") == took > 0
    world.flush_device()
    assert world.cache.evict(1) == 0
    assert value(world, "eviction_duration_seconds_count") == 2


def test_each_backup_is_timed_once(worlds: list[World]) -> None:
    world = opened(worlds)
    world.request(ids(33))
    world.request(ids(33, start=100))
    assert world.cache.flush(10.0)
    assert value(world, "hicache_backup_duration_seconds_count") == 2
    assert value(world, "hicache_backup_duration_seconds_sum") > 0


@pytest.mark.parametrize(("backend", "n_loaded"), [("Store", 32), ("RaisesOnRead", 0)])
def test_what_storage_says_it_has_counts_as_a_hit_whether_it_comes_or_not(
    worlds: list[World], backend: str, n_loaded: int
) -> None:
    stored(worlds)
    kind: Any = getattr(backends, backend)
    world = on(worlds, kind)
    assert world.request(ids(49)).storage == n_loaded
    assert value(world, "storage_prefetch_hit_tokens_total") == 32
    assert value(world, "prefetched_tokens_total") == n_loaded
