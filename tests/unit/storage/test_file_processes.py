"""Several real processes on one directory, and real small disks; tests/crash kills processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hicache_core.errors import BackendDenied, BackendFull
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.records import RecordStore

OpenFile = Callable[..., FileBackend]
MIB = 1 << 20

PREAMBLE = """
import json, os, random, signal, sys, time
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.types import BackendContext

def opened(path, **settings):
    config = FileConfig.model_validate({"path": path} | settings)
    backend = FileBackend(config, BackendContext(namespace="0" * 16))
    backend.open()
    return backend

def value(key, nbytes):
    return random.Random(key).randbytes(nbytes)

def page(data):
    return [memoryview(bytearray(data))]
"""

# Both processes store, read and delete the same few keys below a cap that holds a third of them.
CONTENDER = (
    PREAMBLE
    + """
path, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
NBYTES = 150_000
backend = opened(path, max_nbytes=20 * 159_744)
rng, end, hits = random.Random(seed), time.monotonic() + seconds, 0
values = {f"k{n}": value(f"k{n}", NBYTES) for n in range(60)}
while time.monotonic() < end:
    keys = rng.sample(sorted(values), 6)
    choice = rng.random()
    if choice < 0.45:
        backend.batch_set(keys, [page(values[key]) for key in keys])
    elif choice < 0.95:
        pages = [page(bytes(NBYTES)) for _ in keys]
        for key, got in zip(keys, pages[:backend.batch_get(keys, pages)]):
            assert bytes(got[0]) == values[key], f"wrong bytes under {key}"
            hits += 1
    else:
        backend.delete(keys[:2])
backend.check_integrity()
stats = backend.stats()
assert stats["held_nbytes"] <= stats["max_nbytes"], stats
backend.close()
print(json.dumps({"hits": hits, "evicted": stats["evicted_objects"]}))
"""
)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def test_processes_that_store_read_and_evict_at_once_see_whole_objects_only(
    tmp_path: Path,
) -> None:
    contenders = [start(CONTENDER, tmp_path / "store", seed, 1.5) for seed in (1, 2)]
    for contender in contenders:
        assert '"hits": 0' not in output_of(contender)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options."""
    mounts: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk{len(mounts)}"
        path.mkdir()
        if os.geteuid() != 0:
            pytest.skip("to mount a small disk takes root")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounts.append(path)
        return path

    yield mount
    for path in mounts:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_drops_and_counts_the_write_and_keeps_the_rest(
    mounted: Callable[[str], Path], open_file: OpenFile
) -> None:
    disk = mounted("size=12m")
    backend = open_file(path=disk / "store", max_nbytes="1GB")
    keys = [f"k{n}" for n in range(20)]
    pages = [[memoryview(bytearray([n]) * MIB)] for n in range(20)]
    n_stored = backend.batch_set(keys, pages)
    assert 5 <= n_stored < 12
    assert backend.stats()["dropped_writes"] == 20 - n_stored
    with pytest.raises(BackendFull, match="free some disk space"):
        backend.set("too much", bytes(16 * MIB))
    backend.check_integrity()
    into = [[memoryview(bytearray(MIB))] for _ in keys]
    assert backend.batch_get(keys, into) == n_stored
    assert into[:n_stored] == pages[:n_stored]
    backend.set("more", bytes(4 * MIB))
    assert backend.get("more") == bytes(4 * MIB), "it lives in the room that it has"
    assert 0 < backend.batch_exists(keys) < n_stored
    backend.delete(["more"])
    assert backend.batch_set(["again"], [pages[0]]) == 1
    assert backend.get("again") == bytes(pages[0][0])
    backend.check_integrity()
    backend.close()
    backend = open_file(path=disk / "store", max_nbytes="1GB")
    assert backend.get("again") == bytes(pages[0][0])
    assert "warning" in {finding.level for finding in backend.diagnose()}


