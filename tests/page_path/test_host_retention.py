"""free_once_stored: a host page goes as soon as storage has it, and no sooner."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from hicache_core.controller.explain import Reason
from tests.page_path import backends
from tests.page_path.test_storage_faults import on
from tests.page_path.world import PAGE_SIZE, World, ids, opened

FREE: dict[str, Any] = {"hicache_host_retention": "free_once_stored"}


def used_host_pages(world: World) -> int:
    """Host pages that are not free."""
    host = world.cache.snapshot().host
    assert host is not None
    return host.used_pages


def lost(world: World) -> dict[tuple[str, str], int]:
    """Pages that left, by tier and cause."""
    return {(i.tier, i.cause): i.n_pages for i in world.cache.snapshot().evicted_pages}


def test_a_stored_page_leaves_the_host_and_stays_on_the_device(worlds: list[World]) -> None:
    share = uuid.uuid4().hex
    world = opened(worlds, storage={"share": share}, **FREE)
    world.request(ids(33))
    assert world.cache.flush(10.0)
    world.check()
    assert used_host_pages(world) == 0
    assert lost(world) == {("host", "stored"): 8}
    assert world.cache.counters.evicted_host_pages == 8
    assert world.request(ids(33)).device == 32
    other = opened(worlds, storage={"share": share})
    assert other.request(ids(33)).storage == 32


def test_by_default_the_host_keeps_what_storage_has(worlds: list[World]) -> None:
    world = opened(worlds, storage={"share": uuid.uuid4().hex})
    world.request(ids(33))
    assert world.cache.flush(10.0)
    assert used_host_pages(world) == 8
    assert lost(world) == {}


def test_without_storage_the_host_is_a_cache_like_any_other(worlds: list[World]) -> None:
    world = opened(worlds, **FREE)
    world.request(ids(33))
    assert world.cache.flush(10.0)
    world.flush_device()
    assert world.request(ids(33)).host == 32


def test_a_page_that_storage_did_not_take_stays_in_the_host(worlds: list[World]) -> None:
    world = on(worlds, backends.RaisesOnWrite, **FREE)
    world.request(ids(33))
    assert world.cache.flush(10.0)
    assert used_host_pages(world) == 8
    world.flush_device()
    assert world.request(ids(33)).host == 32


def test_stored_pages_are_copied_and_written_once(worlds: list[World]) -> None:
    """Though the host has them no more, the next request on the same prefix writes its own only."""
    world = on(worlds, backends.Store, **FREE)
    world.request(ids(33))
    assert world.cache.flush(10.0)
    world.request(ids(49))
    assert world.cache.flush(10.0)
    assert used_host_pages(world) == 0
    assert world.cache.counters.stored_pages == 12
    assert world.cache.counters.backup_tokens == 12 * PAGE_SIZE


def test_under_write_back_stored_pages_leave_the_device_without_another_copy(
    worlds: list[World],
) -> None:
    world = on(worlds, backends.Store, hicache_write_policy="write_back", **FREE)
    world.request(ids(33))
    world.flush_device()
    assert world.cache.flush(10.0)
    assert used_host_pages(world) == 0
    assert world.cache.match_prefix(ids(33), touch=False).n_tokens == 0
    assert world.request(ids(33)).storage == 32
    world.flush_device()
    assert world.cache.counters.backup_tokens == 8 * PAGE_SIZE


def test_a_page_goes_though_one_behind_it_is_still_being_stored(worlds: list[World]) -> None:
    """As while decoding: page after page, each with a write of its own."""
    world = on(worlds, backends.GatedWrites, **FREE)
    backends.GatedWrites.gate.release(1)
    world.request(ids(17))
    while used_host_pages(world) or not world.cache.counters.stored_pages:
        world.cache.wait(1.0)
        world.cache.poll()
    world.request(ids(33))
    while world.cache.counters.backup_tokens < 32:
        world.cache.wait(1.0)
        world.cache.poll()
    world.check()
    assert used_host_pages(world) == 4
    backends.open_gates()
    assert world.cache.flush(10.0)
    assert used_host_pages(world) == 0


@pytest.mark.parametrize("leaves_device", [False, True])
def test_a_page_that_a_request_holds_on_the_host_alone_stays(
    worlds: list[World], leaves_device: bool
) -> None:
    world = on(worlds, backends.GatedWrites, **FREE)
    world.request(ids(33))
    while world.cache.counters.backup_tokens < 32:
        world.cache.wait(1.0)
        world.cache.poll()
    if leaves_device:
        assert world.flush_device() == 8
    match = world.cache.match_prefix(ids(33))
    world.cache.lock(match.node)
    backends.open_gates()
    assert world.cache.flush(10.0)
    world.check()
    assert used_host_pages(world) == (8 if leaves_device else 0)
    world.cache.unlock(match.node)


def test_the_journal_and_explain_hear_why_it_left(worlds: list[World]) -> None:
    world = on(worlds, backends.GatedWrites, **FREE)
    world.request(ids(33))
    while world.cache.counters.backup_tokens < 32:
        world.cache.wait(1.0)
        world.cache.poll()
    world.flush_device()  # the host alone has it now, and lets it go once it is stored
    backends.open_gates()
    assert world.cache.flush(10.0)
    assert world.cache.match_prefix(ids(33), touch=False).n_tokens == 0
    backends.Store.objects.clear()
    world.request(ids(33))
    explanation = world.cache.explain(f"request-{world.n_requests}")
    assert explanation is not None
    assert explanation.reason is Reason.EVICTED
    assert "it left the host" in explanation.detail
    assert "(stored), and storage does not have it" in explanation.detail
