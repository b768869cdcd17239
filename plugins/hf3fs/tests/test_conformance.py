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

from hicache_core.testing.control import StoreControl
from hicache_core.testing.features import Feature
from hicache_core.testing.recipe import Recipe
from hicache_core.testing.settings import QUICK, KitSettings
from hicache_core.testing.suite import StorageBackendTests
from plugins.hf3fs.tests.helpers import EMULATION, Valkey

# Slots for 32 MiB once; elsewhere for less, for there many are needed in little time.
LARGEST, LARGE = 32 << 20, 4 << 20


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory of the test alone; its slabs are gigabytes, so they do not outlive it."""
    yield tmp_path
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def recipe_in(directory: Path, slot_nbytes: int, **settings: Any) -> Recipe:
    """Backends with slots for the kit's largest objects."""
    fixed = {
        "file_path_prefix": str(directory / "kv"),
        "file_size": 6 << 30,
        "slot_nbytes": slot_nbytes,
        "lease_s": 2.0,
        "metadata_timeout_s": 5.0,
    }
    return Recipe.of(Hf3fsBackend, {**fixed, **settings})


def small_in(directory: Path, **settings: Any) -> Recipe:
    """Backends on a store that the kit fills."""
    return recipe_in(directory, 1 << 20, file_size=16 << 20, **settings)


class TestPosixSqlite(StorageBackendTests):
    """Plain POSIX calls, the metadata in SQLite."""

    features: ClassVar[frozenset[Feature]] = StorageBackendTests.features | {
        Feature.CLEAR,
        Feature.DIAGNOSE,
        Feature.LIST,
        Feature.SMALL_STORE,
        Feature.STATS,
    }

    @pytest.fixture
    def recipe(self, directory: Path) -> Recipe:
        return recipe_in(directory, LARGEST, mode="posix")

    @pytest.fixture
    def small_store(self, directory: Path) -> Recipe:
        return small_in(directory / "small", mode="posix")

    @pytest.fixture(autouse=True)
    def _small_directory(self, directory: Path) -> None:
        (directory / "small").mkdir()


class TestPosixRedis(TestPosixSqlite):
    """Plain POSIX calls, the metadata in Valkey, which is killed and frozen."""

    features: ClassVar[frozenset[Feature]] = TestPosixSqlite.features | {Feature.CONTROL}
    kit: ClassVar[KitSettings] = replace(QUICK, large_nbytes=LARGE)

    @pytest.fixture
    def recipe(self, directory: Path, controlled: Valkey) -> Recipe:
        url = controlled.url
        return recipe_in(directory, LARGE, mode="posix", metadata_url=url, metadata_timeout_s=0.5)

    @pytest.fixture
    def small_store(self, directory: Path, controlled: Valkey) -> Recipe:
        return small_in(directory / "small", mode="posix", metadata_url=controlled.url)

    @pytest.fixture
    def store_control(self, controlled: Valkey) -> StoreControl:
        return controlled

    @pytest.fixture
    def controlled(self, own_valkey: Valkey) -> Valkey:
        return own_valkey


class TestUsrbio(TestPosixSqlite):
    """USRBIO on the emulation of 3FS's client, in both processes."""

    kit: ClassVar[KitSettings] = replace(QUICK, large_nbytes=LARGE)

    @pytest.fixture
    def recipe(self, directory: Path) -> Recipe:
        return recipe_in(directory, LARGE, mode="usrbio", iovec_nbytes=4 << 20)

    @pytest.fixture
    def small_store(self, directory: Path) -> Recipe:
        return small_in(directory / "small", mode="usrbio")

    @pytest.fixture(autouse=True)
    def _emulated(self, emulation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        path = os.pathsep.join([str(EMULATION), os.environ.get("PYTHONPATH", "")])
        monkeypatch.setenv("PYTHONPATH", path)
