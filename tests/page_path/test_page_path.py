"""The way of a page, tier by tier, with every byte checked."""

from __future__ import annotations

import uuid
from array import array
from typing import Any

import pytest

from hicache_core.errors import IntegrityError, InvalidTokens, PoolExhausted, UseAfterClose
from hicache_core.types import Namespace
from tests.page_path.world import PAGE_SIZE, Outcome, World, ids, make_world, opened

MODES = [
    pytest.param({"hicache_mem_layout": layout, "hicache_io_backend": io}, id=f"{layout}-{io}")
    for layout, io in [
        ("page_first", "kernel"),
        ("layer_first", "kernel"),
        ("layer_first", "direct"),
        ("page_first_direct", "direct"),
    ]
]


@pytest.fixture
def store() -> dict[str, Any]:
    """Settings of a memory store that several worlds of one test share."""
    return {"share": uuid.uuid4().hex}


@pytest.mark.parametrize("mode", MODES)
def test_a_prefix_is_served_by_each_tier_in_turn(
    worlds: list[World], store: dict[str, Any], mode: dict[str, Any]
) -> None:
    """Cold, device, host, storage: the same pages, byte by byte, in every layout."""
    world = opened(worlds, storage=store, **mode)
    assert world.request(ids(33)) == Outcome(0, 0, 0, computed_pages=8)
    assert world.request(ids(33)) == Outcome(32, 0, 0, computed_pages=0)
    assert world.cache.flush(10.0)
    assert world.flush_device() == 8
    assert world.request(ids(33)) == Outcome(0, 32, 0, computed_pages=0)
    assert world.cache.flush(10.0)
    other = opened(worlds, storage=store, **mode)
    assert other.request(ids(33)) == Outcome(0, 32, 32, computed_pages=0)
    assert other.request(ids(33)) == Outcome(32, 0, 0, computed_pages=0)


def test_a_shared_system_prompt_is_found_by_another_conversation(
    worlds: list[World], store: dict[str, Any]
) -> None:
    first = opened(worlds, storage=store)
    first.request([*ids(20), 100, 101, 102, 103])
    assert first.request([*ids(20), 200, 201, 202, 203]).device == 20
    first.cache.flush(10.0)
    second = opened(worlds, storage=store)
    assert second.request(ids(20) + [7] * 9) == Outcome(0, 20, 20, computed_pages=2)


def test_the_page_of_the_last_token_is_never_read_from_storage(
    worlds: list[World], store: dict[str, Any]
) -> None:
    first = opened(worlds, storage=store)
    first.request(ids(16))
    first.cache.flush(10.0)
    second = opened(worlds, storage=store)
    assert second.request(ids(16)) == Outcome(0, 12, 12, computed_pages=1)


@pytest.mark.parametrize("changed", ["cache_salt", "extra_key", "lora_id"])
def test_tenants_never_share(worlds: list[World], store: dict[str, Any], changed: str) -> None:
    """Equal tokens under another salt, key or adapter are a miss in every tier."""
    world = opened(worlds, storage=store)
    world.request(ids(33))
    world.cache.flush(10.0)
    world.salt = Namespace(**{changed: "another"})
    assert world.request(ids(33)) == Outcome(0, 0, 0, computed_pages=8)


