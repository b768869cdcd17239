"""Whole caches on a real directory: restarts, damage, and configurations that do not fit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.errors import BackendError, BrokenBackend, ConfigError, SpecError, UnknownBackend
from hicache_core.pools.device import DevicePool
from tests.page_path.world import PAGE_SIZE, SPEC, Outcome, World, ids, make_world


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def on_disk(worlds: list[World], path: Path, **settings: Any) -> World:
    world = make_world(storage={"path": str(path), "io_threads": 1}, backend="file", **settings)
    worlds.append(world)
    return world


def stored(path: Path) -> None:
    """A directory that holds the eight pages of ``ids(33)``, left by a process that ended."""
    world = make_world(storage={"path": str(path)}, backend="file")
    world.request(ids(33))
    world.close()


def test_what_one_process_stored_the_next_one_loads(worlds: list[World], tmp_path: Path) -> None:
    stored(tmp_path / "kv")
    assert on_disk(worlds, tmp_path / "kv").request(ids(33)) == Outcome(0, 32, 32, 0)


@pytest.mark.parametrize("part", [0.1, 0.35, 0.6, 0.9])
def test_a_flipped_bit_on_disk_costs_pages_and_never_a_byte(
    worlds: list[World], tmp_path: Path, part: float
) -> None:
    """``World`` checks every byte that is served; here it is only left to count."""
    stored(tmp_path / "kv")
    for file in (tmp_path / "kv").rglob("*.seg"):
        content = bytearray(file.read_bytes())
        n_used = len(content.rstrip(b"\0"))  # the rest is room for more
        for place in range(int(n_used * part), n_used, 97):
            content[place] ^= 0x04
        file.write_bytes(content)
    outcome = on_disk(worlds, tmp_path / "kv").request(ids(33))
    assert outcome.storage < 32
    assert outcome.computed_pages == 8 - outcome.storage // PAGE_SIZE


def test_a_truncated_file_is_a_shorter_hit(worlds: list[World], tmp_path: Path) -> None:
    stored(tmp_path / "kv")
    for file in (tmp_path / "kv").rglob("*.seg"):
        content = file.read_bytes().rstrip(b"\0")
        file.write_bytes(content[: len(content) // 2])
    assert on_disk(worlds, tmp_path / "kv").request(ids(33)).storage < 32


def test_a_foreign_file_in_the_directory_is_left_alone(worlds: list[World], tmp_path: Path) -> None:
    stored(tmp_path / "kv")
    note = tmp_path / "kv" / "notes.txt"
    note.write_text("not ours")
    assert on_disk(worlds, tmp_path / "kv").request(ids(33)).storage == 32
    assert note.read_text() == "not ours"


def test_pages_of_another_size_are_never_read(worlds: list[World], tmp_path: Path) -> None:
    """The page size is part of the storage namespace."""
    stored(tmp_path / "kv")
    config = HiCacheConfig(
        page_size=2,
        hicache_storage_backend="file",
        hicache_storage_backend_extra_config={
            "path": str(tmp_path / "kv"),
            "prefetch_threshold": 2,
        },
        hicache_storage_prefetch_policy="wait_complete",
    )
    with HiCache(config, SPEC, DevicePool(SPEC, 2, 32)) as cache:
        assert cache.prefetch("r", ids(33))
        while not cache.prefetch_ready("r"):
            cache.poll()
        assert cache.finish_prefetch("r") == 0
        cache.check_integrity()


def test_a_layout_of_another_name_is_never_read(worlds: list[World], tmp_path: Path) -> None:
    stored(tmp_path / "kv")
    world = on_disk(worlds, tmp_path / "kv", hicache_mem_layout="layer_first")
    assert world.request(ids(33)).storage == 0


@pytest.mark.parametrize(
    ("backend", "extra", "error", "says"),
    [
        ("file", {}, ConfigError, "path"),
        ("file", {"path": "x", "pth": 1}, ConfigError, "pth"),
        ("file", {"path": "/proc/no/such/place"}, BackendError, "/proc/no"),
        ("fiel", {"path": "x"}, UnknownBackend, "file"),
        ("dynamic", {"backend_name": "b", "class_name": "C"}, ConfigError, "module_path"),
        (
            "dynamic",
            {"backend_name": "b", "module_path": "tests.page_path.backends", "class_name": "Nix"},
            BrokenBackend,
            "Nix",
        ),
    ],
)
def test_a_bad_storage_setting_is_told_and_leaves_nothing_running(
    backend: str, extra: dict[str, Any], error: type[Exception], says: str
) -> None:
    before = threading.active_count()
    with pytest.raises(error, match=says):
        make_world(storage=extra, backend=backend)
    assert threading.active_count() == before


def test_a_device_pool_of_another_page_size_is_refused() -> None:
    with pytest.raises(SpecError, match="pages of 8 tokens"):
        HiCache(HiCacheConfig(page_size=PAGE_SIZE), SPEC, DevicePool(SPEC, 8, 4))
