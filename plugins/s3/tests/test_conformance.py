"""The whole contract, by the conformance kit, packed and not, on a server that it may kill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import pytest
from hicache_s3 import S3Backend

from hicache_core.testing.features import Feature
from hicache_core.testing.recipe import Recipe
from hicache_core.testing.settings import QUICK, KitSettings
from hicache_core.testing.suite import StorageBackendTests
from tests.servers.weed import Weed, settings


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """The server of all rules; each rule leaves it running and empty."""
    weed = Weed(tmp_path_factory.mktemp("conformance") / "weed")
    yield weed
    weed.close()


_CAN = [
    Feature.DELETE,
    Feature.LIST,
    Feature.CLEAR,
    Feature.STATS,
    Feature.DIAGNOSE,
    Feature.TTL,
    Feature.USAGE,
    Feature.SECOND_INSTANCE,
    Feature.SECOND_PROCESS,
    Feature.SECRETS,
    Feature.HYPOTHESIS,
]


class TestPacked(StorageBackendTests):
    features: ClassVar[frozenset[Feature]] = frozenset([*_CAN, Feature.CONTROL])

    @pytest.fixture
    def recipe(self, server: Weed) -> Recipe:
        """On the module's server."""
        return Recipe.of(S3Backend, settings(server.url, read_timeout_s=1.0, prefix="packed/"))

    @pytest.fixture
    def expiring_store(self, recipe: Recipe) -> Recipe:
        """The same bucket."""
        return Recipe.of(S3Backend, {**recipe.settings, "ttl_s": self.kit.ttl_s})

    @pytest.fixture
    def store_control(self, server: Weed) -> Weed:
        """The server itself."""
        return server


class TestAlone(StorageBackendTests):
    """One object a page; how servers end is the same either way."""

    features: ClassVar[frozenset[Feature]] = frozenset(_CAN)
    kit: ClassVar[KitSettings] = replace(QUICK, leak_operations=1000)

    @pytest.fixture
    def recipe(self, server: Weed) -> Recipe:
        """On the module's server."""
        return Recipe.of(S3Backend, settings(server.url, pack=False, prefix="alone/"))

    @pytest.fixture
    def expiring_store(self, recipe: Recipe) -> Recipe:
        """The same bucket."""
        return Recipe.of(S3Backend, {**recipe.settings, "ttl_s": self.kit.ttl_s})
