"""Pins and usage on real servers: what an eviction policy makes of them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from hicache_redis import RedisBackend
from hicache_redis import backend as backend_module
from hicache_redis.pins import PinRefresher

from hicache_core.errors import BackendDenied, BackendUnavailable, UseAfterClose
from hicache_core.storage import base
from plugins.redis.tests.pages import NAMESPACE, filled, keys_of
from tests.scrubbing import check_scrub
from tests.servers.valkey import REDIS, Cluster, Valkey, running

Open = Callable[..., RedisBackend]
SHAPE = (64, 65_472)
OTHER = NAMESPACE[::-1]


@pytest.fixture
def pins() -> Iterator[Callable[..., PinRefresher]]:
    """Makes pins with a fast thread and closes them after the test."""
    made: list[PinRefresher] = []

    def new(touch: Callable[[Sequence[bytes]], object], **options: object) -> PinRefresher:
        made.append(PinRefresher(touch, **{"interval_s": 0.005, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield new
    for one in made:
        one.close()


@pytest.fixture
def fast_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned keys are touched every 50 ms."""
    monkeypatch.setattr(
        backend_module, "PinRefresher", lambda touch: PinRefresher(touch, interval_s=0.05)
    )


def put(backend: RedisBackend, keys: list[str]) -> None:
    for start in range(0, len(keys), 50):
        part = keys[start : start + 50]
        assert backend.batch_set(part, [filled(key, SHAPE) for key in part]) == len(part)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.005)


def test_the_backend_has_both_capabilities(server: Valkey, opened: Open) -> None:
    backend = opened(url=server.url)
    assert isinstance(backend, base.Pins)
    assert isinstance(backend, base.ReportsUsage)


def test_pinned_keys_are_touched_until_their_time_is_over(
    pins: Callable[..., PinRefresher],
) -> None:
    now, touched = [0.0], threading.Semaphore(0)
    seen: list[list[bytes]] = []

    def touch(keys: Sequence[bytes]) -> None:
        seen.append(list(keys))
        touched.release()

    pinned = pins(touch, clock=lambda: now[0])
    pinned.pin([b"a", b"b"], 10)
    pinned.pin([b"c"], 20)
    pinned.pin([b"b"], 0)
    assert touched.acquire(timeout=5)
    assert touched.acquire(timeout=5)
    assert seen[-1] == [b"a", b"c"]
    assert len(pinned) == 2
    now[0] = 10.0
    wait_until(lambda: len(pinned) == 1)
    wait_until(lambda: seen[-1] == [b"c"])
    pinned.pin([b"c"], 30)  # renewed
    now[0] = 39.0
    assert len(pinned) == 1
    now[0] = 40.0
    assert len(pinned) == 0


def test_a_server_that_is_away_ends_no_pin(pins: Callable[..., PinRefresher]) -> None:
    n_calls = threading.Semaphore(0)

    def touch(_: Sequence[bytes]) -> None:
        n_calls.release()
        raise BackendUnavailable("gone for a moment")

    pinned = pins(touch)
    pinned.pin([b"a"], 60)
    assert all(n_calls.acquire(timeout=5) for _ in range(3))
    assert len(pinned) == 1


def test_closing_ends_the_thread_and_pinning_is_an_error_then(server: Valkey, opened: Open) -> None:
    backend = opened(url=server.url)
    keys = keys_of(2, "closing")
    put(backend, keys)
    backend.pin(keys, 60)
    assert backend.stats()["pinned_objects"] == 2
    backend.close()
    assert "hicache-redis-pins" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(UseAfterClose):
        backend.pin(keys, 60)


@pytest.mark.usefixtures("fast_touches")
def test_pinned_keys_outlive_others_of_their_age_under_every_policy(opened: Open) -> None:
    """A server's clock of use has a resolution of a second, so all policies wait for it at once.

    A server takes the best of a few samples, by default 5; with 64 it keeps close to its policy.
    """
    pinned, old = keys_of(10, "pinned"), keys_of(150, "old")
    with contextlib.ExitStack() as servers:
        backends = {}
        for policy in ("allkeys-lru", "allkeys-lfu", "volatile-lru"):
            limits = ("--maxmemory", "24mb", "--maxmemory-policy", policy)
            server = servers.enter_context(running(*limits, "--maxmemory-samples", "64"))
            backends[policy] = opened(url=server.url, ttl_s=600)
            put(backends[policy], [*pinned, *old])
            assert backends[policy].pin([*pinned, "absent"], 600) == len(pinned)
        time.sleep(2.5)
        for policy, backend in backends.items():
            put(backend, keys_of(300, "new"))
            assert backend.batch_exists(pinned) == len(pinned), policy
            n_old = sum(map(backend.exists, old))
            assert n_old < len(old) * 0.8, f"{policy}: {n_old} of {len(old)} not pinned stay"


