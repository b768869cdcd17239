"""Servers for the tests; each is started once for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hicache_redis import RedisBackend, RedisConfig

from hicache_core.types import BackendContext
from tests.servers.valkey import Cluster, Valkey, running

NAMESPACE = "0123456789abcdef"


@pytest.fixture(scope="session")
def server() -> Iterator[Valkey]:
    """A Valkey server as it should be for a cache, shared by many tests."""
    with running("--maxmemory", "512mb", "--maxmemory-policy", "allkeys-lru") as server:
        yield server


@pytest.fixture
def own_server() -> Iterator[Valkey]:
    """A server of the test alone, which it may break."""
    with running() as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of three shards; a test that breaks it mends it."""
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., RedisBackend]]:
    """Opens backends with the given settings and closes them after the test."""
    backends: list[RedisBackend] = []

    def open_backend(**settings: object) -> RedisBackend:
        backend = RedisBackend(RedisConfig.model_validate(settings), BackendContext(NAMESPACE))
        backend.open()
        backends.append(backend)
        return backend

    yield open_backend
    for backend in backends:
        backend.close()