def test_a_write_that_the_disk_refuses_gives_its_space_back(
    mounted: Callable[[str], Path], open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else filled the disk between the look at its room and the write."""
    disk = mounted("size=12m")
    backend = open_file(path=disk / "store", max_nbytes="1GB")
    monkeypatch.setattr(RecordStore, "free_nbytes", lambda self: 1 << 30)
    keys = [f"k{n}" for n in range(20)]
    pages = [[memoryview(bytearray([n]) * MIB)] for n in range(20)]
    n_stored = backend.batch_set(keys, pages)
    assert 0 <= n_stored < 12
    assert backend.batch_exists(keys) == n_stored
    kept = list(backend.list_keys(""))
    assert len(kept) >= 5, "pages behind the first that was refused may be there all the same"
    for key in kept:
        assert backend.get(key) == bytes(pages[keys.index(key)][0])
    backend.check_integrity()
    stats = backend.stats()
    assert stats["held_nbytes"] < 12 * MIB
    assert stats["dropped_writes"] == 20 - n_stored


def test_a_disk_without_room_for_the_index_is_full_or_works(
    mounted: Callable[[str], Path], open_file: OpenFile
) -> None:
    for kib in (40, 80, 160, 320):
        disk = mounted(f"size={kib}k")
        try:
            backend = open_file(path=disk / "store")
        except BackendFull:
            continue
        for n in range(100):
            backend.batch_set([f"k{n}"], [[memoryview(bytearray(5000))]])
        for key in backend.list_keys(""):
            assert backend.get(key) in (None, bytes(5000))
        backend.close()


def fill_disk(disk: Path) -> None:
    """Another program takes what is left, to the last byte."""
    with (disk / "other").open("ab", buffering=0) as other:
        for nbytes in (MIB, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    other.write(b"x" * nbytes)


@pytest.mark.parametrize("reopened", [False, True])
def test_on_a_disk_that_others_filled_it_reads_and_stores_in_the_room_that_it_has(
    mounted: Callable[[str], Path], open_file: OpenFile, *, reopened: bool
) -> None:
    disk = mounted("size=12m")
    backend = open_file(path=disk / "store", max_nbytes="4MiB")
    keys, pages = [f"k{n}" for n in range(400)], [memoryview(bytearray(20_000)) for _ in range(400)]
    for n, page in enumerate(pages):
        page[:4] = n.to_bytes(4, "little")
    n_first = 160
    assert backend.batch_set(keys[:n_first], [[page] for page in pages[:n_first]]) == n_first
    if reopened:
        backend.close()
    fill_disk(disk)
    if reopened:
        backend = open_file(path=disk / "store", max_nbytes="4MiB")
    n_kept = sum(backend.exists(key) for key in keys)
    assert n_kept >= n_first // 2, "it gives up little"
    for start in range(n_first, 400, 20):
        new = slice(start, start + 20)
        assert backend.batch_set(keys[new], [[page] for page in pages[new]]) == 20
        assert backend.batch_exists(keys[new]) == 20
    for key, page in zip(keys, pages, strict=True):
        assert backend.get(key) in (None, bytes(page))
    backend.check_integrity()


def test_a_small_store_keeps_its_objects_when_it_is_opened_on_a_full_disk(
    mounted: Callable[[str], Path], open_file: OpenFile
) -> None:
    disk = mounted("size=12m")
    backend = open_file(path=disk / "store", max_nbytes="4MiB")
    for n in range(3):
        backend.set(f"k{n}", bytes([n]) * 5000)
    backend.close()
    fill_disk(disk)
    backend = open_file(path=disk / "store", max_nbytes="4MiB")
    assert [backend.get(f"k{n}") for n in range(3)] == [bytes([n]) * 5000 for n in range(3)]
    backend.check_integrity()
    backend.set("new", bytes(5000))
    assert backend.get("new") == bytes(5000)


def test_a_read_only_mount_is_an_error_at_open(
    mounted: Callable[[str], Path], open_file: OpenFile
) -> None:
    with pytest.raises(BackendDenied, match="use a writable path"):
        open_file(path=mounted("ro") / "store")
