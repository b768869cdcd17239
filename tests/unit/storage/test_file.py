"""Rules of the file backend, one process."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hicache_core.errors import (
    BackendDenied,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
    UseAfterClose,
)
from hicache_core.storage.base import Clearable, Diagnosable, HasStats, Listable
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.file.records import (
    BLOCK_NBYTES,
    SEGMENT_NBYTES,
    Extent,
    RecordStore,
    capacity_for,
)
from hicache_core.types import BackendContext

OpenFile = Callable[..., FileBackend]
Advance = Callable[[float], None]
NBYTES = 100  # an object of this size takes one block


def views(*parts: bytes) -> list[memoryview]:
    return [memoryview(bytearray(part)) for part in parts]


def put(backend: FileBackend, *keys: str, nbytes: int = NBYTES) -> int:
    """Stores under each key bytes that the key determines."""
    return backend.batch_set(keys, [views(value(key, nbytes)) for key in keys])


def value(key: str, nbytes: int = NBYTES) -> bytes:
    return (key.encode() * (nbytes // len(key) + 1))[:nbytes]


def held(backend: FileBackend) -> list[str]:
    """All keys, after a check that each can be read and is right."""
    keys = sorted(backend.list_keys(""))
    for key in keys:
        found = backend.get(key)
        assert found is not None
        assert bytes(found) == value(key, len(found))
    return keys


@pytest.mark.parametrize("nbytes", [0, 1, 3824, 3825, 4096, 65536, 1 << 20, (32 << 20) + 7])
def test_objects_of_any_size_come_back_whole(open_file: OpenFile, nbytes: int) -> None:
    backend = open_file()
    data = os.urandom(nbytes)
    backend.set("k", data)
    assert backend.get("k") == data
    assert backend.stats()["used_nbytes"] == nbytes
    assert backend.stats()["held_nbytes"] == capacity_for(nbytes)


def test_an_object_larger_than_a_segment_gets_one_of_its_own(
    open_file: OpenFile, tmp_path: Path
) -> None:
    backend = open_file()
    put(backend, "a")
    big = bytes(SEGMENT_NBYTES)
    assert backend.batch_set(["b"], [[memoryview(big)]]) == 1
    put(backend, "c")
    assert len(list((tmp_path / "store" / "segments").iterdir())) == 2
    assert backend.get("b") == big
    assert sorted(backend.list_keys("")) == ["a", "b", "c"]


@pytest.mark.parametrize("n_segments", [1, 2, 122, 1021, 1022, 1023, 3000])
def test_a_page_of_many_segments_is_written_and_read_as_it_is(
    open_file: OpenFile, n_segments: int
) -> None:
    backend = open_file()
    parts = [os.urandom(n % 5) for n in range(n_segments)]
    assert backend.batch_set(["k"], [views(*parts)]) == 1
    assert backend.get("k") == b"".join(parts)
    into = views(*(bytes(len(part)) for part in reversed(parts)))
    assert backend.batch_get(["k"], [into]) == 1
    assert b"".join(into) == b"".join(parts)


def test_large_batches_are_shared_by_threads_and_keep_their_order(open_file: OpenFile) -> None:
    backend = open_file(io_threads=3)
    keys = [f"k{n}" for n in range(40)]
    nbytes = 300_000
    assert put(backend, *keys, nbytes=nbytes) == 40
    pages = [views(bytes(nbytes)) for _ in keys]
    assert backend.batch_get(keys, pages) == 40
    assert [bytes(page[0]) for page in pages] == [value(key, nbytes) for key in keys]
    backend.delete([keys[17]])
    assert backend.batch_get(keys, pages) == 17


@pytest.mark.parametrize("hole", range(4))
def test_counts_end_at_the_first_hole(open_file: OpenFile, hole: int) -> None:
    backend = open_file()
    keys = ["a", "b", "c", "d"]
    put(backend, *(key for n, key in enumerate(keys) if n != hole))
    assert backend.batch_exists(keys) == hole
    assert backend.batch_get(keys, [views(bytes(NBYTES)) for _ in keys]) == hole


def test_an_object_of_another_length_does_not_count(open_file: OpenFile) -> None:
    backend = open_file()
    put(backend, "a", "b")
    assert backend.batch_get(["a", "b"], [views(bytes(NBYTES)), views(bytes(NBYTES - 1))]) == 1


def test_an_object_of_another_length_is_replaced(open_file: OpenFile) -> None:
    backend = open_file()
    put(backend, "a", nbytes=50)
    put(backend, "a", nbytes=5000)
    assert backend.get("a") == value("a", 5000)
    assert backend.stats()["objects"] == 1


def test_storing_what_is_stored_writes_nothing(open_file: OpenFile) -> None:
    backend = open_file()
    assert put(backend, "a", "a") == 2
    before = backend.stats()
    assert put(backend, "a") == 1
    assert backend.stats()["held_nbytes"] == before["held_nbytes"]
    assert backend.stats()["objects"] == 1


def test_a_value_may_be_reused_as_soon_as_set_returns(open_file: OpenFile) -> None:
    backend, data = open_file(), bytearray(b"abc")
    backend.set("k", data)
    data[:] = b"xyz"
    assert backend.get("k") == b"abc"


def test_keys_may_have_every_legal_byte_and_200_characters(open_file: OpenFile) -> None:
    backend = open_file()
    legal = "0123456789abcdefghijklmnopqrstuvwxyz/"
    keys = [*legal, legal, "k" * 200]
    assert put(backend, *keys) == len(keys)
    assert held(backend) == sorted(keys)
    for key in ("", "k" * 201):
        with pytest.raises(ValueError, match="200 characters"):
            backend.set(key, b"x")


def test_delete_and_clear_remove_what_they_name(open_file: OpenFile) -> None:
    backend = open_file()
    put(backend, "a/1", "a/2", "b/1", "b/2", "c")
    backend.delete(["a/1", "absent"])
    assert backend.clear("b/") == 2
    assert held(backend) == ["a/2", "c"]
    assert not backend.exists("b/1")
    assert backend.clear("") == 2
    assert held(backend) == []


def test_freed_space_is_written_again_before_new_space(open_file: OpenFile) -> None:
    backend = open_file()
    put(backend, "a", "b")
    before = backend.stats()["held_nbytes"]
    backend.delete(["a"])
    put(backend, "c")
    assert backend.stats()["held_nbytes"] == before
    assert held(backend) == ["b", "c"]


def test_the_least_recently_used_objects_make_room(open_file: OpenFile, advance: Advance) -> None:
    backend = open_file(max_nbytes=3 * BLOCK_NBYTES)
    for key in ("a", "b", "c"):
        advance(1)
        put(backend, key)
    advance(1)
    backend.get("a")
    put(backend, "d")
    assert held(backend) == ["a", "c", "d"]
    stats = backend.stats()
    assert stats["held_nbytes"] <= stats["max_nbytes"] == 3 * BLOCK_NBYTES
    assert stats["evicted_objects"] == 1


def test_storing_an_object_again_counts_as_use(open_file: OpenFile, advance: Advance) -> None:
    backend = open_file(max_nbytes=2 * BLOCK_NBYTES)
    for key in ("a", "b", "a", "c"):
        advance(1)
        put(backend, key)
    assert held(backend) == ["a", "c"]


def test_of_a_chain_the_last_page_goes_first(open_file: OpenFile) -> None:
    backend = open_file(max_nbytes=3 * BLOCK_NBYTES)
    put(backend, "a", "b", "c")
    put(backend, "d")
    assert held(backend) == ["a", "b", "d"]


def test_a_batch_above_the_cap_stores_its_leading_pages(open_file: OpenFile) -> None:
    backend = open_file(max_nbytes=3 * BLOCK_NBYTES)
    assert put(backend, "a", "b", "c", "d", "e") == 3
    assert held(backend) == ["a", "b", "c"]
    assert put(backend, "a", "x", "y", "z") == 3
    assert held(backend) == ["a", "x", "y"]
    assert backend.stats()["dropped_writes"] == 3


def test_an_object_above_the_cap_is_dropped_and_evicts_nothing(open_file: OpenFile) -> None:
    backend = open_file(max_nbytes=3 * BLOCK_NBYTES)
    put(backend, "a", "b", "c")
    with pytest.raises(BackendFull, match="no room"):
        backend.set("d", bytes(3 * BLOCK_NBYTES))
    assert held(backend) == ["a", "b", "c"]


@pytest.mark.parametrize("old_nbytes", [10, 9000])
def test_space_of_another_size_is_given_back_to_the_disk(
    open_file: OpenFile, tmp_path: Path, old_nbytes: int
) -> None:
    cap = 12 * BLOCK_NBYTES
    backend = open_file(max_nbytes=cap)
    for n in range(30):
        put(backend, f"old{n}", nbytes=old_nbytes)
    for n in range(30):
        assert put(backend, f"new{n}", nbytes=5000) == 1
    stats = backend.stats()
    assert stats["held_nbytes"] <= cap
    assert "new29" in held(backend)
    assert not any(key.startswith("old") for key in backend.list_keys(""))
    files = list((tmp_path / "store" / "segments").iterdir())
    on_disk = sum(file.stat().st_blocks * 512 for file in files)
    assert on_disk <= cap + BLOCK_NBYTES * len(files)


def test_a_smaller_cap_takes_effect_at_the_next_start(
    open_file: OpenFile, advance: Advance
) -> None:
    backend = open_file()
    for key in ("a", "b", "c", "d"):
        advance(1)
        put(backend, key)
    backend.close()
    backend = open_file(max_nbytes=2 * BLOCK_NBYTES)
    assert held(backend) == ["c", "d"]
    assert backend.stats()["held_nbytes"] == 2 * BLOCK_NBYTES


def test_the_order_of_use_survives_a_restart(open_file: OpenFile, advance: Advance) -> None:
    backend = open_file(max_nbytes=3 * BLOCK_NBYTES)
    for key in ("a", "b", "c"):
        advance(1)
        put(backend, key)
    advance(1)
    backend.get("a")
    backend.close()
    backend = open_file(max_nbytes=3 * BLOCK_NBYTES)
    put(backend, "d")
    assert held(backend) == ["a", "c", "d"]


def test_an_object_older_than_its_ttl_is_gone(open_file: OpenFile, advance: Advance) -> None:
    backend = open_file(ttl_s=10, max_nbytes=2 * BLOCK_NBYTES)
    put(backend, "a")
    advance(9)
    put(backend, "b")
    backend.get("a")
    assert held(backend) == ["a", "b"]
    advance(1)
    assert not backend.exists("a")
    assert backend.get("a") is None
    assert held(backend) == ["b"]
    put(backend, "c")
    assert held(backend) == ["b", "c"], "what is too old goes before what was not used for long"
    assert backend.stats()["expired_objects"] == 1


def test_an_object_past_its_ttl_can_be_stored_anew(open_file: OpenFile, advance: Advance) -> None:
    backend = open_file(ttl_s=10)
    put(backend, "a")
    advance(10)
    assert put(backend, "a") == 1
    advance(9)
    assert backend.exists("a")


def test_a_reader_of_a_deleted_object_gets_it_whole_or_not_at_all(open_file: OpenFile) -> None:
    backend = open_file(max_nbytes=4 * capacity_for(200_000))
    other = open_file(max_nbytes=4 * capacity_for(200_000))
    stop = threading.Event()

    def churn() -> None:
        n = 0
        while not stop.is_set():
            put(other, *(f"k{(n + i) % 10}" for i in range(3)), nbytes=200_000)
            other.delete([f"k{n % 10}"])
            n += 1

    thread = threading.Thread(target=churn)
    thread.start()
    n_read = 0
    try:
        deadline = time.monotonic() + 20
        for n in itertools.count():
            found = backend.get(f"k{n % 10}")
            if found is not None:
                n_read += 1
                assert bytes(found) == value(f"k{n % 10}", 200_000)
            if (n > 600 and n_read > 20) or time.monotonic() > deadline:
                break
    finally:
        stop.set()
        thread.join()
    assert n_read > 20


def test_bytes_that_were_overwritten_while_they_were_read_are_a_miss(
    open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record's own marks may look right though the middle is another's: the index decides."""
    backend, other = open_file(), open_file()
    put(backend, "a")
    read = RecordStore.read

    def torn_read(self: RecordStore, key: str, page: Any, extent: Extent) -> bool:
        assert read(self, key, page, extent)
        other.delete(["a"])
        put(other, "b")  # takes the extent that became free
        page[0][10:20] = b"not from a"
        return True

    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "read", torn_read)
        assert backend.batch_get(["a"], [views(bytes(NBYTES))]) == 0
    assert backend.stats()["raced_reads"] == 1
    assert backend.stats()["damaged_records"] == 0
    assert held(backend) == ["b"]


