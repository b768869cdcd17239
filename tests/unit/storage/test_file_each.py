"""Rules of the file backend when it answers for each page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.file.filesystem import is_local
from hicache_core.storage.file.records import BLOCK_NBYTES, Extent, RecordStore
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend
from hicache_core.types import BackendContext

OpenFile = Callable[..., FileBackend]
Advance = Callable[[float], None]
KEYS = [f"{'0' * 16}/{n:064x}" for n in range(8)]
NBYTES = 100  # an object of this size takes one block


def value(key: str, nbytes: int = NBYTES) -> bytes:
    return (key[::-1].encode() * (nbytes // len(key) + 1))[:nbytes]


def page(payload: bytes) -> list[memoryview]:
    return [memoryview(bytearray(payload))]


def put(backend: FileBackend, *numbers: int, nbytes: int = NBYTES) -> list[bool]:
    keys = [KEYS[n] for n in numbers]
    return list(backend.set_each(keys, [page(value(key, nbytes)) for key in keys]))


def read(backend: FileBackend, nbytes: int = NBYTES) -> list[bool]:
    """Reads each of ``KEYS``; what is filled must be right."""
    pages = [page(bytes(nbytes)) for _ in KEYS]
    mask = backend.get_each(KEYS, pages)
    for key, (segment,), is_filled in zip(KEYS, pages, mask, strict=True):
        assert not is_filled or segment == value(key, nbytes)
    return list(mask)


def only(*numbers: int) -> list[bool]:
    return [n in numbers for n in range(len(KEYS))]


def test_pages_behind_gaps_are_found_and_read(open_file: OpenFile, advance: Advance) -> None:
    backend = open_file(ttl_s=10.0)
    put(backend, 1)
    advance(6)
    put(backend, 2, 5, 7)
    put(backend, 3, nbytes=NBYTES + 1)
    assert list(backend.exists_each(KEYS)) == only(1, 2, 3, 5, 7)
    assert read(backend) == only(1, 2, 5, 7)
    advance(6)
    assert list(backend.exists_each(KEYS)) == only(2, 3, 5, 7)
    assert read(backend) == only(2, 5, 7)
    stats = backend.stats()
    assert (stats["reads"], stats["misses"]) == (4 + 3, 4 + 5)
    assert (backend.exists_each([]), backend.get_each([], []), backend.set_each([], [])) == (
        *([], []),
        [],
    )


def test_large_pages_behind_gaps_are_shared_by_threads(open_file: OpenFile) -> None:
    backend = open_file(io_threads=4)
    assert put(backend, 0, 2, 3, 7, nbytes=3 << 20) == [True] * 4
    assert read(backend, 3 << 20) == only(0, 2, 3, 7)


def test_a_page_that_is_refused_does_not_end_the_call(open_file: OpenFile) -> None:
    backend = open_file()
    put(backend, *range(8))
    shown: list[int] = []

    def arrived(n: int) -> bool:
        shown.append(n)
        return n not in (0, 4)

    mask = backend.get_each_visiting(KEYS, [page(bytes(NBYTES)) for _ in KEYS], arrived)
    assert list(mask) == only(1, 2, 3, 5, 6, 7)
    assert sorted(shown) == list(range(8))
    assert list(backend.exists_each(KEYS)) == only(*range(8)), "to refuse a page removes nothing"


def test_pages_that_are_stored_already_are_neither_shown_nor_written(open_file: OpenFile) -> None:
    backend = open_file()
    shown: list[int] = []
    pages = [page(value(key)) for key in KEYS]
    assert list(backend.set_each_visiting(KEYS[2:4], pages[2:4], shown.append)) == [True, True]
    assert sorted(shown) == [0, 1]
    shown.clear()
    assert list(backend.set_each_visiting(KEYS[2:4], pages[2:4], shown.append)) == [True, True]
    assert shown == []
    assert list(backend.set_each_visiting(KEYS, pages, shown.append)) == [True] * 8
    assert sorted(shown) == [0, 1, 4, 5, 6, 7]
    assert read(backend) == only(*range(8))


def test_a_page_above_the_cap_leaves_room_for_those_behind_it(open_file: OpenFile) -> None:
    backend = open_file(max_nbytes=4 * BLOCK_NBYTES)
    sizes = [NBYTES, 5 * BLOCK_NBYTES, NBYTES, 2 * BLOCK_NBYTES, NBYTES, 0, NBYTES, NBYTES]
    pages = [page(value(key, n)) for key, n in zip(KEYS, sizes, strict=True)]
    mask = backend.set_each(KEYS, pages)
    assert list(mask) == list(backend.exists_each(KEYS)) == only(0, 2, 4, 5)
    stats = backend.stats()
    assert (stats["writes"], stats["dropped_writes"]) == (4, 4)


def test_what_is_stored_already_counts_though_the_rest_exceeds_the_quota(
    open_file: OpenFile,
) -> None:
    backend = open_file(namespace_quota_nbytes=3 * NBYTES)
    assert put(backend, 7) == [True]
    assert put(backend, *range(8)) == only(0, 1, 7)
    assert list(backend.exists_each(KEYS)) == only(0, 1, 7)


def test_a_page_overwritten_while_it_was_read_is_the_only_miss(
    open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, other = open_file(), open_file()
    put(backend, *range(0, 8, 2))
    whole_read = RecordStore.read

    def torn_read(self: RecordStore, key: str, page: Any, extent: Extent) -> bool:
        assert whole_read(self, key, page, extent)
        if key == KEYS[2]:
            other.delete([key])
            put(other, 1)  # takes the extent that became free
            page[0][10:20] = b"not from 2"
        return True

    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "read", torn_read)
        assert read(backend) == only(0, 4, 6)
    stats = backend.stats()
    assert (stats["raced_reads"], stats["damaged_records"]) == (1, 0)
    assert read(backend) == only(0, 1, 4, 6)


def test_damaged_records_are_removed_and_the_others_are_read(
    open_file: OpenFile, tmp_path: Path
) -> None:
    backend = open_file(io_threads=1)
    put(backend, *range(8))
    for segment in (tmp_path / "store" / "segments").glob("*.seg"):
        data = bytearray(segment.read_bytes())
        for n in (3, 5):
            if (at := data.find(value(KEYS[n]))) >= 0:
                data[at - 256 : at - 252] = b"????"  # the magic number of its header
        segment.write_bytes(data)
    assert read(backend) == only(0, 1, 2, 4, 6, 7)
    assert backend.stats()["damaged_records"] == 2
    assert list(backend.exists_each(KEYS)) == only(0, 1, 2, 4, 6, 7)


def test_the_seal_checks_each_page_while_it_is_read(open_file: OpenFile) -> None:
    inner = open_file()
    sealed = SealedBackend(inner)

    def sealed_page(payload: bytes) -> list[memoryview]:
        return [memoryview(bytearray(HEADER_NBYTES)), memoryview(bytearray(payload))]

    stored = [KEYS[n] for n in (1, 2, 4, 6)]
    assert list(sealed.set_each(stored, [sealed_page(value(key)) for key in stored])) == [True] * 4
    inner.delete([KEYS[4]])
    inner.set(KEYS[4], bytes(HEADER_NBYTES + NBYTES))
    inner.set(KEYS[7], b"short")
    pages = [sealed_page(bytes(NBYTES)) for _ in KEYS]
    assert list(sealed.get_each(KEYS, pages)) == only(1, 2, 6)
    assert all(pages[n][1] == value(KEYS[n]) for n in (1, 2, 6))
    assert sealed.rejections()["corrupt"] == sealed.rejections()["wrong_length"] == 1
    assert list(sealed.exists_each(KEYS)) == only(1, 2, 6)


def test_calls_are_bounded_where_the_file_system_is_of_this_host(
    open_file: OpenFile, tmp_path: Path
) -> None:
    assert is_local(Path("/dev/shm"))
    assert not is_local(Path("/proc")), "an unknown type is not local"
    assert not is_local(Path("/proc/none/such")), "the parent decides"
    assert open_file().bounds_calls() is is_local(tmp_path)
    config = FileConfig(path=Path("/proc/store"))
    assert not FileBackend(config, BackendContext(namespace="0" * 16)).bounds_calls()
