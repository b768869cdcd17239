"""Servers that refuse, vanish, freeze or answer nonsense: the right error, in bounded time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hicache_redis import RedisBackend

from hicache_core.errors import (
    BackendCorrupt,
    BackendDenied,
    BackendError,
    BackendTimeout,
    BackendUnavailable,
)
from hicache_core.types import Page
from plugins.redis.tests.emulation import emulated
from plugins.redis.tests.pages import blank, filled, holds, keys_of
from tests.servers.process import free_port
from tests.servers.valkey import Cluster, Valkey, running

Open = Callable[..., RedisBackend]
SHAPE = (64, 1 << 20)
PATTERN = b"\x5a" * (1 << 20)
BOUND_S = 5.0  # far above every limit set here; what hangs takes longer


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 6 * BOUND_S


class Tripwire(tuple[memoryview, ...]):
    """A page that calls ``spring`` when its segments are wanted for the transfer."""

    spring: Callable[[], object]
    n_looks = 0

    def __iter__(self) -> Iterator[memoryview]:
        self.n_looks += 1
        if self.n_looks == 2:  # the first look takes the page's length
            self.spring()
        return super().__iter__()


def trap(pages: list[Page], at: int, spring: Callable[[], object]) -> None:
    """Puts a tripwire in place of ``pages[at]``."""
    page = Tripwire(pages[at])
    page.spring = spring
    pages[at] = page


def test_a_port_where_nothing_listens_is_refused_at_once(opened: Open) -> None:
    start = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1:\d+ could not connect.*check url"):
        opened(url=f"redis://127.0.0.1:{free_port()}")
    with pytest.raises(BackendUnavailable):
        opened(url="unix:///nowhere/redis.sock")
    assert time.monotonic() - start < 1


def test_a_host_that_does_not_answer_is_a_timeout(opened: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(BackendTimeout):
            opened(url=f"redis://127.0.0.1:{port}", socket_timeout_s=0.2)


@pytest.mark.parametrize(
    "call",
    [
        "get",
        "set",
        "batch_get",
        "batch_set",
        "batch_exists",
        "get_each",
        "set_each",
        "exists_each",
        "delete",
    ],
)
def test_a_frozen_server_costs_each_call_its_timeout_and_then_works_again(
    own_server: Valkey, opened: Open, call: str
) -> None:
    backend = opened(url=own_server.url, socket_timeout_s=0.2)
    keys = keys_of(16, "frozen")
    pages = [filled(key, SHAPE) for key in keys]
    assert backend.batch_set(keys, pages) == 16
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: backend.get(keys[0]),
        "set": lambda: backend.set(keys[0], pages[0][1]),
        "batch_get": lambda: backend.batch_get(keys, [blank(SHAPE) for _ in keys]),
        "batch_set": lambda: backend.batch_set(keys, pages),
        "batch_exists": lambda: backend.batch_exists(keys),
        "get_each": lambda: backend.get_each(keys, [blank(SHAPE) for _ in keys]),
        "set_each": lambda: backend.set_each(keys, pages),
        "exists_each": lambda: backend.exists_each(keys),
        "delete": lambda: backend.delete(keys),
    }
    own_server.freeze()
    try:
        start = time.monotonic()
        with pytest.raises(BackendTimeout, match=rf"{own_server.port} could not"):
            calls[call]()
        assert time.monotonic() - start < BOUND_S
    finally:
        own_server.thaw()
    assert backend.batch_set(keys, pages) == 16
    target = [blank(SHAPE) for _ in keys]
    assert backend.batch_get(keys, target) == 16
    assert all(holds(key, page) for key, page in zip(keys, target, strict=True))


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("call", ["batch_get", "get_each"])
def test_a_read_that_froze_half_way_ends_and_touches_no_page_afterwards(
    own_server: Valkey, opened: Open, call: str, retries: int
) -> None:
    """Both connections of the batch are in the middle of it; the rest of the bytes comes later."""
    settings = {"batch_connections": 2, "socket_timeout_s": 0.2, "retries": retries}
    backend = opened(url=own_server.url, **settings)
    assert backend.bounds_calls()
    keys = keys_of(64, "half way")
    assert backend.batch_set(keys, [filled(key, SHAPE) for key in keys]) == 64
    target = [blank(SHAPE) for _ in keys]
    pages = list(target)
    trap(pages, 5, own_server.freeze)
    try:
        start = time.monotonic()
        with pytest.raises(BackendTimeout):
            getattr(backend, call)(keys, pages)
        assert time.monotonic() - start < BOUND_S
        for page in target:
            page[1][:] = PATTERN
    finally:
        own_server.thaw()
    assert backend.batch_get(keys, [blank(SHAPE) for _ in keys]) == 64
    assert all(page[1] == PATTERN for page in target)


@pytest.mark.parametrize("call", ["batch_set", "set_each"])
def test_a_write_that_froze_half_way_ends_and_reads_no_page_afterwards(
    own_server: Valkey, opened: Open, call: str
) -> None:
    """What the server gets after it is thawed is what was sent before; it stores no mixture."""
    backend = opened(url=own_server.url, batch_connections=2, socket_timeout_s=0.2)
    keys = keys_of(64, "half written")
    target = [filled(key, SHAPE) for key in keys]
    pages = list(target)
    trap(pages, 5, own_server.freeze)
    try:
        start = time.monotonic()
        with pytest.raises(BackendTimeout):
            getattr(backend, call)(keys, pages)
        assert time.monotonic() - start < BOUND_S
        for page in target:
            page[1][:] = PATTERN
    finally:
        own_server.thaw()
    got = [blank(SHAPE) for _ in keys]
    stored = backend.get_each(keys, got)
    assert all(
        holds(key, page)
        for key, page, is_stored in zip(keys, got, stored, strict=True)
        if is_stored
    )


def test_the_answer_that_a_timeout_gave_up_on_is_not_the_next_ones(
    own_server: Valkey, opened: Open
) -> None:
    """The server is still frozen when the second question is asked, so nothing is late yet."""
    backend = opened(url=own_server.url, socket_timeout_s=1.0, max_connections=1)
    backend.set("first", b"1")
    backend.set("second", b"2")
    own_server.freeze()
    try:
        with pytest.raises(BackendTimeout):
            backend.get("first")
        with ThreadPoolExecutor(1) as threads:
            second = threads.submit(backend.get, "second")
            time.sleep(0.1)
            own_server.thaw()
            assert second.result() == b"2"
    finally:
        own_server.thaw()


@pytest.mark.parametrize("n_connections", [1, 2])
def test_a_server_killed_in_mid_read_is_lost_and_its_successor_is_found(
    own_server: Valkey, opened: Open, n_connections: int
) -> None:
    backend = opened(url=own_server.url, batch_connections=n_connections)
    keys = keys_of(64, "killed")
    pages = [filled(key, SHAPE) for key in keys]
    assert backend.batch_set(keys, pages) == 64
    target = [blank(SHAPE) for _ in keys]
    trap(target, 5, own_server.kill)
    with pytest.raises(BackendUnavailable):
        backend.batch_get(keys, target)
    with pytest.raises(BackendUnavailable):
        backend.batch_exists(keys)
    own_server.restart()
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set(keys[:3], pages[:3]) == 3
    fresh = [blank(SHAPE) for _ in keys]
    assert backend.batch_get(keys, fresh) == 3
    assert all(holds(key, page) for key, page in zip(keys[:3], fresh, strict=False))


def test_a_server_killed_in_mid_write_is_lost_and_its_successor_is_found(
    own_server: Valkey, opened: Open
) -> None:
    backend = opened(url=own_server.url)
    keys = keys_of(64, "killed")
    pages = [filled(key, SHAPE) for key in keys]
    trap(pages, 9, own_server.kill)
    with pytest.raises(BackendUnavailable):
        backend.batch_set(keys, pages)
    own_server.restart()
    assert backend.batch_set(keys, pages) == 64


def test_a_restart_between_two_calls_is_not_noticed(own_server: Valkey, opened: Open) -> None:
    """The idle connections of the pool are dead then; none of them may fail a call."""
    backend = opened(url=own_server.url, max_connections=4)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(backend.exists, keys_of(64, "restart")))
    own_server.kill()
    own_server.restart()
    for key in keys_of(8, "restart"):
        backend.set(key, b"x")
        assert backend.get(key) == b"x"


def test_one_of_two_connections_lost_is_an_error_not_a_short_count(
    own_server: Valkey, opened: Open
) -> None:
    backend = opened(url=own_server.url, batch_connections=2)
    keys = keys_of(16, "half")
    assert backend.batch_set(keys, [filled(key, SHAPE) for key in keys]) == 16
    target = [blank(SHAPE) for _ in keys]
    first_half_done = threading.Event()

    def lose_the_second_half() -> None:
        assert first_half_done.wait(BOUND_S)
        time.sleep(0.2)
        own_server.call("CLIENT", "KILL", "TYPE", "normal")

    trap(target, 7, first_half_done.set)
    trap(target, 12, lose_the_second_half)
    with pytest.raises(BackendUnavailable):
        backend.batch_get(keys, target)
    assert backend.batch_exists(keys) == 16


def test_a_lost_connection_is_tried_again_only_if_asked(own_server: Valkey, opened: Open) -> None:
    def strike(retries: int) -> tuple[RedisBackend, int]:
        backend = opened(url=own_server.url, retries=retries, batch_connections=1)
        keys = keys_of(16, "retries")
        assert backend.batch_set(keys, [filled(key, SHAPE) for key in keys]) == 16
        target = [blank(SHAPE) for _ in keys]
        trap(target, 3, lambda: own_server.call("CLIENT", "KILL", "TYPE", "normal"))
        return backend, backend.batch_get(keys, target)

    with pytest.raises(BackendUnavailable):
        strike(0)
    backend, n_filled = strike(1)
    assert n_filled == 16
    assert backend.stats()["retries"] == 1


def test_calls_wait_for_a_free_connection_but_not_for_ever(
    own_server: Valkey, opened: Open
) -> None:
    backend = opened(url=own_server.url, max_connections=1, socket_timeout_s=0.3)
    held = threading.Event()
    release = threading.Event()

    def hold() -> None:
        held.set()
        assert release.wait(BOUND_S)

    (key,) = keys_of(1, "busy")
    page = [filled(key, SHAPE)]
    assert backend.batch_set([key], page) == 1
    target = [blank(SHAPE)]
    trap(target, 0, hold)
    with ThreadPoolExecutor(2) as threads:
        reader = threads.submit(backend.batch_get, [key], target)
        assert held.wait(BOUND_S)
        with pytest.raises(BackendTimeout, match="raise max_connections"):
            backend.exists(key)
        waiter = threads.submit(backend.exists, key)
        release.set()
        assert reader.result() == 1
        assert waiter.result()
    assert backend.stats()["connections"] == 1


def test_a_replica_refuses_at_open_and_says_what_to_do(own_server: Valkey, opened: Open) -> None:
    with (
        running("--replicaof", f"127.0.0.1 {own_server.port}") as replica,
        pytest.raises(BackendDenied, match="primary"),
    ):
        opened(url=replica.url)


def test_a_primary_that_becomes_a_replica_refuses_writes_but_answers_reads(
    own_server: Valkey, opened: Open
) -> None:
    backend = opened(url=own_server.url)
    backend.set("k", b"x")
    own_server.call("REPLICAOF", "127.0.0.1", free_port())
    own_server.call("CONFIG", "SET", "replica-serve-stale-data", "yes")
    with pytest.raises(BackendDenied, match=r"READONLY.*primary"):
        backend.set("k", b"x")
    assert backend.get("k") == b"x"
    own_server.call("REPLICAOF", "NO", "ONE")
    backend.set("k", b"x")


def test_a_cluster_node_asked_as_a_single_server_says_how_to_configure_it(
    cluster: Cluster, opened: Open
) -> None:
    def look_up() -> None:
        backend = opened(url=cluster.url)
        for key in keys_of(64, "moved"):
            backend.exists(key)

    with pytest.raises(BackendUnavailable, match="set cluster to true"):
        look_up()


def test_too_many_clients_is_an_outage_with_advice(own_server: Valkey, opened: Open) -> None:
    own_server.call("CONFIG", "SET", "maxclients", "2")
    with own_server.client() as one, own_server.client() as two:
        one.ping()
        two.ping()
        with pytest.raises(BackendUnavailable, match="maxclients"):
            opened(url=own_server.url)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b":17\r\n", BackendCorrupt),
        (b"HTTP/1.1 200 OK\r\n\r\n", BackendCorrupt),
        (b"$4\r\nabcdefgh\r\n", BackendCorrupt),
        (b"$4\r\nab", BackendUnavailable),
        (b"-BUSY a script\r\n", BackendUnavailable),
        (b"-LOADING data\r\n", BackendUnavailable),
        (b"-ERR something new\r\n", BackendError),
    ],
)
def test_an_answer_that_cannot_be_right_ends_the_connection(
    opened: Open, answer: bytes, error: type[BackendError]
) -> None:
    listener, thread = emulated([b":0\r\n", b"$-1\r\n", answer])
    with listener:
        backend = opened(url=f"redis://127.0.0.1:{listener.getsockname()[1]}", retries=0)
        with pytest.raises(error) as caught:
            backend.batch_get(["k"], [blank((4,))])
        assert type(caught.value) is error
        assert backend.stats()["connections"] == 0
        thread.join()


def test_a_late_reply_on_an_idle_connection_is_never_taken_for_an_answer(opened: Open) -> None:
    listener, thread = emulated([b":0\r\n", b"$-1\r\n", b":1\r\n:1\r\n"])
    with listener:
        backend = opened(url=f"redis://127.0.0.1:{listener.getsockname()[1]}", socket_timeout_s=0.2)
        assert backend.exists("k")
        thread.join()
        with pytest.raises(BackendTimeout):  # a new connection, which nobody serves
            backend.exists("absent")
