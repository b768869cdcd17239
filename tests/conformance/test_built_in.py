"""The core's own backends, and the fault injectors when they inject nothing, keep the contract."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from hicache_core.testing.features import Feature
from hicache_core.testing.kit_settings import FULL, QUICK, KitSettings
from hicache_core.testing.recipe import Recipe, Scope
from hicache_core.testing.suite import StorageBackendTests

KIT = replace(QUICK, leak_operations=FULL.leak_operations, ttl_s=0.3)
"""These two know ages to the millisecond, and calls are cheap."""
RETENTION = frozenset([Feature.PIN, Feature.USAGE, Feature.QUOTA, Feature.TTL])


class TestMemory(StorageBackendTests):
    """The memory backend, shared in one process."""

    features: ClassVar[frozenset[Feature]] = (
        StorageBackendTests.features - {Feature.SECOND_PROCESS}
        | {Feature.LIST, Feature.CLEAR, Feature.STATS}
        | RETENTION
    )
    kit: ClassVar[KitSettings] = KIT

    @pytest.fixture
    def recipe(self) -> Recipe:
        return Recipe.named("memory", {"share": "conformance"}, Scope.PROCESS)

    @pytest.fixture
    def quota_store(self) -> Recipe:
        return Recipe.named("memory", {"namespace_quota_nbytes": "1MiB"}, Scope.INSTANCE)

    @pytest.fixture
    def expiring_store(self) -> Recipe:
        return Recipe.named("memory", {"ttl_s": KIT.ttl_s}, Scope.INSTANCE)


class TestFile(StorageBackendTests):
    """The file backend."""

    features: ClassVar[frozenset[Feature]] = (
        StorageBackendTests.features
        | {Feature.LIST, Feature.CLEAR, Feature.STATS, Feature.DIAGNOSE}
        | RETENTION
    )
    kit: ClassVar[KitSettings] = KIT

    @pytest.fixture
    def recipe(self, tmp_path: Path) -> Recipe:
        return Recipe.named("file", {"path": str(tmp_path / "store")})

    @pytest.fixture
    def quota_store(self, tmp_path: Path) -> Recipe:
        settings = {"path": str(tmp_path / "quota"), "namespace_quota_nbytes": "1MiB"}
        return Recipe.named("file", settings)

    @pytest.fixture
    def expiring_store(self, tmp_path: Path) -> Recipe:
        settings = {"path": str(tmp_path / "expiring"), "ttl_s": KIT.ttl_s}
        return Recipe.named("file", settings)
