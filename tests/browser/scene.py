"""A scene for the page: a real cache whose requests have met every tier and many reasons."""

from __future__ import annotations

import uuid

from hicache_core.types import Namespace
from tests.page_path.world import World, ids, make_world


def busy_world() -> World:
    """Small and full: hits of all tiers, evictions, a tenant, a store that has failed."""
    share = uuid.uuid4().hex
    elsewhere = make_world(storage={"share": share})
    elsewhere.request(ids(41, 500))
    elsewhere.close()
    world = make_world(device_pages=64, ratio=2.0, storage={"share": share}, hicache_status_port=0)
    system = ids(40)
    world.request(ids(41, 500))  # another server has stored it
    for chat in range(6):
        turn = system + ids(24, 1000 + 100 * chat)
        world.request([*turn, 1])
        world.request([*turn, *ids(12, 2000 + 100 * chat), 1])
    world.cache.flush(10.0)
    world.flush_device()
    world.request([*system, *ids(24, 1000), 1])  # from the host
    world.salt = Namespace(cache_salt="another tenant")
    world.request([*system, 1])
    world.salt = Namespace()
    world.request(ids(3))  # shorter than a page
    for chat in range(30):  # more than device and host hold
        world.request([*ids(33, 3000 + 50 * chat)])
        world.cache.flush(10.0)
    world.request([*system, *ids(24, 1500), *ids(8, 9000), 1])
    world.request([*system, *ids(24, 1400), 1])
    world.cache.flush(10.0)
    return world


def url_of(world: World) -> str:
    """Where its page is."""
    found = world.cache.status_url
    assert found is not None
    return f"{found}/hicache/"
