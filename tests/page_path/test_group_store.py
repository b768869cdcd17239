"""A store with groups of layers is emptied, limited and forgotten as one with full pages alone."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from pathlib import Path

import pytest

from hicache_core.controller.attachment import Attachment
from hicache_core.storage.base import Listable, ReportsUsage
from hicache_core.storage.sealed import HEADER_NBYTES
from tests.page_path.grouped_world import GroupedWorld, make_grouped_world


def attached(world: GroupedWorld) -> Attachment:
    storage = world.cache.parts.storage
    assert storage is not None
    assert storage.current is not None
    return storage.current


def objects(world: GroupedWorld) -> Counter[str]:
    """How many pages and units the store has, by name of the group; without manifests."""
    storage = attached(world)
    listable = storage.backend.capability(Listable)
    assert listable is not None
    names = ("", *(group.name for group in world.pool.spec.groups))
    spaces = dict(zip((storage.namespace, *storage.group_namespaces), names, strict=True))
    manifests = {key for key, _ in storage.manifests}
    keys = [key for key in listable.list_keys("") if key not in manifests]
    return Counter(spaces.get(key.partition("/")[0], "another cache's") for key in keys)


def clear(world: GroupedWorld) -> int:
    clearing = world.cache.clear_storage()
    while not clearing.done:
        world.cache.wait(0.01)
        world.cache.poll()
    assert not clearing.error
    return clearing.n_objects


def test_a_cleared_store_has_no_unit_left_and_gets_them_again() -> None:
    share = uuid.uuid4().hex
    world = make_grouped_world(storage={"share": share})
    other = make_grouped_world("full", storage={"share": share})
    other.request(range(20))
    assert other.cache.flush(10.0)
    world.request(range(40))
    assert world.cache.flush(10.0)
    stored = objects(world)
    # Both have the full pages of one namespace.
    assert stored == {"": 10, "swa": 10, "mamba": 4}
    assert clear(world) >= 24
    assert objects(world) == {}
    world.request(range(44))
    assert world.cache.flush(10.0)
    assert objects(world) == {"": 11, "swa": 11, "mamba": 5}
    other.close()
    world.close()


def test_a_reset_frees_every_unit_of_device_and_host() -> None:
    world = make_grouped_world(storage={"share": uuid.uuid4().hex})
    world.request(range(40))
    assert world.cache.flush(10.0)
    assert world.cache.reset()
    for group in world.cache.snapshot().groups:
        for pool in (group.device, group.host):
            assert pool is not None
            assert (pool.free_pages, pool.cached_pages) == (pool.n_pages, 0)
    world.check()
    assert world.request(range(48)).storage == 40
    world.close()


def test_a_reset_is_refused_while_units_are_in_use() -> None:
    world = make_grouped_world()
    world.request(range(40))
    assert world.cache.flush(10.0)
    match = world.cache.match_prefix(b"".join(n.to_bytes(4, "little") for n in range(40)))
    world.cache.lock(match.node)
    before = world.cache.snapshot().groups
    assert not world.cache.reset()
    assert world.cache.snapshot().groups == before
    world.cache.unlock(match.node)
    assert world.cache.reset()
    world.close()


@pytest.mark.parametrize("mix", ["full and window", "full and state", "full, window and state"])
def test_a_quota_holds_for_each_namespace_and_never_leads_to_wrong_bytes(
    mix: str, tmp_path: Path
) -> None:
    """Units and pages go by themselves in the store, so a prefix may lack any of them."""
    quota = 4096
    settings = {"path": str(tmp_path), "namespace_quota_nbytes": quota}
    rng = random.Random(3)
    stems = [[n] * rng.randrange(8, 40) for n in range(6)]
    n_hits = 0
    for _ in range(4):
        world = make_grouped_world(mix, backend="file", storage=dict(settings))
        for _ in range(10):
            outcome = world.request([*rng.choice(stems), *range(100, 100 + rng.randrange(12))])
            n_hits += outcome.storage
        assert world.cache.flush(10.0)
        usage = attached(world).backend.capability(ReportsUsage)
        assert usage is not None
        spaces = {attached(world).namespace, *attached(world).group_namespaces}
        told = usage.usage()
        assert set(told) == spaces
        assert all(nbytes <= quota for nbytes in told.values()), told
        world.close()
    assert n_hits


@pytest.mark.parametrize(
    ("mix", "largest", "least"),
    [("full", 160, 0), ("full and window", 160, 32), ("full and state", 160, 88)],
)
def test_a_backend_knows_the_largest_and_the_smallest_object(
    mix: str, largest: int, least: int
) -> None:
    """Of a model with full attention all are the same."""
    world = make_grouped_world(mix, storage={"share": uuid.uuid4().hex})
    context = attached(world).backend.context
    assert context.object_nbytes == HEADER_NBYTES + largest
    assert context.least_nbytes == (HEADER_NBYTES + least if least else 0)
    world.close()
