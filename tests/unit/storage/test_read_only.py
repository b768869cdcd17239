"""``read_only``: what is stored can be read, and nothing in the store changes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from hicache_core.build.backends import backend_from, bare_backend
from hicache_core.build.settings_check import check_settings
from hicache_core.build.storage import Composed, composed
from hicache_core.config.settings import HiCacheConfig
from hicache_core.errors import (
    BackendCorrupt,
    BackendDenied,
    BackendUnavailable,
    ConfigError,
    UseAfterClose,
)
from hicache_core.observe.stores import backend_statuses
from hicache_core.storage.base import (
    Clearable,
    Flushable,
    Listable,
    NamespaceTotals,
    Pins,
    ReportsTotals,
    ReportsUsage,
    StorageBackend,
)
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.read_only import ReadOnlyBackend
from hicache_core.storage.sealed import SealedBackend
from hicache_core.storage.visiting import VisitsEachPage, VisitsPages
from hicache_core.testing.harness import required
from hicache_core.types import BackendContext
from tests.unit.storage.test_scrub import CONTEXT, NAMESPACES, flipped, key_of, sealed

READING = BackendContext(namespace="0" * 16, read_only=True)
NBYTES = 164
NOBODY = 65534
KEYS = [key_of(n) for n in range(6)]


def blank(n: int) -> list[list[memoryview]]:
    return [[memoryview(bytearray(64)), memoryview(bytearray(NBYTES - 64))] for _ in range(n)]


def bytes_of(pages: Sequence[Sequence[memoryview]]) -> list[bytes]:
    return [b"".join(page) for page in pages]


def put(backend: StorageBackend, *numbers: int) -> None:
    for n in numbers:
        backend.set(key_of(n), sealed(key_of(n)))


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[FileBackend]:
    """An open file store with pages 0, 1, 2 and 4."""
    with closing(FileBackend(FileConfig(path=tmp_path / "kv", io_threads=2), CONTEXT)) as backend:
        backend.open()
        put(backend, 0, 1, 2, 4)
        yield backend


def reader(path: Path, **settings: object) -> StorageBackend:
    """A reader of a file store, open."""
    backend = backend_from("file", {"path": path, **settings}, READING)
    backend.open()
    return backend


def in_folder(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below ``path``: its size, the time of its last change, and its bytes."""
    return {
        str(file.relative_to(path)): (
            file.stat().st_size,
            file.stat().st_mtime_ns,
            file.read_bytes() if file.suffix != ".seg" else b"",
        )
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def as_nobody() -> Iterator[Callable[[Path], None]]:
    """Takes the right to write a folder away from this process, also if it is root's."""

    def take(path: Path) -> None:
        for folder in (path, *path.rglob("*")):
            folder.chmod(0o555 if folder.is_dir() else 0o444)
        for parent in path.parents:
            if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o055)
        if os.geteuid() == 0:
            os.seteuid(NOBODY)

    yield take
    if os.getuid() == 0:
        os.seteuid(0)


def test_a_reader_reads_what_another_process_could_write_meanwhile(writer: FileBackend) -> None:
    with closing(reader(writer.config.path)) as backend:  # type: ignore[attr-defined]
        assert backend.batch_exists(KEYS) == 3
        assert list(backend.exists_each(KEYS)) == [True, True, True, False, True, False]
        pages = blank(6)
        assert backend.batch_get(KEYS, pages) == 3
        assert bytes_of(pages[:3]) == [bytes(sealed(key)) for key in KEYS[:3]]
        pages = blank(6)
        assert list(backend.get_each(KEYS, pages)) == [True, True, True, False, True, False]
        assert bytes_of(pages)[4] == bytes(sealed(KEYS[4]))
        assert backend.get(KEYS[1]) == sealed(KEYS[1])
        put(writer, 3)
        assert backend.batch_exists(KEYS) == 5, "what is stored is seen at once"
        writer.delete([KEYS[0]])
        assert backend.get(KEYS[0]) is None
        assert backend.batch_get(KEYS, blank(6)) == 0
        assert sorted(required(backend, Listable).list_keys(NAMESPACES[0])) == sorted(KEYS[1:5])


def test_a_reader_changes_no_file_of_the_store(writer: FileBackend, tmp_path: Path) -> None:
    writer.close()
    before = in_folder(tmp_path)
    with closing(reader(tmp_path / "kv")) as backend:
        assert backend.batch_get(KEYS, blank(6)) == 3
        assert len(list(required(backend, Listable).list_keys(""))) == 4
        assert required(backend, ReportsUsage).usage() == {NAMESPACES[0]: 4 * NBYTES}
    assert in_folder(tmp_path) == before


