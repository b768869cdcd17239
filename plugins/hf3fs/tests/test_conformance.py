"""The conformance kit: on both metadata stores, and in USRBIO mode on the emulation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hicache_hf3fs import Hf3fsBackend
from hicache_hf3fs.slab import slab_name, slab_path, slot_nbytes_for

from hicache_core.testing.control import StoreControl
from hicache_core.testing.features import Feature
from hicache_core.testing.kit_settings import QUICK, KitSettings
from hicache_core.testing.recipe import Recipe
from hicache_core.testing.suite import StorageBackendTests
from plugins.hf3fs.tests.helpers import EMULATION
from tests.servers.valkey import Valkey, running

LARGEST = 32 << 20
FILE_NBYTES = 64 << 30


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory of the test alone; its slabs are gigabytes, so they do not outlive it."""
    yield tmp_path
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def recipe_in(directory: Path, **settings: Any) -> Recipe:
    """Backends with many slots for the kit's largest objects.

    The slab is there already, with holes, so that it takes no more of the disk than is written.
    """
    slab = slab_path(directory / "kv", slab_name(0, slot_nbytes_for(LARGEST)))
    slab.touch()
    os.truncate(slab, FILE_NBYTES)
    fixed = {
        "file_path_prefix": str(directory / "kv"),
        "file_size": FILE_NBYTES,
        "slot_nbytes": LARGEST,
        "lease_s": 2.0,
        "metadata_timeout_s": 5.0,
    }
    return Recipe.of(Hf3fsBackend, {**fixed, **settings})


def small_in(directory: Path, **settings: Any) -> Recipe:
    """Backends on a store that the kit fills."""
    fixed = {"file_path_prefix": str(directory / "kv"), "file_size": 16 << 20}
    return Recipe.of(Hf3fsBackend, {**fixed, "slot_nbytes": 1 << 20, **settings})


@pytest.fixture(scope="module")
def controlled() -> Iterator[Valkey]:
    """A server that the kit kills and freezes; each rule has a store of its own on it."""
    with running() as server:
        yield server


class TestPosixSqlite(StorageBackendTests):
    """Plain POSIX calls, the metadata in SQLite."""

    features: ClassVar[frozenset[Feature]] = StorageBackendTests.features | {
        Feature.CLEAR,
        Feature.DIAGNOSE,
        Feature.LIST,
        Feature.PIN,
        Feature.QUOTA,
        Feature.SMALL_STORE,
        Feature.STATS,
        Feature.TTL,
        Feature.USAGE,
    }

    kit: ClassVar[KitSettings] = replace(QUICK, ttl_s=0.3)  # ages are known to the millisecond

    @pytest.fixture
    def recipe(self, directory: Path) -> Recipe:
        return recipe_in(directory, mode="posix")

    @pytest.fixture
    def small_store(self, directory: Path) -> Recipe:
        return small_in(directory / "small", mode="posix")

    @pytest.fixture
    def quota_store(self, recipe: Recipe) -> Recipe:
        return Recipe.of(
            Hf3fsBackend, {**recipe.settings, "namespace_quota_nbytes": self.kit.quota_nbytes}
        )

    @pytest.fixture
    def expiring_store(self, recipe: Recipe) -> Recipe:
        return Recipe.of(Hf3fsBackend, {**recipe.settings, "ttl_s": self.kit.ttl_s})

    @pytest.fixture(autouse=True)
    def _small_directory(self, directory: Path) -> None:
        (directory / "small").mkdir()


class TestPosixRedis(TestPosixSqlite):
    """Plain POSIX calls, the metadata in Valkey, which is killed and frozen."""

    features: ClassVar[frozenset[Feature]] = TestPosixSqlite.features | {Feature.CONTROL}

    @pytest.fixture
    def recipe(self, directory: Path, controlled: Valkey) -> Recipe:
        url = controlled.url
        return recipe_in(directory, mode="posix", metadata_url=url, metadata_timeout_s=0.5)

    @pytest.fixture
    def small_store(self, directory: Path, controlled: Valkey) -> Recipe:
        return small_in(directory / "small", mode="posix", metadata_url=controlled.url)

    @pytest.fixture
    def store_control(self, controlled: Valkey) -> StoreControl:
        return controlled


class TestUsrbio(TestPosixSqlite):
    """USRBIO on the emulation of 3FS's client, in both processes."""

    @pytest.fixture
    def recipe(self, directory: Path) -> Recipe:
        return recipe_in(directory, mode="usrbio", iovec_nbytes=4 << 20)

    @pytest.fixture
    def small_store(self, directory: Path) -> Recipe:
        return small_in(directory / "small", mode="usrbio")

    @pytest.fixture(autouse=True)
    def _emulated(self, emulation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        path = os.pathsep.join([str(EMULATION), os.environ.get("PYTHONPATH", "")])
        monkeypatch.setenv("PYTHONPATH", path)
