"""What was computed a moment ago is never a miss because our own write is not done yet."""

from __future__ import annotations

import uuid
from typing import Any

from tests.page_path import backends
from tests.page_path.world import World, ids, make_world


def gated(worlds: list[World], **settings: Any) -> World:
    storage = {
        "backend_name": "gated_writes",
        "module_path": "tests.page_path.backends",
        "class_name": "GatedWrites",
    }
    world = make_world(storage=storage, backend="dynamic", **settings)
    worlds.append(world)
    return world


def written(world: World) -> None:
    """Polls until what was computed waits at the gate of the store."""
    while world.cache.snapshot().jobs_in_flight["copy"]:
        world.cache.wait(0.01)
        world.cache.poll()


def test_a_page_whose_write_is_in_flight_is_a_host_hit(worlds: list[World]) -> None:
    world = gated(worlds)
    world.request(ids(33))
    written(world)
    assert world.flush_device() == 8
    assert world.request(ids(33)).host == 32


def test_a_page_whose_write_is_in_flight_stays_on_the_host_whatever_comes(
    worlds: list[World],
) -> None:
    """Others find no host page instead: what is not durable anywhere else is not given up."""
    world = gated(worlds, device_pages=9, ratio=1.0)
    world.request(ids(33))
    written(world)
    for start in (1000, 2000, 3000):
        world.request(ids(33, start))
        written(world)
    assert world.request(ids(33)).host == 32


def test_flush_returns_only_when_everything_accepted_is_in_the_store(worlds: list[World]) -> None:
    world = gated(worlds)
    world.request(ids(33))
    assert not world.cache.flush(0.2)  # one write is held
    assert not backends.Store.objects
    backends.GatedWrites.gate.release(1000)
    assert world.cache.flush(10.0)
    assert len(backends.Store.objects) == 8


def test_flush_waits_for_the_far_store_of_a_chain_too(worlds: list[World]) -> None:
    near, far = uuid.uuid4().hex, uuid.uuid4().hex
    keeper = make_world(storage={"share": far})
    worlds.append(keeper)
    chain = {
        "links": [
            {"backend": "memory", "name": "near", "config": {"share": near}},
            {"backend": "memory", "name": "far", "config": {"share": far}},
        ],
        "write": "behind",
    }
    world = make_world(storage=chain, backend="chain")
    worlds.append(world)
    world.request(ids(33))
    assert world.cache.flush(10.0)
    reader = make_world(storage={"share": far})
    worlds.append(reader)
    assert reader.request(ids(33)).storage == 32


def test_the_next_turn_of_a_conversation_finds_the_one_before_it(worlds: list[World]) -> None:
    """Another process asks right after flush(): the write is there, not on its way."""
    share = uuid.uuid4().hex
    first = make_world(storage={"share": share})
    worlds.append(first)
    for turn in range(1, 6):
        first.request(ids(8 * turn + 1))
        assert first.cache.flush(10.0)
        other = make_world(storage={"share": share})
        worlds.append(other)
        assert other.request(ids(8 * turn + 1)).storage == 8 * turn