def test_backends_on_one_directory_see_each_other_at_once(open_file: OpenFile) -> None:
    one, two = open_file(), open_file()
    put(one, "a")
    assert held(two) == ["a"]
    two.delete(["a"])
    assert not one.exists("a")
    put(two, "b", nbytes=9000)
    assert one.get("b") == value("b", 9000)
    one.close()
    assert held(two) == ["b"]


def test_what_another_backend_evicted_is_a_miss(open_file: OpenFile) -> None:
    cap = 2 * BLOCK_NBYTES
    one, two = open_file(max_nbytes=cap), open_file(max_nbytes=cap)
    put(one, "a", "b")
    assert held(two) == ["a", "b"]
    put(one, "c", nbytes=5000)
    assert held(two) == ["c"]
    assert not two.exists("a")
    assert two.stats()["used_nbytes"] == 5000


def test_a_call_after_close_is_an_error(open_file: OpenFile) -> None:
    backend = open_file()
    backend.close()
    backend.close()
    for call in (
        lambda: backend.get("k"),
        lambda: backend.set("k", b"x"),
        lambda: backend.batch_exists(["k"]),
        lambda: backend.delete(["k"]),
        lambda: list(backend.list_keys("")),
        backend.stats,
    ):
        with pytest.raises(UseAfterClose, match="not open"):
            call()