def test_a_store_in_a_folder_that_cannot_be_written_is_read(
    writer: FileBackend, tmp_path: Path, as_nobody: Callable[[Path], None]
) -> None:
    writer.close()
    as_nobody(tmp_path / "kv")
    with pytest.raises(BackendDenied):
        FileBackend(FileConfig(path=tmp_path / "kv"), CONTEXT).open()
    with closing(reader(tmp_path / "kv")) as backend:
        assert backend.batch_get(KEYS, blank(6)) == 3
        assert required(backend, ReportsUsage).usage() == {NAMESPACES[0]: 4 * NBYTES}


def test_a_store_in_use_is_read_without_any_right_to_write(
    writer: FileBackend, tmp_path: Path, as_nobody: Callable[[Path], None]
) -> None:
    assert (tmp_path / "kv" / "index.sqlite-wal").exists()
    as_nobody(tmp_path / "kv")
    with closing(reader(tmp_path / "kv")) as backend:
        assert backend.batch_get(KEYS, blank(6)) == 3


def test_a_process_that_begins_to_write_later_is_followed(tmp_path: Path) -> None:
    settings = FileConfig(path=tmp_path / "kv", io_threads=1)
    with closing(FileBackend(settings, CONTEXT)) as first:
        first.open()
        put(first, 0)
    with closing(reader(tmp_path / "kv")) as backend:
        assert backend.batch_exists(KEYS) == 1
        with closing(FileBackend(settings, CONTEXT)) as second:
            second.open()
            put(second, 1)
            until = time.monotonic() + 20
            while backend.batch_exists(KEYS) != 2:
                assert time.monotonic() < until
                time.sleep(0.05)
        assert backend.batch_get(KEYS, blank(6)) == 2


def test_totals_say_how_many_objects_of_which_age_a_namespace_has(tmp_path: Path) -> None:
    now = iter(float(n) for n in range(100, 1000, 10))
    config = FileConfig(path=tmp_path / "kv", io_threads=1)
    with closing(FileBackend(config, CONTEXT, clock=lambda: next(now))) as backend:
        backend.open()
        put(backend, 0, 1, 2)
        other = key_of(0, NAMESPACES[1])
        backend.set(other, sealed(other))
        told = backend.namespace_totals()
        with closing(reader(tmp_path / "kv")) as looking:
            assert required(looking, ReportsTotals).namespace_totals() == told
    assert sorted(told) == list(NAMESPACES)
    first = told[NAMESPACES[0]]
    assert (first.objects, first.nbytes) == (3, 3 * NBYTES)
    assert first.oldest is not None
    assert first.newest is not None
    assert first.oldest < first.newest
    second = told[NAMESPACES[1]]
    assert second == NamespaceTotals(1, NBYTES, second.oldest, second.oldest)


def test_a_long_list_is_read_in_parts_and_complete(tmp_path: Path) -> None:
    keys = sorted(key_of(n, NAMESPACES[n % 2]) for n in range(20_000))
    config = FileConfig(path=tmp_path / "kv", io_threads=1)
    with closing(FileBackend(config, CONTEXT)) as backend:
        backend.open()
        assert backend.batch_set(keys, [[memoryview(bytearray(1))]] * len(keys)) == len(keys)
        with closing(reader(tmp_path / "kv")) as looking:
            listed = required(looking, Listable).list_keys
            assert list(listed("")) == keys
            assert list(listed(f"{NAMESPACES[1]}/")) == [k for k in keys if k.startswith("b")]
            assert list(listed(keys[7])) == [keys[7]]
            begun = listed("")
            assert next(begun) == keys[0]
        with pytest.raises(UseAfterClose):
            list(begun)


def test_expired_objects_are_misses(writer: FileBackend) -> None:
    with closing(reader(writer.config.path, ttl_s=1e-9)) as backend:  # type: ignore[attr-defined]
        assert backend.batch_exists(KEYS) == 0
        assert backend.batch_get(KEYS, blank(6)) == 0
        assert list(required(backend, Listable).list_keys("")) == []


def test_where_no_store_is_a_reader_makes_none(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="holds no store of the file backend; check path"):
        reader(tmp_path / "typo")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_cannot_rebuild_an_index_and_says_who_can(
    writer: FileBackend, tmp_path: Path
) -> None:
    writer.close()
    index = tmp_path / "kv" / "index.sqlite"
    whole = index.read_bytes()
    index.unlink()
    with pytest.raises(BackendUnavailable, match="has no index; open it once for writing"):
        reader(tmp_path / "kv")
    index.write_bytes(b"no database, of some length" * 100)
    with pytest.raises(BackendCorrupt):
        reader(tmp_path / "kv")
    index.write_bytes(whole)
    with closing(reader(tmp_path / "kv")) as backend:
        assert backend.batch_exists(KEYS) == 3


def read_only(share: str, **settings: object) -> Composed:
    """A shared memory store behind seal and guard, which is only read."""
    return composed("memory", {"share": share, "read_only": True, **settings}, CONTEXT, time.time)


