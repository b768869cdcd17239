"""Archives: any tar reads them, half ones are imported and gone on with, damage never arrives."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.errors import ConfigError
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.manifest import manifest_key
from hicache_core.storage.moving.archive import (
    BLOCK_NBYTES,
    END,
    HEAD,
    VERSION,
    Head,
    Planned,
    pack,
    padding,
    unpack,
)
from hicache_core.storage.moving.archive_reader import ArchiveReader, kept_in, refuses_nothing
from hicache_core.storage.moving.archive_writer import ArchiveWriter
from hicache_core.storage.moving.mover import make_slabs, move
from hicache_core.storage.moving.outcomes import Outcome, Totals
from hicache_core.storage.moving.store import Part, StoreReader, StoreWriter, count_keys
from hicache_core.storage.moving.terms import Refuses
from hicache_core.storage.scrub import GOOD, classify
from tests.unit.storage.test_moving import PARTS, contents, counts, with_manifest
from tests.unit.storage.test_scrub import MADE, NAMESPACES, key_of, memory, sealed
from tests.unit.storage.test_why import MANIFEST, keys_of, manifest_of, put

SLABS = {"object_nbytes": 0, "slab_nbytes": 1000}


def exported(
    source: StorageBackend, file: Path, parts: Sequence[Part] = PARTS, *, n_threads: int = 2
) -> Totals:
    """Writes a new archive."""
    planned = {name: Planned(n) for name, n in count_keys(source, parts).items()}
    with file.open("wb", 0) as archive:
        writer = ArchiveWriter(archive)
        writer.begin(Head("2026-01-01", "a test", planned))
        reader = StoreReader(source, parts, refuses_nothing)
        totals = move(reader, writer, make_slabs(n_threads, **SLABS), lambda _: None)
        writer.finish()
    return totals


def resumed(source: StorageBackend, file: Path, parts: Sequence[Part] = PARTS) -> Totals:
    """Goes on with an archive."""
    with file.open("r+b", 0) as archive:
        _, kept, end = kept_in(archive, [part.namespace for part in parts])
        archive.truncate(end)
        archive.seek(end)
        writer = ArchiveWriter(archive, kept)
        reader = StoreReader(source, parts, refuses_nothing)
        totals = move(reader, writer, make_slabs(2, **SLABS), lambda _: None)
        writer.finish()
    return totals


def imported(
    file: Path, target: StorageBackend, refuses: Refuses = refuses_nothing, *, n_threads: int = 2
) -> Totals:
    with file.open("rb", 0) as archive:
        reader = ArchiveReader(archive, refuses)
        slabs = make_slabs(n_threads, **SLABS)
        totals = move(reader, StoreWriter(target), slabs, lambda _: None)
        reader.finish(totals)
    return totals


def filled(n: int = 10) -> StorageBackend:
    store = memory()
    for i in range(n):
        key = key_of(i, NAMESPACES[i % 2])
        store.set(key, sealed(key, 100 + i % 3))
    return store


def test_what_was_exported_is_imported(tmp_path: Path) -> None:
    source, target, file = filled(), memory(), tmp_path / "a.tar"
    assert counts(exported(source, file)) == {Outcome.COPIED: 10}
    totals = imported(file, target)
    assert counts(totals) == {Outcome.COPIED: 10}
    assert totals.is_whole
    assert contents(target) == contents(source)
    assert counts(imported(file, target)) == {Outcome.PRESENT: 10}


def test_any_tar_lists_and_unpacks_it(tmp_path: Path) -> None:
    source, file = filled(), tmp_path / "a.tar"
    exported(source, file)
    with tarfile.open(file) as tar:
        names = tar.getnames()
        assert (names[0], names[-1]) == (HEAD, END)
        assert sorted(names[1:-1]) == sorted(contents(source))
        for key, value in contents(source).items():
            member = tar.extractfile(key)
            assert member is not None
            assert member.read() == value
        told = tar.extractfile(END)
        assert told is not None
        nbytes = sum(map(len, contents(source).values()))
        assert json.load(told) == {"objects": 10, "nbytes": nbytes}
    listed = subprocess.run(["tar", "tf", file], check=True, capture_output=True, text=True)
    assert listed.stdout.split() == names
    assert listed.stderr == ""


def test_an_archive_that_tar_has_packed_anew_with_its_folders_is_imported(tmp_path: Path) -> None:
    source, target, file = filled(), memory(), tmp_path / "a.tar"
    exported(source, file)
    anew = tmp_path / "b.tar"
    with tarfile.open(file) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    with tarfile.open(anew, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in (HEAD, *NAMESPACES[:2], END):
            tar.add(tmp_path / "unpacked" / name, name)
        assert any(member.isdir() for member in tar.getmembers())
    totals = imported(anew, target)
    assert totals.is_whole
    assert contents(target) == contents(source)


def test_a_namespace_begins_with_its_manifest(tmp_path: Path) -> None:
    source, file = memory(), tmp_path / "a.tar"
    put(source, keys_of(MANIFEST))
    exported(source, file, [Part(MANIFEST.namespace)], n_threads=1)
    with tarfile.open(file) as tar:
        assert tar.getnames()[1] == manifest_key(MANIFEST.namespace)


@given(
    kinds=st.lists(st.sampled_from(["good", *sorted(MADE)]), max_size=12),
    cut=st.floats(0, 1),
    n_threads=st.integers(1, 3),
)
def test_of_a_half_archive_the_whole_objects_arrive_and_the_others_are_counted(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], cut: float, n_threads: int
) -> None:
    source, target = memory(), memory()
    for n, kind in enumerate(kinds):
        key = key_of(n)
        source.set(key, MADE[kind](key, 100))
    n_good = kinds.count("good")
    file = tmp_path_factory.mktemp("archive") / "a.tar"
    assert exported(source, file, n_threads=n_threads).n(Outcome.COPIED) == n_good
    whole = file.read_bytes()
    head_nbytes = unpack(whole[:BLOCK_NBYTES])[1]  # type: ignore[index]
    begin = BLOCK_NBYTES + head_nbytes + padding(head_nbytes)
    end = begin + int(cut * (len(whole) - begin))
    file.write_bytes(whole[:end])
    member_nbytes = 2 * BLOCK_NBYTES  # an object of 164 bytes, with its header
    n_whole = min(n_good, (end - begin) // member_nbytes)
    totals = imported(file, target, n_threads=n_threads)
    assert counts(totals)[Outcome.COPIED] == n_whole
    assert all(classify(key, value) == GOOD for key, value in contents(target).items())
    is_complete = end >= begin + (n_good + 1) * member_nbytes
    assert totals.is_whole == is_complete
    if not is_complete:
        # Damaged objects were planned, too, and never written.
        assert totals.n_cut + totals.n_missing == len(kinds) - n_whole
    file.write_bytes(whole[:end])
    again = resumed(source, file)
    assert again.n(Outcome.PRESENT) == n_whole
    assert again.n(Outcome.COPIED) == n_good - n_whole
    totals = imported(file, target)
    assert totals.is_whole
    assert len(contents(target)) == n_good


@given(place=st.floats(0, 1, exclude_max=True), n_threads=st.integers(1, 2))
def test_a_damaged_byte_costs_one_object_at_most(
    tmp_path_factory: pytest.TempPathFactory, place: float, n_threads: int
) -> None:
    source, target = filled(8), memory()
    file = tmp_path_factory.mktemp("archive") / "a.tar"
    exported(source, file)
    data = bytearray(file.read_bytes())
    head_nbytes = unpack(data[:BLOCK_NBYTES])[1]  # type: ignore[index]
    begin = BLOCK_NBYTES + head_nbytes + padding(head_nbytes)
    data[begin + int(place * 8 * 2 * BLOCK_NBYTES)] ^= 0x55
    file.write_bytes(data)
    totals = imported(file, target, n_threads=n_threads)
    arrived = contents(target)
    assert all(source.get(key) == value for key, value in arrived.items())
    n_lost = 8 - len(arrived)
    assert n_lost <= 1
    # A byte of the padding, or of an unused field of a header, costs nothing.
    assert totals.n(Outcome.DAMAGED) + totals.n(Outcome.REFUSED) == n_lost
    assert totals.is_whole == (n_lost == 0)


def test_an_archive_goes_through_a_pipe(tmp_path: Path) -> None:
    source, target, file = filled(40), memory(), tmp_path / "a.tar"
    exported(source, file)
    fd_out, fd_in = os.pipe()

    def feed() -> None:
        with os.fdopen(fd_in, "wb", 0) as pipe:
            writer = ArchiveWriter(pipe)
            writer.begin(Head("", "", {name: Planned(20) for name in NAMESPACES}))
            reader = StoreReader(source, PARTS, refuses_nothing)
            move(reader, writer, make_slabs(2, **SLABS), lambda _: None)
            writer.finish()

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(fd_out, "rb") as pipe:
        reader = ArchiveReader(pipe, refuses_nothing)
        totals = move(reader, StoreWriter(target), make_slabs(2, **SLABS), lambda _: None)
        reader.finish(totals)
    thread.join(30)
    assert totals.is_whole
    assert contents(target) == contents(source)


def test_pages_of_a_model_that_is_not_wanted_are_refused(tmp_path: Path) -> None:
    source, target, file = memory(), memory(), tmp_path / "a.tar"
    put(source, keys_of(MANIFEST))
    exported(source, file, [Part(MANIFEST.namespace)])

    def refuses(_namespace: str, manifest: object) -> str:
        assert manifest == MANIFEST
        return "its model is m1, not m2"

    totals = imported(file, target, refuses)
    assert counts(totals) == {Outcome.REFUSED: 8}
    assert contents(target) == {}
    assert not totals.is_whole


def test_pages_for_a_store_with_another_manifest_are_refused(tmp_path: Path) -> None:
    source, target, file = memory(), memory(), tmp_path / "a.tar"
    put(source, keys_of(MANIFEST))
    exported(source, file, [Part(MANIFEST.namespace)])
    key = manifest_key(MANIFEST.namespace)
    target.set(key, with_manifest(MANIFEST.namespace, manifest_of(page_size=8)))
    assert counts(imported(file, target)) == {Outcome.REFUSED: 8}


def test_members_that_are_no_pages_are_refused(tmp_path: Path) -> None:
    target, file = memory(), tmp_path / "a.tar"
    exported(filled(2), file)
    data = file.read_bytes()
    alien = b"not a page"
    member = pack("../../etc/passwd", len(alien), 0) + alien + bytes(padding(len(alien)))
    head_nbytes = unpack(data[:BLOCK_NBYTES])[1]  # type: ignore[index]
    begin = BLOCK_NBYTES + head_nbytes + padding(head_nbytes)
    file.write_bytes(data[:begin] + member + data[begin:])
    totals = imported(file, target)
    assert counts(totals) == {Outcome.COPIED: 2, Outcome.REFUSED: 1}
    assert len(contents(target)) == 2


def test_what_is_not_an_archive_is_said_to_be_none() -> None:
    for data in (b"", b"x" * 2000, pack("other", 3, 0) + b"abc"):
        with pytest.raises(ConfigError, match="not an archive of HiCache"):
            ArchiveReader(io.BytesIO(data), refuses_nothing)
    for text in (b"[]", b"{", b'{"format": "x"}'):
        member = pack(HEAD, len(text), 0) + text + bytes(padding(len(text)))
        with pytest.raises(ConfigError, match="not an archive of HiCache"):
            ArchiveReader(io.BytesIO(member), refuses_nothing)
    with pytest.raises(ConfigError, match="ends within its first member"):
        ArchiveReader(io.BytesIO(pack(HEAD, 30, 0) + b"{"), refuses_nothing)
    later = json.dumps({"format": "hicache-archive", "version": VERSION + 1}).encode()
    member = pack(HEAD, len(later), 0) + later + bytes(padding(len(later)))
    with pytest.raises(ConfigError, match="install a newer one"):
        ArchiveReader(io.BytesIO(member), refuses_nothing)


def test_an_archive_takes_only_namespaces_that_it_was_begun_for(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    exported(filled(), file, PARTS[:1])
    with file.open("rb", 0) as archive, pytest.raises(ConfigError, match=NAMESPACES[1]):
        kept_in(archive, NAMESPACES)


@pytest.mark.parametrize(
    "fields",
    [
        {"objects": -1},
        {"objects": 1e400},
        {"objects": "8"},
        {"object_nbytes": -1},
        {"object_nbytes": 10**18},
        {"object_nbytes": 1.5},
        {"described": [1]},
    ],
)
def test_a_head_with_numbers_that_no_archive_has_is_damaged(fields: dict[str, object]) -> None:
    """No seal protects it, and memory is taken by what it says."""
    own = {"objects": 1, "object_nbytes": 576, "described": {}, **fields}
    head = {"format": "hicache-archive", "version": 1, "created": "", "by": ""}
    with pytest.raises(ConfigError, match="is damaged: this is not an archive"):
        Head.decode(json.dumps({**head, "namespaces": {"0" * 16: own}}).encode())


def test_a_head_that_is_nested_too_deeply_is_damaged() -> None:
    with pytest.raises(ConfigError, match="is damaged: this is not an archive"):
        Head.decode(b"[" * 100_000)