def test_a_forked_child_must_open_its_own(
    open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_file()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(UseAfterClose, match="open another one in this process"):
        backend.get("k")
    monkeypatch.undo()


def test_close_leaves_no_descriptor_thread_or_owner(open_file: OpenFile, tmp_path: Path) -> None:
    open_file().close()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for n in range(5):
        backend = open_file(io_threads=2)
        put(backend, *(f"{n}k{i}" for i in range(4)), nbytes=1 << 20)
        backend.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert os.listdir(tmp_path / "store" / "owners") == []


def test_the_directory_is_made_but_not_its_parent(tmp_path: Path, open_file: OpenFile) -> None:
    open_file(path=tmp_path / "new")
    with pytest.raises(BackendUnavailable, match="create the parent directory"):
        open_file(path=tmp_path / "no" / "parent")


def test_a_path_that_is_a_file_is_an_error_at_open(tmp_path: Path, open_file: OpenFile) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(BackendUnavailable, match="use the path of a directory"):
        open_file(path=tmp_path / "file")
    with pytest.raises(BackendUnavailable, match="use the path of a directory"):
        open_file(path=tmp_path / "file" / "store")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_directory_without_write_access_is_an_error_at_open(
    tmp_path: Path, open_file: OpenFile
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; see the read-only mount in test_file_processes.py")
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(BackendDenied, match="write access"):
        open_file()


def test_a_lock_that_another_process_holds_is_a_timeout_for_writers_and_nothing_for_readers(
    open_file: OpenFile, tmp_path: Path
) -> None:
    backend = open_file(lock_timeout_s=0.05)
    put(backend, "a")
    other = sqlite3.connect(tmp_path / "store" / "index.sqlite", isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BackendTimeout, match="lock"):
            put(backend, "b")
        assert held(backend) == ["a"]
    finally:
        other.close()
    assert put(backend, "b") == 1
    assert held(backend) == ["a", "b"]
    backend.check_integrity()


def test_an_open_that_another_process_never_ends_is_a_timeout(
    open_file: OpenFile, tmp_path: Path
) -> None:
    open_file().close()
    with (tmp_path / "store" / "open.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BackendTimeout, match=r"open\.lock"):
            open_file(lock_timeout_s=0.05)
    assert open_file().stats()["objects"] == 0


def test_many_threads_may_call_one_backend_at_once(open_file: OpenFile) -> None:
    nbytes = 60_000
    backend = open_file(max_nbytes=12 * capacity_for(nbytes), io_threads=2)
    values = {f"k{n}": value(f"k{n}", nbytes) for n in range(30)}
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                keys = rng.sample(sorted(values), 5)
                if rng.random() < 0.5:
                    put(backend, *keys, nbytes=nbytes)
                else:
                    pages = [views(bytes(nbytes)) for _ in keys]
                    n_read = backend.batch_get(keys, pages)
                    for key, page in zip(keys[:n_read], pages, strict=False):
                        assert bytes(page[0]) == values[key]
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    backend.check_integrity()
    assert backend.stats()["evicted_objects"] > 0


def test_close_waits_for_calls_of_other_threads(
    open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_file(io_threads=1)
    writing, go_on = threading.Event(), threading.Event()
    write = RecordStore.write

    def slow_write(self: RecordStore, *args: Any) -> None:
        writing.set()
        assert go_on.wait(20)
        write(self, *args)

    monkeypatch.setattr(RecordStore, "write", slow_write)
    stored: list[int] = []
    writer = threading.Thread(target=lambda: stored.append(put(backend, "a")))
    writer.start()
    assert writing.wait(20)
    closer = threading.Thread(target=backend.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive(), "extents that a thread still writes to must stay claimed"
    go_on.set()
    closer.join(20)
    writer.join(20)
    assert stored == [1]
    monkeypatch.undo()
    assert held(open_file()) == ["a"]


def test_settings_are_checked() -> None:
    config = FileConfig.model_validate({"path": "/x", "max_nbytes": "20GB", "ttl_s": 60})
    assert config.max_nbytes == 20 * 10**9
    for wrong in ({}, {"path": "/x", "max_nbytes": "many"}, {"path": "/x", "size": 1}):
        with pytest.raises(ValidationError):
            FileConfig.model_validate(wrong)


def test_without_a_cap_it_leaves_a_tenth_of_the_disk(open_file: OpenFile, tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize
    assert 0.8 * free < open_file().stats()["max_nbytes"] < 0.95 * free


def test_it_can_do_what_it_says(open_file: OpenFile, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        backend = open_file(max_nbytes=BLOCK_NBYTES)
        for capability in (Listable, Clearable, HasStats, Diagnosable):
            assert isinstance(backend, capability)
        assert {finding.level for finding in backend.diagnose()} == {"ok"}
    assert caplog.text == "", "an ordinary start is quiet"
    too_much = open_file(max_nbytes="900TB")
    assert "warning" in {finding.level for finding in too_much.diagnose()}


def test_fsync_is_obeyed_and_the_objects_are_there(open_file: OpenFile) -> None:
    backend = open_file(fsync=True)
    assert put(backend, "a", "b") == 2
    assert held(backend) == ["a", "b"]


def test_a_constructed_backend_touches_no_disk(tmp_path: Path) -> None:
    FileBackend(FileConfig(path=tmp_path / "store"), BackendContext(namespace="0" * 16))
    assert list(tmp_path.iterdir()) == []