@pytest.fixture
def memory() -> Iterator[MemoryBackend]:
    """A memory store with pages 0, 1 and a damaged page 2, shared as ``here``."""
    with closing(MemoryBackend(MemoryConfig(share="here"), CONTEXT)) as backend:
        backend.open()
        put(backend, 0, 1)
        backend.set(KEYS[2], flipped(KEYS[2], NBYTES - 64, 80))
        yield backend


def test_nothing_is_stored_removed_or_pinned(memory: MemoryBackend) -> None:
    with closing(read_only("here").backend) as backend:
        backend.open()
        assert backend.batch_exists(KEYS) == 3
        assert backend.batch_get(KEYS, blank(6)) == 2
        assert list(backend.get_each(KEYS, blank(6))) == [True, True] + 4 * [False]
        assert memory.exists(KEYS[2]), "a damaged object is a miss, and stays"
        assert backend.batch_set(KEYS[3:], blank(3)) == 0
        assert list(backend.set_each(KEYS[3:], blank(3))) == [False] * 3
        for change in (lambda: backend.set(KEYS[3], b"x"), lambda: backend.delete(KEYS)):
            with pytest.raises(BackendDenied, match="'memory' is used read-only"):
                change()
        for kind in (Clearable, Pins, Flushable):
            assert backend.capability(kind) is None
        assert sorted(memory.list_keys("")) == sorted(KEYS[:3])


def test_refused_pages_do_not_open_the_breaker_and_the_status_says_read_only(
    memory: MemoryBackend,
) -> None:
    made = read_only("here", guard={"min_calls": 2, "window_s": 60.0})
    with closing(made.backend) as backend:
        backend.open()
        for _ in range(20):
            assert backend.batch_set(KEYS[3:], blank(3)) == 0
        (status,) = backend_statuses(made.guards)
        assert (status.breaker, status.read_only, status.stored_nbytes) == ("closed", True, 0)
        assert made.read_only
        assert memory.exists(KEYS[0])
    plain = composed("memory", {}, CONTEXT, time.time)
    assert [status.read_only for status in backend_statuses(plain.guards)] == [False]


def test_pages_are_visited_as_without_it(tmp_path: Path) -> None:
    file = backend_from("file", {"path": tmp_path}, READING)
    assert file.capability(VisitsPages) is not None
    assert file.capability(VisitsEachPage) is not None
    told = ReadOnlyBackend(MemoryBackend(MemoryConfig(), READING))
    assert told.capability(VisitsPages) is None
    assert SealedBackend(told).in_process


def test_a_link_of_a_chain_that_is_only_read_serves_and_takes_nothing(
    memory: MemoryBackend,
) -> None:
    links = [
        {"backend": "memory", "name": "own"},
        {"backend": "memory", "name": "theirs", "config": {"share": "here"}, "read_only": True},
    ]
    for write in ("through", "behind"):
        made = composed("chain", {"links": links, "write": write}, CONTEXT, time.time)
        assert not made.read_only
        with closing(made.backend) as backend:
            backend.open()
            assert backend.batch_get(KEYS, blank(6)) == 2
            assert backend.batch_set(KEYS[3:], blank(3)) == 3, "the other link has them"
            assert list(backend.set_each(KEYS[3:], blank(3))) == [True] * 3
            assert required(backend, Flushable).flush(10.0)
            assert list(backend.exists_each(KEYS[3:])) == [True] * 3
            backend.delete(KEYS)
            assert required(backend, Clearable).clear("") >= 0
        assert sorted(memory.list_keys("")) == sorted(KEYS[:3])


def test_a_chain_of_links_that_are_only_read_takes_nothing(memory: MemoryBackend) -> None:
    link = {"backend": "memory", "config": {"share": "here"}, "read_only": True}
    links = [link, {**link, "name": "again"}]
    made = composed("chain", {"links": links}, CONTEXT, time.time)
    assert made.read_only
    with closing(made.backend) as backend:
        backend.open()
        assert backend.batch_set(KEYS[3:], blank(3)) == 0
        assert list(backend.set_each(KEYS[3:], blank(3))) == [False] * 3
        with pytest.raises(BackendDenied, match="all links are read-only"):
            backend.set(KEYS[3], b"x")
        with pytest.raises(BackendDenied, match="nothing is removed"):
            backend.delete(KEYS)
        assert backend.batch_exists(KEYS) == 3
    bare = bare_backend("chain", {"links": links}, CONTEXT)
    assert bare.batch_set(KEYS[3:], blank(3)) == 0
    assert memory.exists(KEYS[0])


def test_the_setting_is_checked_with_the_others() -> None:
    settings = {"hicache_storage_backend": "memory"}
    extra = "hicache_storage_backend_extra_config"
    check_settings(HiCacheConfig.load(arguments={**settings, extra: {"read_only": True}}))
    with pytest.raises(ConfigError, match="read_only"):
        check_settings(HiCacheConfig.load(arguments={**settings, extra: {"read_only": "perhaps"}}))
