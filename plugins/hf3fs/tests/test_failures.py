"""What fails, fails with the right error, in bounded time, and never as wrong bytes."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hicache_core.errors import (
    BackendDenied,
    BackendError,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
    ConfigError,
)
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from plugins.hf3fs.tests.conftest import Open
from plugins.hf3fs.tests.helpers import blank, hits, key_of, new_backend, page_of, put
from tests.servers.valkey import Valkey


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 2 MiB of room."""
    mount = tmp_path / "disk"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_slab_that_the_disk_has_no_room_for_fails_at_open(
    small_disk: Path, tmp_path: Path
) -> None:
    backend = new_backend(
        small_disk / "kv", file_size="8MiB", metadata_url=f"sqlite://{tmp_path}/index"
    )
    with pytest.raises(BackendFull, match=r"needs 8388608 bytes.*lower file_size"):
        backend.open()
    assert list(small_disk.iterdir()) == [], "nothing is left behind"
    assert os.statvfs(small_disk).f_bavail == os.statvfs(small_disk).f_blocks


def test_an_allocated_slab_is_written_even_when_others_fill_the_disk(
    small_disk: Path, opened: Open, tmp_path: Path
) -> None:
    backend = opened(
        prefix=small_disk / "kv", file_size="1MiB", metadata_url=f"sqlite://{tmp_path}/index"
    )
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={small_disk}/other"], stderr=subprocess.DEVNULL, check=False
    )
    assert os.statvfs(small_disk).f_bavail == 0
    assert put(backend, range(100)) == 100
    assert hits(backend, range(100)) == 100


def test_a_full_disk_under_a_slab_with_holes_ends_the_count(
    small_disk: Path, opened: Open, tmp_path: Path
) -> None:
    """As on a file system that cannot reserve space."""
    (small_disk / "kv.r0.4096.slab").touch()
    os.truncate(small_disk / "kv.r0.4096.slab", 16 << 20)
    backend = opened(
        prefix=small_disk / "kv", file_size="16MiB", metadata_url=f"sqlite://{tmp_path}/index"
    )
    n_stored = put(backend, range(1000))
    assert 0 < n_stored < 1000
    assert hits(backend, range(1000)) == n_stored
    assert put(backend, [f"more {n}" for n in range(100)]) == 0
    backend.check_integrity()


def test_a_missing_directory_fails_at_open(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="does not exist"):
        new_backend(tmp_path / "no" / "kv").open()
    with pytest.raises(BackendUnavailable, match="set metadata_url"):
        new_backend(tmp_path / "kv", metadata_url="sqlite:///no/such/index").open()


def test_a_slab_that_is_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "kv.r0.4096.slab").mkdir()
    with pytest.raises(BackendUnavailable, match="cannot be opened"):
        new_backend(tmp_path / "kv").open()


def test_a_file_size_that_holds_no_slot_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="raise file_size"):
        new_backend(tmp_path / "kv", file_size=4095).open()


def test_bit_flips_anywhere_in_a_slot_are_a_miss(opened: Open) -> None:
    backend = opened()
    sealed, key = SealedBackend(backend), key_of("a")
    shape = (HEADER_NBYTES, 2000)
    for at in (0, 5, 20, 100, 250, 256, 300, 330, 1000, 256 + 2063, 256 + 2064, 256 + 2079):
        assert sealed.batch_set([key], [page_of(key, shape)]) == 1
        with backend._calls.call() as store:
            (binding,) = store.metadata.lookup([key])
            assert binding is not None
            place = binding.slot.number * 4096 + at
            (byte,) = os.pread(store.own.fd, 1, place)
            os.pwrite(store.own.fd, bytes([byte ^ 0x10]), place)
        assert sealed.batch_get([key], [blank(shape)]) == 0, f"byte {at}"
        assert not sealed.exists(key), "it was dropped, so that it can be stored again"
    assert backend.stats()["damaged_slots"] > 0
    sealed.close()


