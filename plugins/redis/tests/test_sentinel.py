"""A primary that a real Sentinel names, and its fail-over to a replica."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from hicache_redis import RedisBackend

from hicache_core.errors import BackendError, BackendUnavailable
from plugins.redis.tests.pages import blank, filled, holds, keys_of
from tests.servers.process import free_port
from tests.servers.valkey import Sentinel, Valkey, running

Open = Callable[..., RedisBackend]
BOUND_S = 30.0


def until(condition: Callable[[], object]) -> None:
    """Waits until ``condition`` holds."""
    end = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[Valkey, Valkey, Sentinel]]:
    """A primary, its replica in step, and a Sentinel that knows both."""
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(running("--repl-diskless-sync-delay", "0"))
        replica = stack.enter_context(running("--replicaof", f"127.0.0.1 {primary.port}"))
        until(lambda: replica.client().info("replication")["master_link_status"] == "up")
        sentinel = Sentinel("pages", str(primary.port))
        stack.callback(sentinel.close)
        until(lambda: sentinel.client().info()["master0"]["slaves"] == 1)
        yield primary, replica, sentinel


def test_sentinels_that_are_not_there_or_do_not_know_the_name_are_an_outage(
    watched: tuple[Valkey, Valkey, Sentinel], opened: Open
) -> None:
    _, _, sentinel = watched
    address = f"127.0.0.1:{sentinel.port}"
    with pytest.raises(BackendUnavailable, match=f"{address} could not name the primary other"):
        opened(sentinels=[address], sentinel_master="other")
    with pytest.raises(BackendUnavailable):
        opened(sentinels=[f"127.0.0.1:{free_port()}"], sentinel_master="pages")


def test_after_a_fail_over_the_next_calls_go_to_the_new_primary(
    watched: tuple[Valkey, Valkey, Sentinel], opened: Open
) -> None:
    primary, replica, sentinel = watched
    nowhere = f"127.0.0.1:{free_port()}"
    backend = opened(sentinels=[nowhere, f"127.0.0.1:{sentinel.port}"], sentinel_master="pages")
    keys, shape = keys_of(8, "sentinel"), (64, 4032)
    assert backend.batch_set(keys, [filled(key, shape) for key in keys]) == 8
    primary.call("WAIT", 1, 2000)
    primary.kill()
    with pytest.raises(BackendError):
        backend.batch_exists(keys)

    def works() -> bool:
        with contextlib.suppress(BackendError):
            backend.set("k", b"x")
            return True
        return False

    until(works)
    assert replica.client().get("hicache:k") == b"x"
    pages = [blank(shape) for _ in keys]
    assert backend.batch_get(keys, pages) == 8
    assert all(holds(key, page) for key, page in zip(keys, pages, strict=True))