def test_another_model_shares_nothing_in_storage(
    worlds: list[World], store: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(worlds, storage=store)
    first.request(ids(33))
    first.cache.flush(10.0)
    from dataclasses import replace

    from tests.page_path import world as world_module

    monkeypatch.setattr(
        world_module, "SPEC", replace(world_module.SPEC, model_fingerprint="other weights")
    )
    second = opened(worlds, storage=store)
    assert second.request(ids(33)) == Outcome(0, 0, 0, computed_pages=8)


@pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
def test_every_write_policy_serves_right_bytes_under_pressure(
    worlds: list[World], store: dict[str, Any], policy: str
) -> None:
    """Three conversations that do not fit the device together, several turns each."""
    world = opened(worlds, storage=store, device_pages=12, hicache_write_policy=policy)
    for turn in range(1, 5):
        for conversation in range(3):
            world.request(ids(8 * turn + 1, start=1000 * conversation))


def test_write_through_copies_at_once(worlds: list[World]) -> None:
    world = opened(worlds)
    world.request(ids(16))
    world.cache.flush(10.0)
    assert world.cache.snapshot().host.cached_pages == 4


def test_write_through_selective_copies_at_the_second_use(worlds: list[World]) -> None:
    world = opened(worlds, hicache_write_policy="write_through_selective")
    world.request(ids(16))
    world.cache.flush(10.0)
    assert world.cache.snapshot().host.cached_pages == 0
    world.request(ids(16))
    world.cache.flush(10.0)
    assert world.cache.snapshot().host.cached_pages == 4


def test_write_back_copies_what_leaves_the_device_and_nothing_else(worlds: list[World]) -> None:
    world = opened(worlds, hicache_write_policy="write_back")
    world.request(ids(16))
    world.cache.flush(10.0)
    assert world.cache.snapshot().host.cached_pages == 0
    assert world.cache.evict(2) == 2
    assert world.cache.snapshot().host.cached_pages == 2
    assert world.request(ids(16)) == Outcome(8, 8, 0, computed_pages=0)


def test_without_the_hierarchy_only_the_device_caches(worlds: list[World]) -> None:
    world = opened(worlds, enable_hierarchical_cache=False)
    world.request(ids(33))
    assert world.request(ids(33)).device == 32
    world.flush_device()
    assert world.request(ids(33)) == Outcome(0, 0, 0, computed_pages=8)


def test_a_host_smaller_than_a_prefix_keeps_its_head(worlds: list[World]) -> None:
    """Backup takes the leading pages that fit; the rest is computed again, nothing waits."""
    world = opened(worlds, device_pages=16, ratio=0.25)
    world.request(ids(33))
    world.cache.flush(10.0)
    world.flush_device()
    assert world.request(ids(33)) == Outcome(0, 16, 0, computed_pages=4)


def test_load_back_without_room_on_the_device_computes_again(worlds: list[World]) -> None:
    world = opened(worlds, device_pages=8)
    world.request(ids(16))
    world.cache.flush(10.0)
    world.flush_device()
    held = world.cache.allocate(7)
    match = world.cache.match_prefix(ids(16))
    world.cache.lock(match.node)
    assert len(world.cache.load_back(match).device_pages) == 0
    assert world.cache.counters.load_back_skipped_pages == 4
    world.cache.unlock(match.node)
    world.cache.free(held)


def test_load_back_wants_a_lock(worlds: list[World]) -> None:
    world = opened(worlds)
    world.request(ids(16))
    world.cache.flush(10.0)
    world.flush_device()
    with pytest.raises(IntegrityError, match="lock it first"):
        world.cache.load_back(world.cache.match_prefix(ids(16)))


def test_a_locked_prefix_is_not_evicted(worlds: list[World]) -> None:
    world = opened(worlds, device_pages=8)
    world.request(ids(16))
    match = world.cache.match_prefix(ids(16))
    world.cache.lock(match.node)
    world.cache.flush(10.0)
    assert world.flush_device() == 0
    with pytest.raises(PoolExhausted):
        world.cache.allocate(5)
    world.cache.unlock(match.node)
    assert world.flush_device() == 4


def test_two_requests_that_computed_the_same_keep_one_copy(worlds: list[World]) -> None:
    """Pages already known come back as duplicates, to be freed."""
    world = opened(worlds, device_pages=8)
    mine, theirs = world.cache.allocate(2), world.cache.allocate(2)
    for pages in (mine, theirs):
        for layer in range(2):
            world.compute_layer(bytes_of(8), pages, 0, layer)
    assert world.cache.insert(ids(8), mine).duplicates == array("i")
    result = world.cache.insert(ids(8), theirs)
    assert result.duplicates == theirs
    assert result.pages == mine
    world.cache.free(result.duplicates)
    world.check()


def bytes_of(n: int) -> bytes:
    return b"".join(i.to_bytes(4, "little") for i in range(n))


@pytest.mark.parametrize("bad", [[-1] * 8, [2**32] * 8, [1.5] * 8, ["a"] * 8, b"123"])
def test_bad_tokens_are_refused_everywhere_and_change_nothing(
    worlds: list[World], store: dict[str, Any], bad: Any
) -> None:
    world = opened(worlds, storage=store)
    pages = world.cache.allocate(2)
    with pytest.raises(InvalidTokens):
        world.cache.match_prefix(bad)
    with pytest.raises(InvalidTokens):
        world.cache.prefetch("r", bad)
    with pytest.raises(InvalidTokens):
        world.cache.insert(bad, pages)
    world.cache.free(pages)
    world.check()


@pytest.mark.parametrize("n", [0, 1, PAGE_SIZE - 1])
def test_a_prompt_shorter_than_a_page_is_a_miss_and_is_not_kept(
    worlds: list[World], store: dict[str, Any], n: int
) -> None:
    world = opened(worlds, storage=store)
    assert world.request(ids(n)) == Outcome(0, 0, 0, computed_pages=0)
    assert world.cache.snapshot().device.cached_pages == 0


def test_after_close_every_call_says_so() -> None:
    world = make_world()
    world.close()
    world.cache.close()
    for call in (
        lambda: world.cache.match_prefix(ids(8)),
        lambda: world.cache.prefetch("r", ids(8)),
        lambda: world.cache.allocate(1),
        lambda: world.cache.insert(ids(4), array("i", [0])),
        world.cache.flush,
    ):
        with pytest.raises(UseAfterClose):
            call()
