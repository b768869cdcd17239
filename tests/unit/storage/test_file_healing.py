"""A file store whose index or files were damaged or removed comes back by itself."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hicache_core.errors import BackendCorrupt, BackendError, BackendUnavailable
from hicache_core.storage.calls import CHECK_INTERVAL_S
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.file.late_check import LateCheck
from hicache_core.types import BackendContext

OpenFile = Callable[..., FileBackend]
KEYS = [f"{'0' * 16}/{n:064x}" for n in range(40)]


def value(key: str) -> bytes:
    return random.Random(key).randbytes(5000)


def fill(backend: FileBackend, keys: list[str] = KEYS) -> None:
    for key in keys:
        backend.set(key, value(key))


def found(backend: FileBackend) -> int:
    """How many objects are there; wrong bytes are a failure."""
    values = {key: backend.get(key) for key in KEYS}
    assert all(got is None or got == value(key) for key, got in values.items())
    return sum(got is not None for got in values.values())


def expect_whole(backend: FileBackend) -> None:
    """Everything can be stored and is found."""
    fill(backend)
    assert found(backend) == len(KEYS)
    backend.check_integrity()


def index_of(tmp_path: Path) -> Path:
    return tmp_path / "store" / "index.sqlite"


def copy_of_open_store(tmp_path: Path) -> Path:
    """The files as a killed process leaves them, with much of the index still in its log."""
    store, left = tmp_path / "store", tmp_path / "left"
    config = FileConfig(path=store)
    backend = FileBackend(config, BackendContext(namespace="0" * 16))
    backend.open()
    fill(backend)
    shutil.copytree(store, left)
    backend.close()
    shutil.rmtree(store)
    left.rename(store)
    return store


def damage(rng: random.Random, file: Path) -> None:
    """Spoils some bytes of ``file``, or cuts it."""
    data = bytearray(file.read_bytes())
    match rng.randrange(4):
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:  # among the first, where the header is and the schema
            data[rng.randrange(min(200, len(data)))] = rng.randrange(256)
        case 2:
            for _ in range(20):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case _:
            start = rng.randrange(0, len(data), 4096)
            if rng.random() < 0.5:
                del data[start:]
            else:
                data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    file.write_bytes(data)


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_to_the_index_heals_at_the_next_open(
    open_file: OpenFile, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    if seed % 2:
        store = copy_of_open_store(tmp_path)
        damage(rng, store / rng.choice(["index.sqlite", "index.sqlite-wal"]))
    else:
        backend = open_file()
        fill(backend)
        backend.close()
        damage(rng, index_of(tmp_path))
    backend = open_file()
    found(backend)
    expect_whole(backend)
    backend.close()
    assert found(open_file()) == len(KEYS)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (KEYS[7].encode(), KEYS[7].encode()[:40] + b"\xb0" + KEYS[7].encode()[41:]),
        (b"CREATE INDEX by_owner", b"CREATE I\xeeDEX by_owner"),
        (b"capacity INTEGER", b"capacitz INTEGER"),
    ],
    ids=["key", "schema", "column"],
)
def test_one_byte_that_sqlite_does_not_miss_heals_too(
    open_file: OpenFile, tmp_path: Path, old: bytes, new: bytes
) -> None:
    backend = open_file()
    fill(backend)
    backend.close()
    data = index_of(tmp_path).read_bytes()
    assert old in data
    index_of(tmp_path).write_bytes(data.replace(old, new))
    backend = open_file()
    assert found(backend) == len(KEYS), "the segments have all of it"
    assert [f.level for f in backend.diagnose() if f.topic == "index"] == ["warning"]
    expect_whole(backend)


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE extents SET offset = offset + 4096 WHERE extent_id = 2",
        "UPDATE extents SET capacity = 'x' WHERE extent_id = 2",
        "UPDATE extents SET nbytes = 99999 WHERE extent_id = 2",
        "UPDATE extents SET segment = 77 WHERE extent_id = 2",
        "UPDATE extents SET key = x'ff' WHERE extent_id = 2",
        "UPDATE extents SET seq = 1 << 40 WHERE extent_id = 2",
        "UPDATE extents SET owner = 99 WHERE extent_id = 2",
        "UPDATE counters SET value = 'x' WHERE name = 'seq'",
        "UPDATE counters SET value = 7 WHERE name = 'held'",
        "UPDATE counters SET value = -1 WHERE name = 'epoch'",
        "DELETE FROM counters WHERE name = 'owner'",
        "UPDATE segments SET end = 5",
        "UPDATE segments SET segment = segment + 100",
        "PRAGMA user_version = 77",
        "PRAGMA application_id = 1",
    ],
)
def test_rows_that_cannot_be_are_damage(open_file: OpenFile, tmp_path: Path, sql: str) -> None:
    backend = open_file()
    fill(backend)
    backend.close()
    connection = sqlite3.connect(index_of(tmp_path), isolation_level=None)
    connection.execute(sql)
    connection.close()
    backend = open_file()
    assert found(backend) == len(KEYS)
    assert [f.level for f in backend.diagnose() if f.topic == "index"] == ["warning"]
    expect_whole(backend)


@pytest.mark.parametrize(
    "change", ["key = x'ff'", "nbytes = 'many'", "capacity = NULL", "nbytes = -1"]
)
def test_damage_that_is_met_while_running_heals_while_running(
    open_file: OpenFile, tmp_path: Path, change: str
) -> None:
    backend, other = open_file(), open_file()
    fill(backend)
    assert found(other) == len(KEYS)
    connection = sqlite3.connect(index_of(tmp_path), isolation_level=None)
    if "NULL" in change:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = replace(sql, 'capacity INTEGER NOT NULL', 'capacity')"
        )
        connection.close()
        connection = sqlite3.connect(index_of(tmp_path), isolation_level=None)
    connection.execute(f"UPDATE extents SET {change}, seq = seq + 1000 WHERE key = ?", KEYS[:1])
    connection.close()
    with pytest.raises(BackendCorrupt):
        backend.get(KEYS[1])
    time.sleep(CHECK_INTERVAL_S)  # until the other one looks again
    heal(backend, other)
    for one in (backend, other):
        expect_whole(one)


def late_check(backend: FileBackend) -> LateCheck | None:
    with backend._calls.call() as store:
        return store.index._late_check


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE extents SET offset = offset + 4096 WHERE extent_id = 2",
        "UPDATE extents SET owner = 99, key = NULL WHERE extent_id = 2",
        "UPDATE counters SET value = 7 WHERE name = 'held'",
        "UPDATE extents SET seq = 1 << 40 WHERE extent_id = 2",
    ],
)
def test_a_large_index_is_checked_while_it_is_used_and_heals_then(
    open_file: OpenFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sql: str
) -> None:
    backend = open_file()
    fill(backend)
    backend.close()
    monkeypatch.setattr("hicache_core.storage.file.index.CHECKED_AT_ONCE_NBYTES", 0)
    backend = open_file()
    sound = late_check(backend)
    assert sound is not None
    sound.join()
    assert found(backend) == len(KEYS)
    assert backend_findings(backend) == "", "there is nothing wrong with it"
    backend.close()
    connection = sqlite3.connect(index_of(tmp_path), isolation_level=None)
    connection.execute(sql)
    connection.close()
    backend = open_file()
    deadline, findings = time.monotonic() + 20, ""
    while "rebuilt" not in findings:
        assert time.monotonic() < deadline, "nobody has found it"
        with contextlib.suppress(BackendError):
            findings = backend_findings(backend)
    heal(backend)
    assert found(backend) == len(KEYS)
    expect_whole(backend)


def test_closing_breaks_the_check_of_a_large_index_off(
    open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file().close()
    monkeypatch.setattr("hicache_core.storage.file.index.CHECKED_AT_ONCE_NBYTES", 0)
    begun = threading.Event()

    def check(_: object, connection: sqlite3.Connection, *, whole: bool = True) -> None:
        if whole:
            begun.set()
            numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
            connection.execute(f"{numbers} SELECT count(*) FROM n").fetchone()  # without end

    monkeypatch.setattr("hicache_core.storage.sqlite.Database.check", check)
    backend = open_file()
    assert begun.wait(10)
    backend.set(KEYS[0], value(KEYS[0]))
    assert backend.exists(KEYS[0])
    backend.close()
    assert "hicache-file-check" not in {thread.name for thread in threading.enumerate()}


def heal(*backends: FileBackend) -> None:
    """Calls each until it answers again, as servers do."""
    deadline = time.monotonic() + 20
    healthy: set[int] = set()
    while len(healthy) < len(backends):
        assert time.monotonic() < deadline, "it does not come back"
        for n, backend in enumerate(backends):
            healthy.discard(n)
            with contextlib.suppress(BackendError):
                backend.set(KEYS[0], value(KEYS[0]))
                assert backend.exists(KEYS[0])
                healthy.add(n)


def backend_findings(backend: FileBackend) -> str:
    return " ".join(finding.message for finding in backend.diagnose() if finding.level != "ok")


@pytest.mark.parametrize("remade", [False, True])
def test_a_directory_that_is_removed_while_in_use_is_noticed_and_made_anew(
    open_file: OpenFile, tmp_path: Path, *, remade: bool
) -> None:
    backend = open_file()
    fill(backend)
    shutil.rmtree(tmp_path / "store")
    if remade:
        fill(open_file(), KEYS[:3])
    with pytest.raises(BackendUnavailable, match="removed or replaced while in use"):
        backend.set("new", b"x")
    backend.set(KEYS[5], value(KEYS[5]))
    other = open_file()
    assert other.get(KEYS[5]) == value(KEYS[5]), "others find what is stored from now on"
    assert "removed" in backend_findings(backend)
    for one in (backend, other):
        expect_whole(one)


def test_who_only_reads_notices_too(open_file: OpenFile, tmp_path: Path) -> None:
    backend = open_file()
    fill(backend)
    shutil.rmtree(tmp_path / "store")
    assert backend.get(KEYS[0]) in (None, value(KEYS[0]))
    time.sleep(CHECK_INTERVAL_S)
    assert not backend.exists(KEYS[0])
    assert (tmp_path / "store" / "index.sqlite").exists()


def test_where_the_directory_cannot_be_made_anew_each_call_says_so(
    open_file: OpenFile, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    backend = open_file(path=tmp_path / "disk" / "store")
    fill(backend)
    shutil.rmtree(tmp_path / "disk")
    for _ in range(3):
        with pytest.raises(BackendUnavailable):
            backend.set("new", b"x")
    (tmp_path / "disk").mkdir()
    expect_whole(backend)


def test_nothing_is_stored_in_a_segment_that_was_removed(
    open_file: OpenFile, tmp_path: Path
) -> None:
    backend = open_file()
    fill(backend)
    for file in (tmp_path / "store" / "segments").iterdir():
        file.unlink()
    backend.delete(KEYS)
    with pytest.raises(BackendUnavailable, match="segment"):
        backend.set(KEYS[0], value(KEYS[0]))
    expect_whole(backend)
    assert found(open_file()) == len(KEYS)


def test_a_lost_index_is_rebuilt_as_soon_as_all_who_use_it_have_noticed(
    open_file: OpenFile, tmp_path: Path
) -> None:
    backends = [open_file() for _ in range(3)]
    fill(backends[0])
    index_of(tmp_path).unlink()
    heal(*backends)
    for backend in backends:
        expect_whole(backend)


def test_who_only_looks_makes_no_store(tmp_path: Path) -> None:
    context = BackendContext(namespace="0" * 16, creates=False)
    for path in (tmp_path / "none", tmp_path):
        backend = FileBackend(FileConfig(path=path), context)
        with pytest.raises(BackendUnavailable, match="holds no store"):
            backend.open()
    assert list(tmp_path.iterdir()) == []
