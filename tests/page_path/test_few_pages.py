"""Pools of a few pages: prefetch, load_back and backup never wait for each other.

The argument stands in ARCHITECTURE.md; here it is tried.
"""

from __future__ import annotations

import random
import uuid
from typing import Any

import pytest

from hicache_core.errors import PoolExhausted
from tests.page_path import backends
from tests.page_path.world import PAGE_SIZE, World, ids, opened


@pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
@pytest.mark.parametrize(("device_pages", "host_pages"), [(3, 1), (3, 2), (4, 3), (3, 6)])
def test_every_request_is_served_whatever_is_in_flight(
    worlds: list[World], policy: str, device_pages: int, host_pages: int
) -> None:
    """Requests for the same few pages at once: asked for, given up, loaded, stored, evicted."""
    draw = random.Random(f"{policy} {device_pages} {host_pages}")
    world = opened(
        worlds,
        device_pages=device_pages,
        ratio=host_pages / device_pages,
        storage={"share": uuid.uuid4().hex},
        hicache_write_policy=policy,
        batch_pages=1,
    )
    others: list[str] = []
    for n in range(60):
        start = 100 * draw.randrange(4)
        tokens = ids(draw.randrange(1, 3 * PAGE_SIZE + 1), start)
        if draw.random() < 0.5 and world.cache.prefetch(f"other-{n}", tokens):
            others.append(f"other-{n}")
        world.request(tokens, prefetch=draw.random() < 0.7)
        while len(others) > 3:
            world.cache.finish_prefetch(others.pop(0))
    for other in others:
        world.cache.finish_prefetch(other)
    assert world.cache.flush(10.0)


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_a_store_that_takes_nothing_keeps_no_page_of_the_device(
    worlds: list[World], policy: str
) -> None:
    """Host pages wait for the store, and the device goes on: what hangs below is given up."""
    storage = {
        "backend_name": "gated_writes",
        "module_path": "tests.page_path.backends",
        "class_name": "GatedWrites",
    }
    world = opened(
        worlds,
        device_pages=6,
        ratio=0.5,
        storage=storage,
        backend="dynamic",
        hicache_write_policy=policy,
    )
    for turn in range(1, 6):  # each turn is a node of its own, below the last
        world.request(ids(PAGE_SIZE * turn + 1))
        world.cache.evict(1)
    for start in (1000, 2000, 3000):
        world.request(ids(PAGE_SIZE * 6, start))
    assert world.cache.evict(6) == 6
    world.check()
    backends.GatedWrites.gate.release(1000)
    assert world.cache.flush(10.0)
    world.check()


@pytest.mark.parametrize("hangs_at", ["question", "read"])
def test_a_store_that_does_not_answer_keeps_no_page_of_a_request_that_went_on(
    worlds: list[World], hangs_at: str
) -> None:
    """Its question, or its read below a prefix of the device, goes on; the prefix may leave."""
    gate = {"question": backends.GatedQuestions, "read": backends.Gated}[hangs_at]
    store, gated = (
        {
            "backend_name": kind.name,
            "module_path": "tests.page_path.backends",
            "class_name": kind.__name__,
        }
        for kind in (backends.Store, gate)
    )
    make: dict[str, Any] = {
        "backend": "dynamic",
        "hicache_write_policy": "write_through_selective",
    }
    first = opened(worlds, storage=store, **make)
    for _ in range(2):
        first.request(ids(6 * PAGE_SIZE))
    assert first.cache.flush(10.0)
    world = opened(worlds, device_pages=6, ratio=1.0, storage=gated, **make)
    world.request(ids(2 * PAGE_SIZE), prefetch=False)
    assert world.cache.prefetch("r", ids(6 * PAGE_SIZE))
    while not gate.entered.acquire(timeout=0.01):
        world.cache.poll()
    assert world.cache.evict(2) == 0, "the request may still want to go on from there"
    world.cache.finish_prefetch("r")
    assert world.cache.evict(2) == 2
    world.check()
    world.request(ids(5 * PAGE_SIZE), prefetch=False)
    gate.gate.release(1000)
    assert world.cache.flush(10.0)
    world.request(ids(6 * PAGE_SIZE))
    world.check()


def test_what_is_locked_by_requests_is_the_only_reason_to_refuse(worlds: list[World]) -> None:
    world = opened(worlds, device_pages=4, ratio=1.0, storage={})
    world.request(ids(2 * PAGE_SIZE))
    match = world.cache.match_prefix(ids(2 * PAGE_SIZE))
    world.cache.lock(match.node)
    pages = world.cache.allocate(2)
    with pytest.raises(PoolExhausted):
        world.cache.allocate(1)
    world.cache.free(pages)
    world.cache.unlock(match.node)
    pages = world.cache.allocate(4)
    world.cache.free(pages)