def test_a_slab_that_was_cut_gives_misses_and_is_mended_by_writes(opened: Open) -> None:
    backend = opened()
    put(backend, range(8))
    with backend._calls.call() as store:
        os.ftruncate(store.own.fd, 3 * 4096)
    assert hits(backend, range(8)) == 3
    for n in range(3, 8):
        assert not backend.exists(key_of(n)), "what was missed is unbound"
        assert put(backend, range(8)) == 8
        assert hits(backend, range(8)) == (n + 1 if n < 7 else 8)


def test_a_slab_of_another_rank_that_is_gone_is_a_miss(opened: Open, tmp_path: Path) -> None:
    first, second = opened(rank=0), opened(rank=1)
    put(second, ["a"])
    (tmp_path / "kv.r1.4096.slab").unlink()
    assert hits(first, ["a"]) == 0


def test_a_read_only_slab_is_denied(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        # Root may write anything but an immutable file.
        slab = tmp_path / "kv.r0.4096.slab"
        slab.touch()
        if subprocess.run(["chattr", "+i", slab], capture_output=True, check=False).returncode:
            pytest.skip("this file system has no immutable files")
        try:
            with pytest.raises(BackendDenied, match="is not writable"):
                new_backend(tmp_path / "kv").open()
        finally:
            subprocess.run(["chattr", "-i", slab], check=True)
        return
    tmp_path.chmod(0o500)
    with pytest.raises(BackendDenied):
        new_backend(tmp_path / "kv").open()


def test_dead_metadata_is_unavailable_at_once(opened: Open, own_valkey: Valkey) -> None:
    backend = opened(metadata_url=own_valkey.url, metadata_timeout_s=0.3)
    put(backend, ["a"])
    own_valkey.kill()
    start = time.monotonic()
    for call in (lambda: put(backend, ["b"]), lambda: hits(backend, ["a"])):
        with pytest.raises(BackendUnavailable, match="check that it runs"):
            call()
    assert time.monotonic() - start < 2
    own_valkey.restart()
    assert put(backend, ["b"]) == 1
    assert hits(backend, ["a", "b"]) == 2, "rebuilt from the slab"


def test_frozen_metadata_is_a_timeout(opened: Open, own_valkey: Valkey) -> None:
    backend = opened(metadata_url=own_valkey.url, metadata_timeout_s=0.2)
    put(backend, ["a"])
    with own_valkey.frozen(), pytest.raises(BackendTimeout):
        hits(backend, ["a"])
    assert hits(backend, ["a"]) == 1


def test_metadata_without_room_drops_writes_and_misses_until_it_has_some(
    opened: Open, own_valkey: Valkey
) -> None:
    backend = opened(metadata_url=own_valkey.url)
    put(backend, ["a"])
    with own_valkey.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        assert put(backend, ["b"]) == 0
        with pytest.raises(BackendFull):
            backend.set(key_of("b"), b"x")
        assert backend.exists(key_of("a"))
        assert hits(backend, ["a"]) == 0, "without a lease nothing is read"
        client.config_set("maxmemory", "0")
    assert put(backend, ["b"]) == 1
    assert hits(backend, ["a", "b"]) == 2


def test_metadata_errors_name_the_cause_and_hide_the_password(tmp_path: Path) -> None:
    server = Valkey("--requirepass", "correct horse")
    try:
        for url in (server.url, f"redis://:wrong-staple@127.0.0.1:{server.port}"):
            with pytest.raises(BackendDenied, match="check user and password") as caught:
                new_backend(tmp_path / "kv", metadata_url=url).open()
            assert "staple" not in str(caught.value)
    finally:
        server.close()
    with pytest.raises(BackendError) as gone:
        new_backend(tmp_path / "kv", metadata_url=f"redis://:staple@127.0.0.1:{server.port}").open()
    assert "staple" not in str(gone.value)


def test_sqlite_that_another_process_locks_is_a_timeout(opened: Open, tmp_path: Path) -> None:
    backend = opened(metadata_timeout_s=0.1)
    other = sqlite3.connect(tmp_path / "kv.index.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(BackendTimeout):
        put(backend, ["a"])
    other.execute("ROLLBACK")
    other.close()
    assert put(backend, ["a"]) == 1
