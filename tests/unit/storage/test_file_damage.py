"""What happens to a file backend whose files were damaged, lost, or are somebody else's."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from hicache_core.errors import BackendCorrupt, BackendUnavailable
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.directory import FileDirectory
from hicache_core.storage.file.records import BLOCK_NBYTES
from hicache_core.storage.sealed import HEADER_NBYTES, SealedBackend

OpenFile = Callable[..., FileBackend]
NAMESPACE = "0" * 16
KEYS = [f"{NAMESPACE}/{n:064x}" for n in range(4)]
PAYLOAD_NBYTES = 5000
STRIDE = 2 * BLOCK_NBYTES  # from one record to the next


def payload(n: int) -> bytes:
    return random.Random(n).randbytes(PAYLOAD_NBYTES)


def page(data: bytes) -> list[memoryview]:
    return [memoryview(bytearray(HEADER_NBYTES)), memoryview(bytearray(data))]


def fill(backend: FileBackend) -> SealedBackend:
    sealed = SealedBackend(backend)
    assert sealed.batch_set(KEYS, [page(payload(n)) for n in range(len(KEYS))]) == len(KEYS)
    return sealed


def read_all(sealed: SealedBackend) -> list[int]:
    """Which objects are there, each read alone; wrong bytes are a failure."""
    found = []
    for n, key in enumerate(KEYS):
        into = page(bytes(PAYLOAD_NBYTES))
        if sealed.batch_get([key], [into]) == 1:
            assert bytes(into[1]) == payload(n)
            found.append(n)
    return found


def segment_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "store" / "segments").glob("*.seg"))


def place_of(path: Path, n: int) -> tuple[Path, int]:
    """The segment file and offset of the record of object ``n``."""
    connection = sqlite3.connect(path / "store" / "index.sqlite")
    try:
        segment, offset = connection.execute(
            "SELECT segment, offset FROM extents WHERE key = ?", (KEYS[n],)
        ).fetchone()
    finally:
        connection.close()
    return path / "store" / "segments" / f"{segment:08x}.seg", offset


def flip(file: Path, at: int, mask: int = 1) -> None:
    with file.open("r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ mask]))


def misses_counted(sealed: SealedBackend) -> float:
    stats = sealed.stats()
    return stats["damaged_records"] + sum(
        count for name, count in stats.items() if name.startswith("sealed_")
    )


RECORD_NBYTES = 256 + HEADER_NBYTES + PAYLOAD_NBYTES + 16
DAMAGE = {
    "record magic": 0,
    "record version": 4,
    "length of the key": 6,
    "length of the object": 8,
    "generation": 24,
    "key": 48,
    "seal": 256,
    "checksum in the seal": 256 + 16,
    "first byte": 256 + HEADER_NBYTES,
    "middle": 256 + HEADER_NBYTES + PAYLOAD_NBYTES // 2,
    "last byte": RECORD_NBYTES - 17,
    "footer generation": RECORD_NBYTES - 16,
    "footer magic": RECORD_NBYTES - 8,
}


@pytest.mark.parametrize("at", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_flipped_bit_in_a_record_is_a_counted_miss(
    open_file: OpenFile, tmp_path: Path, at: int
) -> None:
    backend = open_file()
    sealed = fill(backend)
    file, offset = place_of(tmp_path, 2)
    flip(file, offset + at)
    assert read_all(sealed) == [0, 1, 3]
    assert misses_counted(sealed) == 1
    assert not sealed.exists(KEYS[2])
    assert sealed.batch_set([KEYS[2]], [page(payload(2))]) == 1
    assert read_all(sealed) == [0, 1, 2, 3], "a good one takes its place"
    backend.check_integrity()


@pytest.mark.parametrize("seed", range(30))
def test_any_flipped_bit_anywhere_never_gives_wrong_bytes(
    open_file: OpenFile, tmp_path: Path, seed: int
) -> None:
    backend = open_file()
    sealed = fill(backend)
    rng = random.Random(seed)
    file = rng.choice(segment_files(tmp_path))
    flip(file, rng.randrange(file.stat().st_size), 1 << rng.randrange(8))
    if seed % 2:  # the headers have to be read anew
        backend.close()
        (tmp_path / "store" / "index.sqlite").unlink()
        backend = open_file()
        sealed = SealedBackend(backend)
    found = read_all(sealed)
    assert len(found) >= 3 or (seed % 2 and len(found) >= 2)
    backend.check_integrity()


@pytest.mark.parametrize("keep", [0, 1, 4096, 4097, 4096 + 200, 4096 + 4000, 4096 + STRIDE])
def test_a_truncated_segment_loses_what_was_cut_and_nothing_else(
    open_file: OpenFile, tmp_path: Path, keep: int
) -> None:
    backend = open_file()
    sealed = fill(backend)
    cut = segment_files(tmp_path)[0]
    os.truncate(cut, keep)
    lost = [n for n in range(4) if place_of(tmp_path, n)[0] == cut]
    lost = [n for n in lost if place_of(tmp_path, n)[1] + RECORD_NBYTES > keep]
    assert lost
    assert read_all(sealed) == [n for n in range(4) if n not in lost]
    assert misses_counted(sealed) == len(lost)
    assert sealed.batch_set(KEYS, [page(payload(n)) for n in range(4)]) == 4
    assert read_all(sealed) == [0, 1, 2, 3]


@pytest.mark.parametrize("how", ["deleted", "emptied", "garbage", "cut", "scribbled"])
def test_a_lost_or_damaged_index_is_built_anew(
    open_file: OpenFile, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = open_file()
    fill(backend)
    backend.close()
    index = tmp_path / "store" / "index.sqlite"
    if how == "deleted":
        index.unlink()
    elif how == "emptied":
        os.truncate(index, 0)
    elif how == "garbage":
        index.write_bytes(random.Random(1).randbytes(9000))
    elif how == "cut":
        os.truncate(index, index.stat().st_size // 2)
    else:
        data = bytearray(index.read_bytes())
        data[4096:] = random.Random(2).randbytes(len(data) - 4096)
        index.write_bytes(data)
    backend = open_file()
    assert read_all(SealedBackend(backend)) == [0, 1, 2, 3]
    assert "index rebuilt, 4 objects found" in caplog.text
    assert ("index", "warning") in {(f.topic, f.level) for f in backend.diagnose()}
    backend.check_integrity()
    assert backend.batch_set(["new"], [page(b"x")]) == 1
    assert read_all(SealedBackend(backend)) == [0, 1, 2, 3]


def test_a_rebuild_that_was_interrupted_is_begun_anew(
    open_file: OpenFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_file()
    fill(backend)
    backend.close()
    (tmp_path / "store" / "index.sqlite").unlink()

    def die(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FileDirectory, "_rebuild", die)
        with pytest.raises(KeyboardInterrupt):
            open_file()
    assert read_all(SealedBackend(open_file())) == [0, 1, 2, 3]


def test_a_lost_index_is_not_rebuilt_while_others_use_it(
    open_file: OpenFile, tmp_path: Path
) -> None:
    backend = open_file()
    fill(backend)
    (tmp_path / "store" / "index.sqlite").unlink()
    with pytest.raises(BackendCorrupt, match="can be rebuilt after their next call"):
        open_file(lock_timeout_s=0.1)
    backend.close()
    assert read_all(SealedBackend(open_file())) == [0, 1, 2, 3]


def test_the_copy_of_a_replaced_object_does_not_come_back(
    open_file: OpenFile, tmp_path: Path
) -> None:
    backend = open_file()
    backend.set("k", b"old" * 2000)
    backend.set("k", b"new!" * 10)
    backend.close()
    (tmp_path / "store" / "index.sqlite").unlink()
    assert open_file().get("k") == b"new!" * 10


def test_an_object_that_looks_like_a_record_is_not_taken_for_one(
    open_file: OpenFile, tmp_path: Path
) -> None:
    backend = open_file()
    backend.set("inner", b"x" * 100)
    segment = segment_files(tmp_path)[0].read_bytes()
    backend.delete(["inner"])
    backend.set("outer", bytes(4096 - 256) + segment[4096:])
    backend.close()
    (tmp_path / "store" / "index.sqlite").unlink()
    backend = open_file()
    backend.delete(["inner"])  # the freed record itself may come back, whole
    assert list(backend.list_keys("")) == ["outer"]


def test_a_segment_that_somebody_removed_takes_its_objects_with_it(
    open_file: OpenFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = open_file()
    fill(backend)
    lost = [n for n in range(4) if place_of(tmp_path, n)[0] == segment_files(tmp_path)[0]]
    backend.close()
    segment_files(tmp_path)[0].unlink()
    backend = open_file()
    assert read_all(SealedBackend(backend)) == [n for n in range(4) if n not in lost]
    assert "was removed" in caplog.text
    backend.check_integrity()


def test_foreign_files_are_left_alone_and_never_served(open_file: OpenFile, tmp_path: Path) -> None:
    segments = tmp_path / "store" / "segments"
    segments.mkdir(parents=True)
    foreign = [
        tmp_path / "store" / "notes.txt",
        segments / "00000001.seg",
        segments / "00000002.seg",
        segments / "backup.seg",
        segments / "0000000g.seg",
    ]
    for file in foreign:
        file.write_bytes(b"mine " * 3000)
    backend = open_file()
    sealed = fill(backend)
    assert read_all(sealed) == [0, 1, 2, 3]
    backend.close()
    (tmp_path / "store" / "index.sqlite").unlink()
    backend = open_file()
    assert sorted(backend.list_keys("")) == KEYS
    for file in foreign:
        assert file.read_bytes() == b"mine " * 3000


def test_a_database_of_another_application_is_left_alone(
    open_file: OpenFile, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    index = tmp_path / "store" / "index.sqlite"
    connection = sqlite3.connect(index)
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()
    before = index.read_bytes()
    with pytest.raises(BackendUnavailable, match="use another path"):
        open_file()
    assert index.read_bytes() == before


@pytest.mark.parametrize("index_lost", [False, True])
def test_a_segment_whose_maker_was_killed_before_its_first_byte_is_removed(
    open_file: OpenFile, tmp_path: Path, *, index_lost: bool
) -> None:
    backend = open_file()
    fill(backend)
    backend.close()
    if index_lost:
        (tmp_path / "store" / "index.sqlite").unlink()
    torso = tmp_path / "store" / "segments" / "0000ffff.seg"
    torso.touch()
    backend = open_file()
    assert not torso.exists()
    assert read_all(SealedBackend(backend)) == [0, 1, 2, 3]


def test_segments_that_the_index_does_not_know_are_removed_at_start(
    open_file: OpenFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = open_file()
    fill(backend)
    orphan = tmp_path / "store" / "segments" / "0000ffff.seg"
    orphan.write_bytes(segment_files(tmp_path)[0].read_bytes())
    backend.close()
    with caplog.at_level(logging.WARNING):
        backend = open_file()
    assert not orphan.exists()
    assert read_all(SealedBackend(backend)) == [0, 1, 2, 3]
