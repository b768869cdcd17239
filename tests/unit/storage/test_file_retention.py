"""Quota and pins of the file backend among processes, restarts and older directories."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from hicache_core.errors import BackendUnavailable
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.records import BLOCK_NBYTES
from tests.unit.storage.test_file import put
from tests.unit.storage.test_file_processes import PREAMBLE, output_of, start

OpenFile = Callable[..., FileBackend]
Advance = Callable[[float], None]
QUOTA = 12 * 5000

# Each process stores in a namespace of its own and in one that all share, and reads what it finds.
CONTENDER = (
    PREAMBLE
    + f"""
path, own, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
backend = opened(path, namespace_quota_nbytes={QUOTA}, max_nbytes="64MB")
end, n = time.monotonic() + seconds, 0
while time.monotonic() < end:
    keys = [f"{{space}}/{{own}}{{n}}{{i}}" for space in (own, "shared") for i in range(2)]
    assert backend.batch_set(keys, [page(value(key, 5000)) for key in keys]) == 4
    for key in keys:
        found = backend.get(key)
        assert found is None or bytes(found) == value(key, 5000), key
    assert backend.batch_exists(keys[:2]) == 2, "another process evicted what is not its own"
    n += 1
    assert all(nbytes <= {QUOTA} for nbytes in backend.usage().values()), backend.usage()
backend.check_integrity()
backend.close()
print(n)
"""
)

# Forks writers that store at their quota, and kills them at random moments.
KILLER = (
    PREAMBLE
    + f"""
path, n_kills = sys.argv[1], int(sys.argv[2])
settings = {{"namespace_quota_nbytes": {QUOTA}, "max_nbytes": "64MB"}}

def write_for_ever(run):
    backend, n = opened(path, **settings), 0
    while True:
        keys = [f"{{space}}/{{run}}x{{n}}{{i}}" for space in "ab" for i in range(3)]
        backend.batch_set(keys, [page(value(key, 5000)) for key in keys])
        if n % 20 == 0:  # seldom, so that unpinned objects are left to go first
            backend.pin(keys[:1], 0.01)
        n += 1

backend = opened(path, **settings)
pinned = ["a/pinned", "b/pinned"]
backend.batch_set(pinned, [page(value(key, 5000)) for key in pinned])
assert backend.pin(pinned, 3600) == 2
backend.close()
for run in range(n_kills):
    pid = os.fork()
    if pid == 0:
        write_for_ever(run)
    time.sleep(random.Random(run).uniform(0.02, 0.15))
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the writer ended by itself"
    backend = opened(path, **settings)
    backend.check_integrity()
    assert max(backend.usage().values()) <= {QUOTA}, backend.usage()
    keys = list(backend.list_keys(""))
    assert set(pinned) <= set(keys)
    for key in keys:
        assert bytes(backend.get(key)) == value(key, 5000), key
    backend.close()
