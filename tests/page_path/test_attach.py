"""Storage comes, goes and changes while requests run: none fails, none sees a wrong byte."""

from __future__ import annotations

import time
import uuid
from typing import Any

import pytest

from hicache_core.controller.attachment import Attaching
from hicache_core.errors import ConfigError
from tests.no_threads import no_threads
from tests.page_path import backends
from tests.page_path.world import Outcome, World, ids, make_world, opened


def shared() -> dict[str, Any]:
    return {"share": uuid.uuid4().hex}


def by_class(backend: type[Any]) -> dict[str, str]:
    return {
        "backend_name": backend.name,
        "module_path": "tests.page_path.backends",
        "class_name": backend.__name__,
    }


def settled(world: World, attaching: Attaching) -> Attaching:
    for _ in range(2000):
        if attaching.done:
            return attaching
        world.cache.wait(0.01)
        world.cache.poll()
        world.check()
    raise AssertionError("it never came to that")


def drained(world: World) -> None:
    for _ in range(2000):
        if not world.cache.snapshot().draining_backends:
            return
        world.cache.wait(0.01)
        world.cache.poll()
        world.check()
    raise AssertionError("it never came to that")


def writing(world: World) -> None:
    """Polls until what was computed has been offered to storage."""
    while world.cache.snapshot().jobs_in_flight["copy"]:
        world.cache.wait(0.01)
        world.cache.poll()


def test_a_cache_without_storage_gets_one(worlds: list[World]) -> None:
    world = opened(worlds)
    world.request(ids(33))
    assert world.cache.storage_name is None
    store = shared()
    assert settled(world, world.cache.attach_storage("memory", store)).error == ""
    assert world.cache.storage_name == "memory"
    world.request(ids(33))  # what was there already is offered to the new store at its next use
    assert world.cache.flush(10.0)
    other = opened(worlds, storage=store)
    assert other.request(ids(33)).storage == 32


def test_after_a_swap_pages_go_to_the_new_store_and_not_to_the_old(worlds: list[World]) -> None:
    old, new = shared(), shared()
    opened(worlds, storage=old)  # keeps the old store alive
    world = opened(worlds, storage=old)
    world.request(ids(17))
    assert world.cache.flush(10.0)
    settled(world, world.cache.attach_storage("memory", new))
    world.request(ids(33))
    assert world.cache.flush(10.0)
    assert opened(worlds, storage=new).request(ids(33)).storage == 32
    assert opened(worlds, storage=old).request(ids(33)).storage == 16


def test_detached_the_cache_goes_on_from_device_and_host(worlds: list[World]) -> None:
    store = shared()
    opened(worlds, storage=store)  # keeps the store alive
    world = opened(worlds, storage=store)
    world.request(ids(33))
    writing(world)
    world.cache.detach_storage()
    drained(world)
    assert world.cache.storage_name is None
    world.flush_device()
    assert world.request(ids(33)).host == 32
    assert (
        opened(worlds, storage=store).request(ids(33)).storage == 32
    )  # what was accepted is there


def test_a_backend_that_does_not_open_changes_nothing(worlds: list[World]) -> None:
    world = opened(worlds, storage=shared())
    attaching = settled(world, world.cache.attach_storage("file", {"path": "/dev/null/no"}))
    assert "/dev/null/no" in attaching.error
    assert world.cache.storage_name == "memory"
    unknown = settled(world, world.cache.attach_storage("rediss", {}))
    assert "rediss" in unknown.error
    assert world.request(ids(33)) == Outcome(0, 0, 0, computed_pages=8)


def test_a_request_that_waits_for_a_detached_store_goes_on(worlds: list[World]) -> None:
    world = opened(worlds, storage=by_class(backends.Store), backend="dynamic")
    world.request(ids(33))
    assert world.cache.flush(10.0)
    gated = opened(worlds, storage=by_class(backends.Gated), backend="dynamic", batch_pages=2)
    assert gated.cache.prefetch("r1", ids(33))
    while not gated.cache.snapshot().bytes_in_flight["read"]:
        gated.cache.wait(0.01)
        gated.cache.poll()
    assert backends.Gated.entered.acquire(timeout=10.0)
    gated.cache.detach_storage()
    assert not gated.cache.prefetch("r2", ids(33))  # nothing to ask any more
    backends.Gated.gate.release(100)
    gated.wait_for_prefetch("r1")
    gated.cache.finish_prefetch("r1")
    drained(gated)
    assert gated.request(ids(33)).computed_pages <= 8