def test_a_pin_does_not_lengthen_the_life_of_an_object(server: Valkey, opened: Open) -> None:
    backend = opened(url=server.url, ttl_s=0.2)
    keys = keys_of(3, "short life")
    put(backend, keys)
    backend.pin(keys, 60)
    wait_until(lambda: not any(map(backend.exists, keys)))
    assert backend.pin(keys, 60) == 0


def test_usage_is_exact_by_namespace_and_knows_its_prefix(own_server: Valkey, opened: Open) -> None:
    backend, foreign = opened(url=own_server.url), opened(url=own_server.url, key_prefix="other:")
    keys = keys_of(2500, "usage")  # more than one answer of SCAN
    assert backend.batch_set(keys, [filled(key, (0, 3)) for key in keys]) == len(keys)
    backend.set(f"{OTHER}/page", b"12345")
    foreign.set(f"{OTHER}/page", b"1234567")
    own_server.call("RPUSH", f"hicache:{OTHER}/list", "no", "object")
    assert dict(backend.usage()) == {NAMESPACE: 7500, OTHER: 5}
    assert dict(foreign.usage()) == {OTHER: 7}


def test_usage_in_a_cluster_adds_up_all_shards(cluster: Cluster, opened: Open) -> None:
    backend = opened(url=cluster.url, cluster=True, key_prefix="usage:")
    keys = keys_of(60, "usage")
    assert backend.batch_set(keys, [filled(key, (64, 100)) for key in keys]) == len(keys)
    assert dict(backend.usage()) == {NAMESPACE: 60 * 164}
    assert backend.pin(keys, 60) == 60
    backend.clear("")


def test_usage_leaves_the_order_of_use_as_it_is(own_server: Valkey, opened: Open) -> None:
    """Otherwise the first look at it would make the whole cache equally fresh."""
    backend = opened(url=own_server.url, max_connections=1)
    backend.set("ns/key", b"x")

    def idle_s() -> int:
        return int(str(own_server.call("OBJECT", "IDLETIME", "hicache:ns/key")))

    wait_until(lambda: idle_s() >= 1)
    assert dict(backend.usage()) == {"ns": 1}
    assert idle_s() >= 1
    assert backend.get("ns/key") == b"x"
    assert idle_s() == 0, "the connection touches again"


@pytest.mark.skipif(REDIS is None, reason="needs a redis-server in PATH")
def test_a_server_before_7_2_is_asked_what_it_takes_and_keeps_its_order(opened: Open) -> None:
    assert REDIS is not None
    with running(binary=REDIS) as server:
        version = str(server.client().info("server")["redis_version"])
        if tuple(map(int, version.split(".")[:2])) >= (7, 2):
            pytest.skip("this redis-server knows CLIENT NO-TOUCH")
        backend = opened(url=server.url)
        backend.set("ns/key", bytes(1000))

        def idle_s() -> int:
            return int(str(server.call("OBJECT", "IDLETIME", "hicache:ns/key")))

        wait_until(lambda: idle_s() >= 1)
        (totals,) = backend.namespace_totals().values()
        assert totals.objects == 1
        assert 1000 <= totals.nbytes <= 1500
        assert idle_s() >= 1


def test_missing_rights_are_an_error_not_a_wrong_figure(own_server: Valkey, opened: Open) -> None:
    own_server.call("ACL", "SETUSER", "few", "on", ">pass", "~*", "+@all", "-strlen")
    rights = ["+@all", "-client|no-touch", "-touch"]
    own_server.call("ACL", "SETUSER", "fewer", "on", ">pass", "~*", *rights)
    opened(url=own_server.url).set("ns/key", b"x")
    for user in ("few", "fewer"):
        backend = opened(url=own_server.url, username=user, password="pass")
        with pytest.raises(BackendDenied, match="NOPERM"):
            backend.usage()
    with pytest.raises(BackendDenied, match="NOPERM"):
        backend.pin(["ns/key"], 60)


def test_scrubbing_removes_corrupt_and_foreign_pages(own_server: Valkey, opened: Open) -> None:
    check_scrub(opened(url=own_server.url), *keys_of(3, "scrub"))
