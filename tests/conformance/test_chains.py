"""Chains, and guarded backends, keep the contract as any backend does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import ClassVar

import pytest

from hicache_core.storage.base import BackendConfig, StorageBackend
from hicache_core.storage.chain.backend import ChainBackend
from hicache_core.storage.chain.capabilities import Link
from hicache_core.storage.chain.config import ChainConfig
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.config import FileConfig
from hicache_core.storage.guard.backend import GuardedBackend
from hicache_core.storage.guard.config import GuardConfig
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.workers.executor import Deadlines, Worker
from hicache_core.storage.workers.worker import StorageWorker
from hicache_core.testing.features import Feature
from hicache_core.testing.recipe import Recipe, Scope
from hicache_core.testing.suite import StorageBackendTests
from hicache_core.types import BackendContext
from tests.conformance.variants import (
    GUARDED,
    TWO_OF_A_KIND,
    WRITTEN_THROUGH,
    Selection,
    VariantTests,
)

BACKENDS: dict[str, tuple[type[StorageBackend], type[BackendConfig]]] = {
    "memory": (MemoryBackend, MemoryConfig),
    "file": (FileBackend, FileConfig),
}


def make_worker(backend: StorageBackend, max_nbytes: int) -> Worker:
    return StorageWorker(
        backend,
        n_threads=1,
        max_read_nbytes=1,
        max_write_nbytes=max_nbytes,
        clock=time.monotonic,
        deadline=Deadlines(),
    )


def chain(config: ChainConfig, context: BackendContext) -> ChainBackend:
    """A chain as ``build`` makes it, but for the seals: the kit's pages have no header."""
    links = []
    for link in config.links:
        backend_class, settings = BACKENDS[link.backend]
        inner = backend_class(settings.model_validate(link.config), context)
        links.append(Link(link.label, GuardedBackend(inner, link.guard)))
    return ChainBackend(config, context, links, make_worker)


class KitChain(ChainBackend):
    """Makes a chain where the kit makes a backend of a class, its settings and a context."""

    def __new__(cls, config: ChainConfig, context: BackendContext) -> ChainBackend:  # type: ignore[misc]
        return chain(config, context)


class KitGuard(GuardedBackend):
    """Makes a guarded memory backend where the kit makes a backend."""

    name = "guarded"
    Config = MemoryConfig

    def __new__(cls, config: MemoryConfig, context: BackendContext) -> GuardedBackend:  # type: ignore[misc]
        return GuardedBackend(MemoryBackend(config, context), GuardConfig())


class ChainTests(StorageBackendTests):
    """What all chains have in common."""

    write: ClassVar[str]
    features: ClassVar[frozenset[Feature]] = StorageBackendTests.features - {
        Feature.SECOND_PROCESS
    } | {Feature.LIST, Feature.CLEAR, Feature.STATS, Feature.PIN, Feature.USAGE}

    def links(self, _directory: Path) -> list[dict[str, object]]:
        return [
            {"backend": "memory", "name": name, "config": {"share": f"kit-{name}"}}
            for name in ("near", "far")
        ]

    @pytest.fixture
    def recipe(self, tmp_path: Path) -> Recipe:
        settings = {"links": self.links(tmp_path), "write": self.write}
        return Recipe.of(KitChain, json.loads(json.dumps(settings)), Scope.PROCESS)


class TestMemoryThrough(VariantTests, ChainTests):
    """Two stores of this process, written through."""

    selection: ClassVar[Selection] = TWO_OF_A_KIND
    write = "through"


class TestMemoryBehind(VariantTests, ChainTests):
    """Two stores of this process, written behind."""

    selection: ClassVar[Selection] = TWO_OF_A_KIND
    write = "behind"


class FileChainTests(ChainTests):
    """This process's memory, then files."""

    features: ClassVar[frozenset[Feature]] = ChainTests.features | {Feature.DIAGNOSE}

    def links(self, directory: Path) -> list[dict[str, object]]:
        near, _ = super().links(directory)
        return [near, {"backend": "file", "config": {"path": str(directory / "far")}}]


class TestFileThrough(VariantTests, FileChainTests):
    """Memory and files, written through."""

    selection: ClassVar[Selection] = WRITTEN_THROUGH
    write = "through"


class TestFileBehind(FileChainTests):
    """Memory and files, written behind: runs every rule."""

    write = "behind"


class TestGuarded(VariantTests):
    """A guard around the memory backend."""

    selection: ClassVar[Selection] = GUARDED
    features: ClassVar[frozenset[Feature]] = ChainTests.features

    @pytest.fixture
    def recipe(self) -> Recipe:
        return Recipe.of(KitGuard, {"share": "guarded"}, Scope.PROCESS)
