"""A real cluster of three shards: routing, redirections, lost shards."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hicache_redis import RedisBackend
from redis.crc import key_slot

from hicache_core.errors import BackendTimeout, BackendUnavailable
from plugins.redis.tests.pages import blank, filled, holds, keys_of
from tests.servers.process import free_port
from tests.servers.valkey import Cluster, Valkey

Open = Callable[..., RedisBackend]
SHAPE = (64, 100_000)


@pytest.fixture(autouse=True)
def _emptied(cluster: Cluster) -> None:
    for node in cluster.nodes:
        node.call("FLUSHALL")


def put(backend: RedisBackend, keys: list[str]) -> int:
    return backend.batch_set(keys, [filled(key, SHAPE) for key in keys])


def leading(backend: RedisBackend, keys: list[str]) -> int:
    """What ``batch_get`` counts; every counted page holds its object."""
    pages = [blank(SHAPE) for _ in keys]
    n_filled = backend.batch_get(keys, pages)
    assert all(holds(key, page) for key, page in zip(keys[:n_filled], pages, strict=False))
    return n_filled


def slot_of(key: str) -> int:
    return key_slot(f"hicache:{key}".encode())


def owner_of(cluster: Cluster, key: str) -> Valkey:
    return cluster.owner(slot_of(key))


def test_pages_spread_over_all_shards_and_come_back(cluster: Cluster, opened: Open) -> None:
    backend = opened(url=cluster.url, cluster=True)
    keys = keys_of(90, "spread")
    assert put(backend, keys) == 90
    sizes = [node.client().dbsize() for node in cluster.nodes]
    assert sum(sizes) == 90
    assert min(sizes) > 10
    assert leading(backend, keys) == backend.batch_exists(keys) == 90
    for hole in (0, 1, 2, 40, 89):
        backend.delete([keys[hole]])
        assert leading(backend, keys) == backend.batch_exists(keys) == hole
        assert put(backend, [keys[hole]]) == 1
    assert sorted(backend.list_keys("")) == sorted(keys)
    assert {finding.level for finding in backend.diagnose()} <= {"ok", "warning"}
    assert backend.clear("") == 90
    assert backend.stats()["redirects"] == 0


def migrate(cluster: Cluster, slot: int, target: Valkey) -> Callable[[], None]:
    """Begins to move a slot to ``target``; what comes back ends it."""
    source = cluster.owner(slot)
    ids = {node.port: bytes_of(node.call("CLUSTER", "MYID")) for node in (source, target)}
    target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
    source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])

    def finish() -> None:
        for node in (target, source):
            node.call("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])

    return finish


def bytes_of(reply: object) -> str:
    return reply.decode() if isinstance(reply, bytes) else str(reply)


def test_a_slot_that_moves_is_followed_while_it_does_and_after(opened: Open) -> None:
    """ASK while the slot is on its way, MOVED when it has gone; then the map is read again."""
    cluster = Cluster()
    try:
        backend = opened(url=cluster.url, cluster=True)
        keys = keys_of(30, "moving")
        assert put(backend, keys) == 30
        moving = keys[4]
        source = owner_of(cluster, moving)
        target = next(node for node in cluster.nodes if node is not source)
        finish = migrate(cluster, slot_of(moving), target)

        assert leading(backend, keys) == 30  # still at the source
        source.call("MIGRATE", "127.0.0.1", target.port, f"hicache:{moving}", 0, 2000)
        assert leading(backend, keys) == backend.batch_exists(keys) == 30
        assert backend.exists_each(keys) == [True] * 30
        assert backend.get_each(keys, [blank(SHAPE) for _ in keys]) == [True] * 30
        backend.delete([moving])
        assert leading(backend, keys) == 4
        assert backend.exists_each(keys) == [key != moving for key in keys]
        assert put(backend, keys) == 30
        n_redirects = backend.stats()["redirects"]
        assert n_redirects >= 4

        finish()
        assert leading(backend, keys) == backend.batch_exists(keys) == 30
        time.sleep(0.6)  # the map is read at most twice a second
        assert leading(backend, keys) == 30
        settled = backend.stats()["redirects"]
        assert leading(backend, keys) == put(backend, keys) == 30
        assert backend.stats()["redirects"] == settled > n_redirects
    finally:
        cluster.close()


def test_a_dead_shard_makes_its_keys_misses_and_the_others_go_on(
    cluster: Cluster, opened: Open
) -> None:
    backend = opened(url=cluster.url, cluster=True)
    keys = keys_of(30, "dead shard")
    assert put(backend, keys) == 30
    dead = owner_of(cluster, keys[7])
    first = next(n for n, key in enumerate(keys) if owner_of(cluster, key) is dead)
    alive = [key for key in keys if owner_of(cluster, key) is not dead]
    dead.kill()
    try:
        assert leading(backend, keys) == first
        assert backend.batch_exists(keys) == first
        assert put(backend, keys) == first
        assert leading(backend, alive) == put(backend, alive) == len(alive)
        assert backend.get(keys[first]) is None
        with pytest.raises(BackendUnavailable, match="the others go on"):
            backend.set(keys[first], b"x")
        backend.delete(keys)
        assert backend.batch_exists(alive) == 0
        assert backend.stats()["shard_failures"] >= 5
        assert opened(url=cluster.url.replace(str(cluster.nodes[0].port), str(dead.port)),
                      nodes=[f"127.0.0.1:{node.port}" for node in cluster.nodes],
                      cluster=True).batch_exists(alive) == 0  # fmt: skip
    finally:
        dead.restart()
        cluster.wait()
    assert put(backend, keys) == leading(backend, keys) == 30


def test_pages_behind_those_of_a_dead_shard_are_found_read_and_stored(
    cluster: Cluster, opened: Open
) -> None:
    backend = opened(url=cluster.url, cluster=True)
    keys = keys_of(30, "behind a dead shard")
    absent = {2, 17, 18}
    assert put(backend, keys) == 30
    backend.delete([keys[n] for n in absent])
    assert backend.exists_each(keys) == [n not in absent for n in range(30)]
    dead = owner_of(cluster, keys[7])
    served = [owner_of(cluster, key) is not dead for key in keys]
    there = [is_served and n not in absent for n, is_served in enumerate(served)]
    dead.kill()
    try:
        assert backend.exists_each(keys) == there
        pages = [blank(SHAPE) for _ in keys]
        assert backend.get_each(keys, pages) == there
        assert [holds(key, page) for key, page in zip(keys, pages, strict=True)] == there
        assert backend.set_each(keys, [filled(key, SHAPE) for key in keys]) == served
        assert backend.exists_each(keys) == served
    finally:
        dead.restart()
        cluster.wait()


def test_a_full_shard_takes_no_page_and_the_others_go_on(cluster: Cluster, opened: Open) -> None:
    backend = opened(url=cluster.url, cluster=True)
    keys = keys_of(30, "full shard")
    full = owner_of(cluster, keys[1])
    full.call("CONFIG", "SET", "maxmemory", "1mb")
    try:
        stored = backend.set_each(keys, [filled(key, SHAPE) for key in keys])
        assert stored == [owner_of(cluster, key) is not full for key in keys]
        assert backend.exists_each(keys) == stored
        assert backend.stats()["dropped_writes"] == stored.count(False)
    finally:
        full.call("CONFIG", "SET", "maxmemory", "0")


def test_a_frozen_shard_costs_its_timeout_once_and_is_then_left_alone(
    cluster: Cluster, opened: Open
) -> None:
    settings = {"socket_timeout_s": 0.3, "node_retry_interval_s": 1.2}
    backend = opened(url=cluster.url, cluster=True, **settings)
    keys = keys_of(30, "frozen shard")
    assert put(backend, keys) == 30
    frozen = owner_of(cluster, keys[3])
    first = next(n for n, key in enumerate(keys) if owner_of(cluster, key) is frozen)
    frozen.freeze()
    try:
        assert leading(backend, keys) == first
        start = time.monotonic()
        for _ in range(5):
            assert leading(backend, keys) == first
        assert time.monotonic() - start < 1.0
    finally:
        frozen.thaw()
        cluster.wait()
    time.sleep(1.2)
    assert leading(backend, keys) == 30


def test_a_cluster_of_which_nothing_answers_is_an_error(cluster: Cluster, opened: Open) -> None:
    backend = opened(url=cluster.url, cluster=True, socket_timeout_s=0.3)
    keys = keys_of(30, "all dead")
    assert put(backend, keys) == 30
    cluster.freeze()
    try:
        with pytest.raises(BackendTimeout):
            backend.batch_exists(keys)
    finally:
        cluster.thaw()
    cluster.kill()
    try:
        with pytest.raises(BackendUnavailable):  # one key says nothing of the other shards
            backend.get(keys[0])
        with pytest.raises(BackendUnavailable):
            backend.batch_exists(keys)
    finally:
        cluster.restart()
    time.sleep(1.0)
    assert put(backend, keys) == 30


def test_open_fails_where_no_node_is_and_where_no_cluster_is(server: Valkey, opened: Open) -> None:
    with pytest.raises(BackendUnavailable):
        opened(url=f"redis://127.0.0.1:{free_port()}", cluster=True)
    with pytest.raises(OSError, match="cluster support disabled"):
        opened(url=server.url, cluster=True)