def test_a_store_that_hangs_in_a_write_does_not_keep_the_next_from_coming(
    worlds: list[World],
) -> None:
    world = opened(worlds, storage=by_class(backends.GatedWrites), backend="dynamic")
    world.request(ids(33))
    writing(world)
    store = shared()
    settled(world, world.cache.attach_storage("memory", store))
    assert world.cache.snapshot().draining_backends == 1
    world.request(ids(41))
    assert world.request(ids(41)).device == 40
    backends.GatedWrites.gate.release(100)
    drained(world)
    assert world.cache.flush(10.0)


def test_without_a_host_tier_there_is_nothing_to_attach_to(worlds: list[World]) -> None:
    world = opened(worlds, enable_hierarchical_cache=False)
    with pytest.raises(ConfigError, match="enable_hierarchical_cache"):
        world.cache.attach_storage("memory", {})
    with pytest.raises(ConfigError, match="enable_hierarchical_cache"):
        world.cache.detach_storage()


@pytest.mark.parametrize("opens", ["before the cache closes", "afterwards"])
def test_a_backend_that_is_being_attached_when_the_cache_closes_is_closed(opens: str) -> None:
    slow = backends.OpensSlowly
    slow.reset()
    world = make_world(storage=shared())
    attaching = world.cache.attach_storage("dynamic", by_class(slow))
    assert slow.entered.acquire(timeout=10)
    if opens == "afterwards":
        world.cache.close(0.1)
        slow.gate.release()
    else:
        slow.gate.release()
        while not attaching._ended:
            time.sleep(0.01)
        world.cache.close(0.1)
    assert slow.closed.acquire(timeout=10)
    assert not slow.closed.acquire(timeout=0.1)


def test_a_store_that_refuses_to_be_cleared_says_so_and_goes_on(worlds: list[World]) -> None:
    world = make_world(storage=by_class(backends.RaisesOnClear), backend="dynamic")
    worlds.append(world)
    clearing = world.cache.clear_storage()
    while not clearing.done:
        world.cache.poll()
    assert (clearing.n_objects, "not you" in clearing.error) == (0, True)
    world.request(ids(33))
    assert world.cache.flush(10.0)
    assert backends.Store.objects


def test_a_cache_without_a_store_has_nothing_to_clear(worlds: list[World]) -> None:
    worlds.append(make_world())
    with pytest.raises(ConfigError, match="no storage backend is attached"):
        worlds[0].cache.clear_storage()


def test_without_threads_storage_is_not_attached_nor_cleared_and_requests_go_on(
    worlds: list[World],
) -> None:
    world = opened(worlds, storage=shared())
    world.request(ids(33))
    assert world.cache.flush(10.0)
    with no_threads("hicache-"):
        attaching = settled(world, world.cache.attach_storage("memory", shared()))
        assert "can't start new thread" in attaching.error
        clearing = world.cache.clear_storage()
        while not clearing.done:
            world.cache.poll()
        assert "can't start new thread" in clearing.error
        world.cache.detach_storage()
        world.request(ids(33, start=500))
        assert world.cache.snapshot().draining_backends == 1
    drained(world)
    attaching = settled(world, world.cache.attach_storage("memory", shared()))
    assert attaching.error == ""


def test_a_cache_without_threads_closes(worlds: list[World]) -> None:
    world = make_world(storage=shared())
    world.request(ids(33))
    with no_threads("hicache-aside"):
        world.cache.close(1.0)


def test_a_store_that_is_only_read_serves_and_gets_nothing(worlds: list[World]) -> None:
    store = shared()
    opened(worlds, storage=store).request(ids(17))
    assert worlds[0].cache.flush(10.0)
    world = opened(worlds, storage={**store, "read_only": True})
    assert world.request(ids(17)).storage == 16
    world.request(ids(33))
    assert world.cache.flush(10.0)
    world.flush_device()
    assert world.request(ids(33)).host == 32, "what was not stored is still cached"
    snapshot = world.cache.snapshot()
    assert snapshot.counters["stored_pages"] == 0
    assert [backend.read_only for backend in snapshot.backends] == [True]
    with pytest.raises(ConfigError, match="cannot be cleared"):
        world.cache.clear_storage()
    assert opened(worlds, storage=store).request(ids(33)).storage == 16
