"""The USRBIO mode on the emulation of ``hf3fs_fuse.io``; and on real 3FS where there is a mount."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hicache_core.errors import BackendError, BackendTimeout, BackendUnavailable
from plugins.hf3fs.tests.conftest import Open
from plugins.hf3fs.tests.helpers import blank, bytes_of, hits, key_of, new_backend, page_of, put

MOUNT = os.environ.get("HICACHE_HF3FS_MOUNT", "")


def open_small(emulation: Any, opened: Open, **settings: Any) -> Any:
    """One pair of rings with four cells."""
    fixed = {"mode": "usrbio", "numjobs": 1, "entries": 4, "iovec_nbytes": 4 << 14}
    return opened(**{**fixed, **settings})


def test_auto_takes_usrbio_on_a_mount_and_says_so_once(
    emulation: Any, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert "lost_rings" in opened().stats()
    assert caplog.text.count("mode usrbio, 3FS mount") == 1


def test_auto_takes_posix_elsewhere_and_says_why(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert "lost_rings" not in opened().stats()
    assert "mode posix, hf3fs_fuse.io is not installed" in caplog.text


def test_usrbio_that_is_not_possible_fails_at_open(
    tmp_path: Path, emulation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF3FS_EMULATION_MOUNT")
    with pytest.raises(BackendUnavailable, match="is not in a 3FS mount; set mode"):
        new_backend(tmp_path / "kv", mode="usrbio").open()


def test_completions_in_any_order_fill_the_right_pages(emulation: Any, opened: Open) -> None:
    """Ten rounds of 48 pages through four cells; the emulation shuffles."""
    backend = open_small(emulation, opened)
    for n in range(10):
        labels = [f"{n % 3} {i}" for i in range(20)]
        assert put(backend, labels, 3000) == 20
        assert hits(backend, labels, 3000) == 20


def test_files_are_registered_while_open_and_deregistered_before_close(
    emulation: Any, opened: Open
) -> None:
    first, second = opened(rank=0), opened(rank=1)
    put(second, ["a"])
    assert hits(first, ["a"]) == 1
    assert len(emulation.registered) == 3, "each its own slab, and the first also the second's"
    first.close()
    second.close()
    assert not emulation.registered


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODATA])
def test_a_negative_result_of_a_read_is_a_miss(emulation: Any, opened: Open, code: int) -> None:
    backend = open_small(emulation, opened)
    put(backend, range(3))
    emulation.faults.errors = [code]
    assert hits(backend, [0]) == 0
    assert hits(backend, [1, 2]) == 2


def test_a_passing_error_does_not_cost_the_object(emulation: Any, opened: Open) -> None:
    backend = open_small(emulation, opened)
    put(backend, ["a"])
    emulation.faults.errors = [errno.ENOTCONN]
    assert hits(backend, ["a"]) == 0
    assert hits(backend, ["a"]) == 1


def test_a_short_read_is_a_miss(emulation: Any, opened: Open) -> None:
    backend = open_small(emulation, opened)
    put(backend, ["a"])
    emulation.faults.short_by = 1
    assert hits(backend, ["a"]) == 0


def test_a_negative_result_of_a_write_is_an_error_and_gives_the_slot_back(
    emulation: Any, opened: Open
) -> None:
    backend = open_small(emulation, opened)
    emulation.faults.errors = [errno.EIO]
    with pytest.raises(BackendError, match="check the file system"):
        put(backend, ["a"])
    assert backend.stats()["held_slots"] == 0
    assert hits(backend, ["a"]) == 0
    emulation.faults.errors = [errno.ENOSPC]
    assert put(backend, ["a"]) == 0
    assert put(backend, ["a"]) == 1


def test_a_read_that_hangs_is_a_timeout_and_its_ring_is_not_used_again(
    emulation: Any, opened: Open
) -> None:
    backend = open_small(emulation, opened, io_timeout_s=0.1)
    put(backend, ["a", "b"])
    emulation.faults.hang = True
    key, page = key_of("a"), blank((64, 936))
    with pytest.raises(BackendTimeout, match="completed none of 1 operations"):
        backend.batch_get([key], [page])
    emulation.faults.hang = False
    emulation.faults.carry_out_late()
    assert bytes_of(page) == bytes(1000), "what comes late does not reach the page"
    assert hits(backend, ["a", "b"]) == 2, "by a new ring"
    assert backend.stats()["lost_rings"] == 1


def test_a_read_of_each_page_that_hangs_half_way_touches_none_afterwards(
    emulation: Any, opened: Open
) -> None:
    """Some pages have come when the others hang; those come late, and reach no page."""
    backend = open_small(emulation, opened, io_timeout_s=0.1)
    keys = [key_of(n) for n in range(20)]
    put(backend, range(20))
    backend.delete([keys[3]])
    pages = [blank((64, 936)) for _ in keys]

    def arrived(n: int) -> bool:
        emulation.faults.hang = n >= 6 or emulation.faults.hang
        return True

    with pytest.raises(BackendTimeout):
        backend.get_each_visiting(keys, pages, arrived)
    assert any(bytes_of(page) != bytes(1000) for page in pages)
    for page in pages:
        page[1][:] = b"\x5a" * 936
    emulation.faults.hang = False
    emulation.faults.carry_out_late()
    assert all(page[1] == b"\x5a" * 936 for page in pages)
    assert backend.get_each(keys, pages) == [n != 3 for n in range(20)]


def test_a_write_that_hangs_keeps_its_slot_reserved(emulation: Any, opened: Open) -> None:
    backend = open_small(emulation, opened, io_timeout_s=0.1)
    emulation.faults.hang = True
    with pytest.raises(BackendTimeout):
        put(backend, ["a"])
    emulation.faults.hang = False
    assert put(backend, ["a", "b"]) == 2
    emulation.faults.carry_out_late()
    assert hits(backend, ["a", "b"]) == 2, "the late write went to a slot that nobody else has"
    assert backend.stats()["held_slots"] == 1


def test_rings_that_are_all_lost_end_in_bounded_time(
    emulation: Any, opened: Open, tmp_path: Path
) -> None:
    backend = open_small(emulation, opened, io_timeout_s=0.05)
    put(backend, ["a"])
    emulation.faults.hang = True
    start = time.monotonic()
    for _ in range(5):
        with pytest.raises(BackendTimeout):
            hits(backend, ["a"])
    assert backend.stats()["lost_rings"] == 2, "no more shared memory than twice numjobs is taken"
    assert len(os.listdir(tmp_path / "3fs-virt" / "iovs")) == 2
    assert time.monotonic() - start < 5


def test_busy_rings_are_waited_for_and_not_taken_for_lost_ones(
    emulation: Any, opened: Open, tmp_path: Path
) -> None:
    backend = open_small(emulation, opened, numjobs=2, io_timeout_s=2.0)
    put(backend, range(8))
    emulation.faults.hang = True
    with pytest.raises(BackendTimeout):
        hits(backend, [0])
    emulation.faults.hang = False
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: hits(backend, [n % 8]), range(200))) == [1] * 200
    assert len(os.listdir(tmp_path / "3fs-virt" / "iovs")) == 3, "two live rings and a lost one"


def test_a_read_past_its_lease_is_a_miss(emulation: Any, opened: Open) -> None:
    backend = open_small(emulation, opened, lease_s=1e-9)
    put(backend, ["a"])
    assert hits(backend, ["a"]) == 0
    assert backend.stats()["late_reads"] == 1


def test_closing_leaves_no_shared_memory_and_no_link(
    emulation: Any, opened: Open, tmp_path: Path
) -> None:
    backend = open_small(emulation, opened, numjobs=3)
    links = tmp_path / "3fs-virt" / "iovs"
    shared = [link.readlink() for link in links.iterdir()]
    assert [memory.exists() for memory in shared] == [True] * 3
    backend.close()
    assert list(links.iterdir()) == []
    assert [memory.exists() for memory in shared] == [False] * 3


@pytest.mark.real_3fs
@pytest.mark.skipif(
    not MOUNT or importlib.util.find_spec("hf3fs_fuse") is None,
    reason="set HICACHE_HF3FS_MOUNT to a directory on a 3FS mount and install its client",
)
def test_pages_round_trip_on_real_3fs(opened: Open) -> None:
    directory = Path(MOUNT)
    prefix = directory / f"hicache-test-{os.getpid()}"
    try:
        backend = opened(
            prefix=prefix,
            mode="usrbio",
            slot_nbytes=1 << 20,
            file_size="256MiB",
            metadata_url=f"sqlite:///tmp/{prefix.name}.sqlite",
        )
        shape = (64, (1 << 20) - 64)
        keys = [key_of(n) for n in range(100)]
        assert backend.batch_set(keys, [page_of(key, shape) for key in keys]) == 100
        assert hits(backend, range(100), 1 << 20) == 100
        backend.close()
    finally:
        for path in [*directory.glob(f"{prefix.name}*"), *Path("/tmp").glob(f"{prefix.name}*")]:
            path.unlink()
