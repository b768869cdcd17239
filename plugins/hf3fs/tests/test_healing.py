"""A store whose index or slab was damaged or removed comes back; full and failing disks."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hicache_hf3fs.slab import Slab

from hicache_core.errors import BackendCorrupt, BackendDenied, BackendError, BackendUnavailable
from hicache_core.storage.scrub import scrub
from hicache_core.types import BackendContext
from plugins.hf3fs.tests.conftest import Open
from plugins.hf3fs.tests.helpers import blank, hits, key_of, new_backend, put

N = 40


def index_of(tmp_path: Path) -> Path:
    return tmp_path / "kv.index.sqlite"


def damage(rng: random.Random, file: Path) -> None:
    """Spoils some bytes of ``file``, or cuts it."""
    data = bytearray(file.read_bytes())
    match rng.randrange(3):
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            for _ in range(20):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case _:
            del data[rng.randrange(0, len(data), 4096) :]
    file.write_bytes(data)


@pytest.mark.parametrize("seed", range(30))
def test_random_damage_to_the_index_heals_at_the_next_open(
    opened: Open, tmp_path: Path, seed: int
) -> None:
    quota = {"namespace_quota_nbytes": "1GB"} if seed % 3 == 0 else {}
    backend = opened(**quota)
    assert put(backend, range(N)) == N
    backend.close()
    damage(random.Random(seed), index_of(tmp_path))
    backend = opened(**quota)
    for n in range(N):
        hits(backend, [n])  # whatever is there is right
    assert put(backend, range(N)) == N
    assert hits(backend, range(N)) == N
    backend.check_integrity()
    backend.close()
    assert hits(opened(**quota), range(N)) == N


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE slots SET nbytes = 'x' WHERE number = 2",
        "UPDATE slots SET nbytes = 1 << 40 WHERE number = 2",
        "UPDATE slots SET key = x'ff' WHERE number = 2",
        "UPDATE slots SET namespace = 'other' WHERE number = 2",
        "UPDATE slots SET generation = -1 WHERE number = 2",
        "UPDATE slots SET number = 1000000 WHERE number = 2",
        "UPDATE slots SET slab_id = 77 WHERE number = 2",
        "UPDATE slabs SET name = 'r0.4x96'",
        "UPDATE slabs SET fresh = fresh - 1",
        "PRAGMA application_id = 1",
    ],
)
def test_rows_that_cannot_be_are_damage(opened: Open, tmp_path: Path, sql: str) -> None:
    backend = opened()
    put(backend, range(N))
    backend.close()
    connection = sqlite3.connect(index_of(tmp_path), isolation_level=None)
    connection.execute(sql)
    connection.close()
    assert hits(opened(), range(N)) == N
    assert index_of(tmp_path).with_name("kv.index.sqlite.damaged").exists()


@pytest.mark.parametrize("change", ["nbytes = 'many'", "slab_id = 77"])
def test_damage_that_is_met_while_running_heals_while_running(
    opened: Open, tmp_path: Path, change: str
) -> None:
    backend, other = opened(), opened()
    put(backend, range(N))
    connection = sqlite3.connect(index_of(tmp_path), isolation_level=None)
    connection.execute(f"UPDATE slots SET {change} WHERE key = ?", (key_of(0),))
    connection.close()
    with pytest.raises(BackendCorrupt):
        hits(backend, range(N))
    heal(backend, other)
    for one in (backend, other):
        assert hits(one, range(N)) == N


def heal(*backends: object) -> None:
    """Calls each until it answers again, as servers do."""
    deadline, well = time.monotonic() + 20, 0
    while well < len(backends):
        assert time.monotonic() < deadline, "it does not come back"
        well = 0
        for backend in backends:
            with contextlib.suppress(BackendError):
                assert put(backend, ["again"]) == 1  # type: ignore[arg-type]
                well += 1


def test_a_slab_that_is_removed_while_in_use_is_noticed_and_made_anew(
    opened: Open, tmp_path: Path
) -> None:
    backend = opened()
    put(backend, range(4))
    for path in tmp_path.glob("kv*"):
        path.unlink()
    with pytest.raises(BackendUnavailable, match="removed"):
        put(backend, ["a"])
    assert put(backend, ["a"]) == 1
    assert hits(opened(), ["a"]) == 1
    assert any("removed" in f.message for f in backend.diagnose() if f.level == "warning")


def test_objects_of_ranks_that_run_no_more_survive_a_rebuild(opened: Open, tmp_path: Path) -> None:
    first = new_backend(tmp_path / "kv", rank=1)
    first.open()
    put(first, range(5))
    first.close()
    for path in tmp_path.glob("kv.index.sqlite*"):
        path.unlink()
    assert hits(opened(), range(5)) == 5


def test_what_lay_in_a_slab_that_is_gone_can_be_stored_again(opened: Open, tmp_path: Path) -> None:
    other = new_backend(tmp_path / "kv", rank=1)
    other.open()
    put(other, range(3))
    other.close()
    backend = opened()
    for path in tmp_path.glob("kv.r1.*.slab"):
        path.unlink()
    put(backend, ["here"])
    keys = [key_of(label) for label in (0, 1, "here", 2)]
    assert backend.get_each(keys, [blank((1000,)) for _ in keys]) == [False, False, True, False]
    assert backend.exists_each(keys) == [False, False, True, False], "they were unbound"
    assert put(backend, range(3)) == 3
    assert hits(backend, range(3)) == 3
    backend.check_integrity()


def test_who_only_looks_makes_no_slab_and_reads_any_size_of_slot(
    opened: Open, tmp_path: Path
) -> None:
    context = BackendContext("0" * 16, creates=False)
    looking = type(new_backend(tmp_path / "kv"))(new_backend(tmp_path / "kv").config, context)
    with pytest.raises(BackendUnavailable, match="has no slab"):
        looking.open()
    assert list(tmp_path.iterdir()) == []
    backend = opened()
    put(backend, range(5))
    before = sorted(tmp_path.glob("kv*.slab"))
    looking.open()
    assert sorted(looking.list_keys("")) == sorted(backend.list_keys(""))
    assert [checked.kind for checked in scrub(looking)] == ["unknown"] * 5
    with pytest.raises(BackendDenied, match="for reading only"):
        looking.set("a", b"x")
    looking.delete([key_of(1)])
    assert not backend.exists(key_of(1))
    looking.close()
    assert sorted(tmp_path.glob("kv*.slab")) == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=12m", "tmpfs", str(mount)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.mark.parametrize("reopened", [False, True])
def test_on_a_disk_that_others_filled_it_reads_and_stores_in_the_room_that_it_has(
    opened: Open, disk: Path, *, reopened: bool
) -> None:
    settings = {"prefix": disk / "kv", "file_size": "6MiB", "lease_s": 0.05}
    backend = opened(**settings)
    n_first = put(backend, range(60))
    assert n_first == 60
    if reopened:
        backend.close()
    with (disk / "other").open("ab", buffering=0) as other:
        for nbytes in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    other.write(b"x" * nbytes)
    if reopened:
        backend = opened(**settings)
    assert sum(hits(backend, [n]) for n in range(60)) >= 30
    stored = sum(put(backend, range(start, start + 10)) for start in range(100, 400, 10))
    assert stored >= 200, "a slot that was given up may find no room"
    assert hits(backend, range(390, 400)) == 10
    backend.check_integrity()


def test_a_disk_that_fails_is_an_error_of_the_store(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Slab) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Slab, "n_slots", property(fail))
    with pytest.raises(BackendUnavailable, match="Input/output error"):
        opened()
