"""A replica of a real server, attached with ``read_only``: it serves, and is never written to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from hicache_redis import RedisBackend

from hicache_core.build.backends import bare_backend
from hicache_core.build.storage import composed
from hicache_core.errors import BackendDenied
from hicache_core.observe.stores import backend_statuses
from hicache_core.storage.base import Clearable, Listable, ReportsUsage
from hicache_core.storage.sealed import HEADER_NBYTES, seal
from hicache_core.testing.harness import required
from hicache_core.types import BackendContext
from plugins.redis.tests.pages import NAMESPACE, blank, filled, keys_of
from plugins.redis.tests.test_sentinel import until
from tests.servers.valkey import Valkey, running

Open = Callable[..., RedisBackend]
SHAPE = (HEADER_NBYTES, 4032)
KEYS = keys_of(8, "replica")


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Valkey, Valkey]]:
    """A primary and its replica, in step."""
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(running("--repl-diskless-sync-delay", "0"))
        replica = stack.enter_context(running("--replicaof", f"127.0.0.1 {primary.port}"))
        until(lambda: replica.client().info("replication")["master_link_status"] == "up")
        yield primary, replica


def test_a_replica_serves_and_takes_nothing(pair: tuple[Valkey, Valkey], opened: Open) -> None:
    primary, replica = pair
    writer = opened(url=primary.url)
    pages = [filled(key, SHAPE) for key in KEYS[:6]]
    for key, page in zip(KEYS, pages, strict=False):
        seal(key, page)
    assert writer.batch_set(KEYS[:6], pages) == 6
    until(lambda: replica.client().dbsize() == 6)
    settings = {"url": replica.url, "read_only": True}
    made = composed("redis", settings, BackendContext(NAMESPACE), time.monotonic)
    with contextlib.closing(made.backend) as backend:
        backend.open()
        read = [blank(SHAPE) for _ in KEYS]
        assert backend.batch_get(KEYS, read) == 6
        assert [b"".join(page) for page in read[:6]] == [b"".join(page) for page in pages]
        for _ in range(10):
            assert backend.batch_set(KEYS, [filled(key, SHAPE) for key in KEYS]) == 0
        assert len(list(required(backend, Listable).list_keys(f"{NAMESPACE}/"))) == 6
        assert required(backend, ReportsUsage).usage() == {NAMESPACE: 6 * sum(SHAPE)}
        assert backend.capability(Clearable) is None
        (status,) = backend_statuses(made.guards)
        assert (status.breaker, status.read_only, status.last_error) == ("closed", True, "")
    assert replica.client().info("errorstats").get("errorstat_READONLY") is None, "never asked"


def test_without_it_the_replica_is_refused_at_open(pair: tuple[Valkey, Valkey]) -> None:
    backend = bare_backend("redis", {"url": pair[1].url}, BackendContext(NAMESPACE))
    with pytest.raises(BackendDenied, match="read_only"):
        backend.open()