print(len(keys))
"""
)


def test_a_killed_writer_leaves_the_quota_kept_and_the_pins_in_place(tmp_path: Path) -> None:
    n_left = int(output_of(start(KILLER, tmp_path / "store", 15)))
    # Both were full, but for the three each that had to go for objects that were never written.
    assert 2 * (12 - 3) <= n_left <= 2 * 12


def test_processes_keep_a_namespace_within_its_quota_together(
    tmp_path: Path, open_file: OpenFile
) -> None:
    backend = open_file(namespace_quota_nbytes=QUOTA, max_nbytes="64MB")
    put(backend, "quiet/1", "shared/pinned", nbytes=5000)
    assert backend.pin(["shared/pinned"], 1e12) == 1  # their clock is far ahead
    contenders = [start(CONTENDER, tmp_path / "store", own, 1.0) for own in ("p", "q")]
    n_rounds = [int(output_of(contender)) for contender in contenders]
    assert min(n_rounds) > 6, "both went over their quota"
    usage = backend.usage()
    assert usage.keys() == {"quiet", "shared", "p", "q"}
    assert max(usage.values()) <= QUOTA
    assert backend.exists("quiet/1")
    assert backend.exists("shared/pinned"), "the pin of one process holds for all"
    backend.check_integrity()


def test_a_pin_holds_for_every_backend_and_after_a_restart(
    open_file: OpenFile, advance: Advance
) -> None:
    first, second = open_file(max_nbytes=3 * BLOCK_NBYTES), open_file(max_nbytes=3 * BLOCK_NBYTES)
    put(first, "a")
    advance(1)
    assert first.pin(["a"], 100.0) == 1
    for key in ("b", "c", "d"):
        put(second, key)
    assert first.exists("a")
    first.close()
    second.close()
    again = open_file(max_nbytes=3 * BLOCK_NBYTES)
    for key in ("e", "f", "g"):
        put(again, key)
    assert again.exists("a")
    advance(100)
    for key in ("h", "i", "j"):
        put(again, key)
    assert not again.exists("a")


def test_a_pin_goes_with_its_object(open_file: OpenFile, advance: Advance) -> None:
    backend = open_file(max_nbytes=2 * BLOCK_NBYTES)
    put(backend, "a")
    backend.pin(["a"], 100.0)
    backend.delete(["a"])
    put(backend, "b")  # lies where the pinned one lay
    advance(1)
    put(backend, "c")
    advance(1)
    put(backend, "d")
    assert sorted(backend.list_keys("")) == ["c", "d"]


def test_a_smaller_cap_at_the_next_start_spares_what_is_pinned(
    open_file: OpenFile, advance: Advance
) -> None:
    backend = open_file()
    for key in ("a", "b", "c"):
        put(backend, key)
        advance(1)
    backend.pin(["a"], 100.0)
    backend.close()
    assert list(open_file(max_nbytes=BLOCK_NBYTES).list_keys("")) == ["a"]


def test_a_quota_takes_effect_at_the_next_start(open_file: OpenFile, advance: Advance) -> None:
    backend = open_file()
    for n in range(4):
        put(backend, f"a/{n}", f"b/{n}")
        advance(1)
    backend.close()
    backend = open_file(namespace_quota_nbytes=250)
    assert sorted(backend.list_keys("")) == ["a/2", "a/3", "b/2", "b/3"]
    assert backend.stats()["evicted_objects"] == 4


def test_a_batch_above_the_quota_stores_its_leading_pages(open_file: OpenFile) -> None:
    backend = open_file(namespace_quota_nbytes=250)
    keys = [f"a/{n}" for n in range(4)]
    assert put(backend, *keys) == 2
    assert put(backend, *keys) == 2, "what is stored already takes its room"
    assert put(backend, "b/0", *keys) == 3
    assert sorted(backend.list_keys("")) == ["a/0", "a/1", "b/0"]


def test_a_full_store_evicts_in_the_namespace_that_is_over_its_quota(
    open_file: OpenFile, advance: Advance
) -> None:
    """The others' objects stay, though they were used less recently and the disk is full."""
    backend = open_file(namespace_quota_nbytes=300, max_nbytes=6 * BLOCK_NBYTES)
    put(backend, "a/0", "a/1", "a/2")
    for n in range(9):
        advance(1)
        put(backend, f"b/{n}")
    advance(1)
    put(backend, "b/x", "b/y", "b/z")
    assert sorted(backend.list_keys("")) == ["a/0", "a/1", "a/2", "b/x", "b/y", "b/z"]


def test_a_directory_of_the_version_before_is_taken_over_with_all_objects(
    open_file: OpenFile, tmp_path: Path
) -> None:
    backend = open_file()
    put(backend, "a", "b")
    backend.close()
    index = sqlite3.connect(tmp_path / "store" / "index.sqlite", isolation_level=None)
    index.execute("ALTER TABLE extents DROP COLUMN pinned_until")
    index.execute("PRAGMA user_version = 1")
    index.close()
    backend = open_file()
    assert sorted(backend.list_keys("")) == ["a", "b"]
    assert backend.pin(["a"], 10.0) == 1
    assert {finding.topic for finding in backend.diagnose()} >= {"directory"}
    assert not [finding for finding in backend.diagnose() if finding.topic == "index"]
    backend.check_integrity()
    backend.close()
    assert sorted(open_file().list_keys("")) == ["a", "b"]


def test_a_directory_of_a_later_version_is_an_error_and_stays_as_it_is(
    open_file: OpenFile, tmp_path: Path
) -> None:
    open_file().close()
    index = sqlite3.connect(tmp_path / "store" / "index.sqlite", isolation_level=None)
    index.execute("PRAGMA user_version = 3")
    index.execute("UPDATE counters SET value = 3 WHERE name = 'format'")
    with pytest.raises(BackendUnavailable, match="version 3; expected"):
        open_file()
    assert index.execute("PRAGMA user_version").fetchone() == (3,)
    index.close()


def test_a_rebuilt_index_forgets_pins_and_keeps_objects(
    open_file: OpenFile, tmp_path: Path
) -> None:
    backend = open_file()
    put(backend, "a/1", "b/1")
    backend.pin(["a/1"], 100.0)
    backend.close()
    (tmp_path / "store" / "index.sqlite").unlink()
    backend = open_file()
    assert backend.usage() == {"a": 100, "b": 100}
    backend.check_integrity()


def test_what_is_past_its_ttl_counts_until_its_space_is_needed(
    open_file: OpenFile, advance: Advance
) -> None:
    backend = open_file(ttl_s=10, max_nbytes=2 * BLOCK_NBYTES)
    put(backend, "a/1", "a/2")
    advance(10)
    assert not backend.exists("a/1")
    assert backend.usage() == {"a": 200}
    put(backend, "b/1")
    assert backend.usage() == {"b": 100}
    assert backend.stats()["expired_objects"] == 2


def test_a_namespace_that_has_expired_has_room_for_its_whole_quota(
    open_file: OpenFile, advance: Advance
) -> None:
    backend = open_file(ttl_s=10, namespace_quota_nbytes=300)
    for _ in range(3):
        assert put(backend, "a/1", "a/2", "a/3") == 3
        assert backend.batch_exists(["a/1", "a/2", "a/3"]) == 3
        advance(10)
    backend.check_integrity()
