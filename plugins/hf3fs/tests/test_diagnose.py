"""What ``hicache doctor`` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hicache_hf3fs import Hf3fsBackend
from hicache_hf3fs.diagnose import filesystem_of

from hicache_core.storage.base import Clearable, Diagnosable, HasStats, Listable
from plugins.hf3fs.tests.conftest import Open
from plugins.hf3fs.tests.helpers import hits, put
from tests.servers.valkey import Valkey


def texts(backend: Hf3fsBackend, level: str) -> str:
    """The messages of one level."""
    return "\n".join(f.message for f in backend.diagnose() if f.level == level)


def test_the_optional_protocols_are_there(opened: Open) -> None:
    backend = opened()
    for protocol in (Listable, Clearable, HasStats, Diagnosable):
        assert isinstance(backend, protocol)


def test_a_good_store_gives_no_warning(opened: Open, valkey: Valkey) -> None:
    for backend in (opened(), opened(metadata_url=valkey.url)):
        put(backend, range(3))
        assert texts(backend, "error") == texts(backend, "warning") == ""
        assert "mode posix" not in texts(backend, "ok")
        assert "posix on" in texts(backend, "ok")
        assert "3 of 64 slots of 4096 bytes hold objects" in texts(backend, "ok")
        assert "answers in" in texts(backend, "ok")


def test_a_redis_that_may_drop_the_bindings_is_a_warning(opened: Open, own_valkey: Valkey) -> None:
    backend = opened(metadata_url=own_valkey.url)
    with own_valkey.client() as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert "set it to noeviction" in texts(backend, "warning")
        client.config_set("maxmemory-policy", "noeviction")
        assert texts(backend, "warning") == ""
        client.config_set("maxmemory", "1")
        assert "raise maxmemory" in texts(backend, "warning")


def test_the_rings_are_named_and_lost_ones_are_a_warning(emulation: Any, opened: Open) -> None:
    backend = opened(mode="usrbio")
    assert "usrbio on 3FS mount" in texts(backend, "ok")
    with backend._calls.call() as store:
        store.io.lost_rings = 1
    assert "1 rings were lost" in texts(backend, "warning")


def test_slabs_of_other_sizes_and_larger_than_asked_are_named(opened: Open) -> None:
    opened(slot_nbytes=9000).close()
    backend = opened(file_size=32 * 4096)
    opened(file_size=64 * 4096).close()
    assert "1 slabs of other slot sizes" in texts(backend, "warning")
    assert "larger than file_size" in texts(backend, "warning")


def test_many_slots_in_quarantine_are_a_warning(opened: Open) -> None:
    backend = opened()
    put(backend, range(40))
    hits(backend, range(40))
    backend.clear("")
    assert "lower lease_s or raise file_size" in texts(backend, "warning")


def test_the_file_system_is_the_innermost_mount(tmp_path: Path) -> None:
    assert filesystem_of(Path("/proc/self")) == "proc"
    assert filesystem_of(Path("/dev/shm")) == "tmpfs"
    assert filesystem_of(tmp_path) != "unknown"
