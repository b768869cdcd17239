"""What is particular to Redis about storing and reading pages, on a real server."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial

import pytest
from hicache_redis import RedisBackend
from hicache_redis.channel import PlainChannel
from hicache_redis.operations import CountEach, Fetch, run
from hicache_redis.resp import Wire

from hicache_core.errors import BackendFull, UseAfterClose
from hicache_core.storage.base import (
    Clearable,
    Diagnosable,
    HasStats,
    Listable,
    StorageBackend,
)
from plugins.redis.tests.pages import blank, content, filled, holds, keys_of
from tests.servers.valkey import Valkey, running

Open = Callable[..., RedisBackend]
SHAPE = (64, 4032)


def put(backend: RedisBackend, keys: list[str], shape: tuple[int, ...] = SHAPE) -> None:
    assert backend.batch_set(keys, [filled(key, shape) for key in keys]) == len(keys)


def leading(backend: RedisBackend, keys: list[str], shape: tuple[int, ...] = SHAPE) -> int:
    """What ``batch_get`` counts; every counted page holds its object."""
    pages = [blank(shape) for _ in keys]
    n_filled = backend.batch_get(keys, pages)
    assert all(holds(key, page) for key, page in zip(keys[:n_filled], pages, strict=False))
    return n_filled


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("shape", [(0,), (1,), SHAPE, (64, *[100] * 2000), (64, 3_000_000)])
def test_pages_come_back_over_tcp_and_unix_socket_in_both_protocols(
    server: Valkey, opened: Open, protocol: int, shape: tuple[int, ...]
) -> None:
    keys = keys_of(5, f"shapes {protocol} {len(shape)} {sum(shape)}")
    tcp = opened(url=server.url, protocol=protocol)
    unix = opened(url=f"unix://{server.socket_path}", protocol=protocol)
    put(tcp, keys, shape)
    assert leading(unix, keys, shape) == 5
    assert unix.batch_exists(keys) == 5
    assert tcp.get(keys[0]) == content(keys[0], sum(shape))


def test_what_is_stored_is_a_plain_string_under_the_prefixed_key(
    server: Valkey, opened: Open
) -> None:
    backend = opened(url=server.url, key_prefix="team-a:")
    (key,) = keys_of(1, "plain")
    put(backend, [key])
    assert server.client().get(f"team-a:{key}") == content(key, 4096)


@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4097, 700_000])
def test_an_object_of_another_length_ends_the_count_and_moves_no_other(
    server: Valkey, opened: Open, position: int, nbytes: int
) -> None:
    backend = opened(url=server.url, max_connections=1)
    keys = keys_of(6, "wrong size")
    put(backend, keys)
    backend.set(keys[position], b"x" * nbytes)
    assert leading(backend, keys) == position
    assert leading(backend, keys[position + 1 :]) == 5 - position
    assert backend.stats()["connections_opened"] == 1
    assert backend.stats()["wrong_size_objects"] == 1


def test_a_key_that_another_program_uses_for_something_else_is_a_miss(
    server: Valkey, opened: Open
) -> None:
    backend = opened(url=server.url, max_connections=1)
    keys = keys_of(3, "wrong type")
    put(backend, keys)
    with server.client() as client:
        client.delete(f"hicache:{keys[1]}")
        client.rpush(f"hicache:{keys[1]}", "a list")
    assert leading(backend, keys) == 1
    assert backend.get(keys[1]) is None
    put(backend, keys)
    assert leading(backend, keys) == 3


def test_a_large_batch_goes_over_several_connections(server: Valkey, opened: Open) -> None:
    backend = opened(url=server.url, batch_connections=3)
    keys, shape = keys_of(24, "parallel"), (64, 1 << 20)
    put(backend, keys, shape)
    assert leading(backend, keys, shape) == 24
    assert 1 < backend.stats()["connections_opened"] <= 3
    for hole in (0, 7, 13, 23):
        backend.delete([keys[hole]])
        assert leading(backend, keys, shape) == hole
        put(backend, [keys[hole]], shape)


@pytest.mark.parametrize("shape", [SHAPE, (64, 1 << 20)])
def test_pages_behind_gaps_are_found_and_read(
    server: Valkey, opened: Open, shape: tuple[int, ...]
) -> None:
    """A batch of 16 large pages is split over two connections; the gaps are in both parts."""
    backend = opened(url=server.url, batch_connections=2)
    keys = keys_of(16, f"gaps {sum(shape)}")
    gaps = {0, 3, 4, 9, 15}
    put(backend, [key for n, key in enumerate(keys) if n not in gaps], shape)
    backend.set(keys[7], b"of another length")
    backend.delete([keys[11]])
    with server.client() as client:
        client.rpush(f"hicache:{keys[11]}", "of another program")
    present = [n not in gaps for n in range(16)]
    readable = [n not in gaps | {7, 11} for n in range(16)]
    assert backend.exists_each(keys) == present == StorageBackend.exists_each(backend, keys)
    for get_each in (backend.get_each, partial(StorageBackend.get_each, backend)):
        pages = [blank(shape) for _ in keys]
        assert get_each(keys, pages) == readable
        assert [holds(key, page) for key, page in zip(keys, pages, strict=True)] == readable
    assert backend.set_each(keys, [filled(key, shape) for key in keys]) == [True] * 16
    assert leading(backend, keys, shape) == 16
    assert backend.exists_each([]) == backend.get_each([], []) == backend.set_each([], []) == []


def test_absent_keys_take_one_round_trip() -> None:
    """The requests of all keys are sent before the first answer has come."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire = Wire(PlainChannel(ours, timeout_s=0.2), ours.close)
        with pytest.raises(TimeoutError):  # nobody answers
            run(wire, "nobody", CountEach([b"key %d" % n for n in range(128)]), range(128))
        assert theirs.recv(1 << 16).count(b"EXISTS") == 128


