"""The conformance kit on real servers: over TCP, a unix socket and in a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import pytest

from hicache_core.testing.control import StoreControl
from hicache_core.testing.features import Feature
from hicache_core.testing.kit_settings import QUICK, KitSettings
from hicache_core.testing.recipe import Recipe
from hicache_core.testing.suite import StorageBackendTests
from tests.servers.valkey import Cluster, Valkey, running

PASSWORD = "a-secret-of-the-kit"
FEATURES = frozenset(Feature) - {
    Feature.QUOTA,
    Feature.REGISTER_MEMORY,
    Feature.SECRETS,
    Feature.SMALL_STORE,
    Feature.TTL,
}
LIMITS = ("--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru")


@pytest.fixture(scope="module")
def kit_server() -> Iterator[Valkey]:
    """A server with a password, which the kit kills, freezes and restarts."""
    with running(*LIMITS, "--requirepass", PASSWORD, password=PASSWORD) as server:
        yield server


@pytest.fixture(scope="module")
def full_server() -> Iterator[Valkey]:
    """A server that refuses writes when it is full, sooner than the kit gives up."""
    with running("--maxmemory", "24mb", "--maxmemory-policy", "noeviction") as server:
        yield server


class TestStandalone(StorageBackendTests):
    """Over TCP, with a password."""

    features: ClassVar[frozenset[Feature]] = FEATURES | {
        Feature.SECRETS,
        Feature.SMALL_STORE,
        Feature.TTL,
    }
    kit: ClassVar[KitSettings] = replace(QUICK, ttl_s=0.3)  # ages are known to the millisecond

    @pytest.fixture
    def recipe(self, kit_server: Valkey) -> Recipe:
        settings = {"url": kit_server.url, "password": PASSWORD, "socket_timeout_s": 0.5}
        return Recipe.named("redis", settings)

    @pytest.fixture
    def store_control(self, kit_server: Valkey) -> StoreControl:
        return kit_server

    @pytest.fixture
    def small_store(self, full_server: Valkey) -> Recipe:
        return Recipe.named("redis", {"url": full_server.url})

    @pytest.fixture
    def expiring_store(self, recipe: Recipe) -> Recipe:
        return Recipe.named("redis", {**recipe.settings, "ttl_s": self.kit.ttl_s})


class TestUnixSocket(StorageBackendTests):
    """Over a unix socket, with RESP3 and the password in the URL.

    What the kit does to the server is done to it over TCP.
    """

    features: ClassVar[frozenset[Feature]] = (FEATURES | {Feature.SECRETS}) - {Feature.CONTROL}

    @pytest.fixture
    def recipe(self, kit_server: Valkey) -> Recipe:
        url = f"unix://:{PASSWORD}@{kit_server.socket_path}"
        return Recipe.named("redis", {"url": url, "protocol": 3})


class TestCluster(StorageBackendTests):
    """Three shards; the kit kills and freezes all of them."""

    features: ClassVar[frozenset[Feature]] = FEATURES

    @pytest.fixture
    def recipe(self, cluster: Cluster, request: pytest.FixtureRequest) -> Recipe:
        # A frozen cluster costs each call the time-out of every shard. Elsewhere it must be longer
        # than a busy machine keeps a shard waiting, whose keys are misses then.
        is_silent = "test_rule[frozen_server]" in request.node.name
        settings = {
            "url": cluster.url,
            "cluster": True,
            "socket_timeout_s": 0.15 if is_silent else 0.5,
            "node_retry_interval_s": 1e-6,  # the kit wants a thawed server back at once
        }
        return Recipe.named("redis", settings)

    @pytest.fixture
    def store_control(self, cluster: Cluster) -> StoreControl:
        return cluster
