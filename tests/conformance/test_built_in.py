"""The core's own backends, and the fault injectors when they inject nothing, keep the contract."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from hicache_core.testing.features import Feature
from hicache_core.testing.recipe import Recipe, Scope
from hicache_core.testing.suite import StorageBackendTests


class TestMemory(StorageBackendTests):
    """The memory backend, shared in one process."""

    features: ClassVar[frozenset[Feature]] = StorageBackendTests.features - {
        Feature.SECOND_PROCESS
    } | {Feature.LIST, Feature.CLEAR, Feature.STATS}

    @pytest.fixture
    def recipe(self) -> Recipe:
        return Recipe.named("memory", {"share": "conformance"}, Scope.PROCESS)


class TestFile(StorageBackendTests):
    """The file backend."""

    features: ClassVar[frozenset[Feature]] = StorageBackendTests.features | {
        Feature.LIST,
        Feature.CLEAR,
        Feature.STATS,
        Feature.DIAGNOSE,
    }

    @pytest.fixture
    def recipe(self, tmp_path: Path) -> Recipe:
        return Recipe.named("file", {"path": str(tmp_path / "store")})