def test_objects_are_gone_after_their_ttl(server: Valkey, opened: Open) -> None:
    backend = opened(url=server.url, ttl_s=30.5)
    page_key, single = keys_of(2, "ttl")
    put(backend, [page_key])
    backend.set(single, b"x")
    with server.client() as client:
        for key in (page_key, single):
            assert 29_000 < client.pttl(f"hicache:{key}") <= 30_500


def test_list_and_clear_take_their_prefix_literally(server: Valkey, opened: Open) -> None:
    backend = opened(url=server.url, key_prefix="glob*[a]?\\:")
    other = opened(url=server.url, key_prefix="globxa?\\:")
    keys = keys_of(1500, "list")
    put(backend, keys, (8,))
    put(other, keys[:3], (8,))
    namespace = keys[0].partition("/")[0]
    assert sorted(backend.list_keys(namespace)) == sorted(keys)
    assert list(backend.list_keys(keys[7])) == [keys[7]]
    assert backend.clear(keys[7]) == 1
    assert backend.clear("") == 1499
    assert sorted(other.list_keys("")) == sorted(keys[:3])
    assert other.clear("") == 3


def test_a_full_server_ends_the_count_and_is_counted(opened: Open) -> None:
    with running("--maxmemory", "12mb", "--maxmemory-policy", "noeviction") as server:
        backend = opened(url=server.url, batch_connections=1, window_nbytes="2MiB")
        keys, shape = keys_of(40, "full"), (64, 1 << 20)
        n_stored = backend.batch_set(keys, [filled(key, shape) for key in keys])
        assert 0 < n_stored < 20
        assert leading(backend, keys, shape) == n_stored
        assert backend.stats()["dropped_writes"] == 40 - n_stored
        with pytest.raises(BackendFull, match="allkeys-lru"):
            backend.set(keys[-1], bytes(1 << 20))
        backend.delete(keys[:3])
        stored = backend.set_each(keys, [filled(key, shape) for key in keys])
        assert stored[:2] == [True, True]
        assert not all(stored)
        assert backend.get_each(keys[:3], [blank(shape) for _ in keys[:3]]) == stored[:3]
        opened(url=server.url).close()  # a full server is no reason not to open
        backend.delete(keys[:n_stored])
        assert backend.batch_set(keys[:2], [filled(key, shape) for key in keys[:2]]) == 2


@pytest.mark.parametrize(("window_nbytes", "n_pages"), [(1 << 20, 2), (8 << 20, 8), (99 << 20, 48)])
def test_a_read_never_has_more_in_flight_than_its_window(window_nbytes: int, n_pages: int) -> None:
    """The server's reply buffers may count as used memory: a long batch must not fill them."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire = Wire(PlainChannel(ours, timeout_s=0.2), ours.close)
        keys = [b"key %d" % n for n in range(48)]
        fetch = Fetch(keys, [blank((1 << 20,)) for _ in keys], window_nbytes)
        with pytest.raises(TimeoutError):  # nobody answers
            run(wire, "nobody", fetch, range(48))
        assert theirs.recv(1 << 16).count(b"GET") == n_pages


def test_the_optional_capabilities_are_there(server: Valkey, opened: Open) -> None:
    backend = opened(url=server.url)
    for capability in (Listable, Clearable, HasStats, Diagnosable):
        assert isinstance(backend, capability)


def test_open_twice_is_once_and_after_close_nothing_works(server: Valkey, opened: Open) -> None:
    backend = opened(url=server.url)
    backend.open()
    assert backend.stats()["connections_opened"] == 1
    backend.close()
    backend.close()
    for call in (
        lambda: backend.get("k"),
        lambda: backend.batch_get([], []),
        backend.stats,
        lambda: list(backend.list_keys("")),
    ):
        with pytest.raises(UseAfterClose):
            call()


def test_diagnose_says_what_to_change(server: Valkey, opened: Open) -> None:
    good = {f.topic: f for f in opened(url=server.url).diagnose()}
    assert {f.level for f in good.values()} == {"ok"}
    assert f"{server.port}: valkey 9" in good["server"].message
    with running("--maxmemory", "64mb", "--appendonly", "yes") as careless:
        bad = {f.topic: f for f in opened(url=careless.url).diagnose()}
        assert bad["memory"].level == bad["persistence"].level == "warning"
        assert "allkeys-lru" in bad["memory"].message
        assert "appendonly no" in bad["persistence"].message
        assert bad["bandwidth"].level == "ok"
        assert careless.client().dbsize() == 0
        careless.call("CONFIG", "SET", "maxmemory", "0")
        unlimited = {f.topic: f for f in opened(url=careless.url).diagnose()}
        assert "has no maxmemory" in unlimited["memory"].message
        careless.call("CONFIG", "SET", "replica-read-only", "no")
        careless.call("REPLICAOF", "127.0.0.1", "1")
        findings = opened(url=careless.url).diagnose()
        assert [f.level for f in findings if f.topic == "server"] == ["error"]
