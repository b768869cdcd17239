"""A primary that real Sentinels name, and a fail-over to its replica."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from hicache_core.errors import BackendError, BackendUnavailable
from hicache_redis import RedisBackend
from plugins.redis.tests.servers import Server, free_port, running

Open = Callable[..., RedisBackend]


@pytest.fixture
def pair() -> Iterator[tuple[Server, Server]]:
    """A primary and its replica, in step."""
    with running() as primary, running("--replicaof", f"127.0.0.1 {primary.port}") as replica:
        while b"master_link_status:up" not in bytes(str(replica.call("INFO")), "utf-8").replace(
            b"'master_link_status': 'up'", b"master_link_status:up"
        ):
            time.sleep(0.05)
        yield primary, replica


@pytest.fixture
def sentinel(pair: tuple[Server, Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Sentinel that watches the pair and decides alone."""
    primary, _ = pair
    config = tmp_path_factory.mktemp("sentinel") / "sentinel.conf"
    config.write_text(
        f"sentinel monitor pages 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds pages 500\n"
        "sentinel failover-timeout pages 5000\n"
    )
    with running(config=config) as sentinel:
        while f"'num-slaves': 1" not in str(sentinel.call("SENTINEL", "MASTERS")):
            time.sleep(0.1)
        yield sentinel
