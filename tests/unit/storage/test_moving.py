"""Moving objects: counts are right, nothing damaged arrives, and a second run has nothing to do."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hicache_redis import RedisBackend, RedisConfig
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.errors import BackendError, BackendUnavailable
from hicache_core.storage.base import BackendConfig, Buffer, Listable, StorageBackend
from hicache_core.storage.file.backend import FileBackend, FileConfig
from hicache_core.storage.manifest import Manifest, encode, manifest_key
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.moving.archive_reader import refuses_nothing
from hicache_core.storage.moving.base import Intact
from hicache_core.storage.moving.mover import make_slabs, move
from hicache_core.storage.moving.outcomes import Outcome, Result, Totals
from hicache_core.storage.moving.prompts import CacheOfPrompts, parts_of
from hicache_core.storage.moving.store import Part, StoreReader, StoreWriter, count_keys
from hicache_core.storage.scrub import GOOD, classify
from hicache_core.storage.sealed import HEADER_NBYTES, seal
from tests.servers.valkey import Valkey, running
from tests.unit.storage.test_scrub import CONTEXT, MADE, NAMESPACES, key_of, memory, sealed
from tests.unit.storage.test_why import MANIFEST, PAGE_SIZE, TOKENS, keys_of, manifest_of, put

PARTS = [Part(name) for name in NAMESPACES]
OUTCOMES = {
    "good": Outcome.COPIED,
    "corrupt": Outcome.DAMAGED,
    "foreign": Outcome.DAMAGED,
    "wrong_length": Outcome.DAMAGED,
    "wrong_version": Outcome.REFUSED,
    "unknown": Outcome.REFUSED,
}
OBJECTS = st.lists(
    st.tuples(
        st.sampled_from(["good", *sorted(MADE)]),
        st.sampled_from([1, 100, 300]),
        st.sampled_from(NAMESPACES),
        st.booleans(),  # whether the target has it already
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with running() as server:
        yield server


def moved(
    source: StorageBackend,
    target: StorageBackend,
    parts: Sequence[Part] = PARTS,
    *,
    n_threads: int = 2,
    slab_nbytes: int = 1 << 16,
) -> Totals:
    """Moves everything, and checks that each result was told once."""
    told: list[Result] = []
    totals = move(
        StoreReader(source, parts, refuses_nothing),
        StoreWriter(target),
        make_slabs(n_threads, 0, slab_nbytes),
        told.extend,
    )
    assert Counter(one.outcome for one in told) == counts(totals)
    return totals


def counts(totals: Totals) -> Counter[Outcome]:
    return Counter({outcome: n for outcome in Outcome if (n := totals.n(outcome))})


def contents(store: StorageBackend) -> dict[str, bytes]:
    listable = store.capability(Listable)
    assert listable is not None
    return {key: bytes(store.get(key) or b"") for key in listable.list_keys("")}


@given(
    objects=OBJECTS, n_threads=st.integers(1, 3), slab_nbytes=st.sampled_from([100, 500, 1 << 16])
)
def test_only_what_is_intact_arrives_and_a_second_run_copies_nothing(
    objects: list[tuple[str, int, str, bool]], n_threads: int, slab_nbytes: int
) -> None:
    source, target = memory(), memory()
    expected: Counter[Outcome] = Counter()
    for n, (kind, nbytes, namespace, is_there) in enumerate(objects):
        key = key_of(n, namespace)
        source.set(key, MADE[kind](key, nbytes))
        if is_there:
            target.set(key, sealed(key, nbytes))
        expected[Outcome.PRESENT if is_there else OUTCOMES[kind]] += 1
    before = contents(source)
    sizes = {"n_threads": n_threads, "slab_nbytes": slab_nbytes}
    totals = moved(source, target, **sizes)
    assert counts(totals) == expected
    assert contents(source) == before
    arrived = contents(target)
    assert all(classify(key, value) == GOOD for key, value in arrived.items())
    assert len(arrived) == expected[Outcome.COPIED] + expected[Outcome.PRESENT]
    again = counts(moved(source, target, **sizes))
    assert again[Outcome.COPIED] == 0
    assert again[Outcome.PRESENT] == len(arrived)
    assert totals.is_whole == (not expected[Outcome.DAMAGED] and not expected[Outcome.REFUSED])


@pytest.mark.parametrize("way", ["file to redis", "redis to file", "file to file"])
def test_objects_move_between_real_stores_with_the_manifest(
    way: str, tmp_path: Path, server: Valkey
) -> None:
    server.call("FLUSHALL")
    stores: list[StorageBackend] = []
    for n, kind in enumerate(way.split(" to ")):
        if kind == "redis":
            stores.append(RedisBackend(RedisConfig.model_validate({"url": server.url}), CONTEXT))
        else:
            stores.append(FileBackend(FileConfig(path=tmp_path / str(n)), CONTEXT))
    source, target = stores
    with contextlib.closing(source), contextlib.closing(target):
        source.open()
        target.open()
        put(source, keys_of(MANIFEST))
        totals = moved(source, target, [Part(MANIFEST.namespace)])
        assert counts(totals) == {Outcome.COPIED: 8}
        assert contents(target) == contents(source)
        assert len(contents(target)) == 8
        again = moved(source, target, [Part(MANIFEST.namespace)])
        assert counts(again) == {Outcome.PRESENT: 8}


class FailsAfter(MemoryBackend):
    """A store that is lost after so many writes. Emulates a server that dies during a copy."""

    left = 0

    def set_each(
        self, keys: Sequence[str], pages: Sequence[Sequence[memoryview]]
    ) -> Sequence[bool]:
        self.left -= len(keys)
        if self.left < 0:
            raise BackendUnavailable("the store is gone")
        return super().set_each(keys, pages)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_an_interrupted_copy_goes_on_where_it_was(n_threads: int) -> None:
    source, target = memory(), FailsAfter(MemoryConfig(), CONTEXT)
    target.open()
    for n in range(50):
        source.set(key_of(n), sealed(key_of(n)))
    target.left = 20
    with pytest.raises(BackendUnavailable, match="the store is gone"):
        moved(source, target, n_threads=n_threads, slab_nbytes=1000)
    n_there = len(contents(target))
    assert 0 < n_there <= 20
    target.left = 50
    totals = moved(source, target, n_threads=n_threads, slab_nbytes=1000)
    assert counts(totals) == {Outcome.COPIED: 50 - n_there, Outcome.PRESENT: n_there}
    assert contents(target) == contents(source)


def test_what_a_full_target_has_no_room_for_is_counted_and_ends_the_copy() -> None:
    source = memory()
    target = FileLike(MemoryConfig(), CONTEXT)
    target.open()
    for n in range(9):
        source.set(key_of(n), sealed(key_of(n)))
    totals = moved(source, target, n_threads=1, slab_nbytes=500)
    assert totals.n(Outcome.NO_ROOM) == totals.objects.total()
    assert 0 < totals.objects.total() < 9
    assert "no room" in totals.stopped
    assert not totals.is_whole


class FileLike(MemoryBackend):
    """A store without room. Emulates a server that evicts nothing."""

    def set_each(
        self, keys: Sequence[str], pages: Sequence[Sequence[memoryview]]
    ) -> Sequence[bool]:
        return [False] * len(keys)


class Forgets(MemoryBackend):
    """A store that evicts what it has just listed. Emulates a store in use."""

    def list_keys(self, prefix: str) -> Iterator[str]:
        keys = list(super().list_keys(prefix))
        self.delete(keys[::2])
        return iter(keys)


def test_what_vanishes_meanwhile_is_counted_and_no_failure() -> None:
    source = Forgets(MemoryConfig(), CONTEXT)
    source.open()
    for n in range(8):
        source.set(key_of(n), sealed(key_of(n)))
    totals = moved(source, memory())
    assert counts(totals) == {Outcome.COPIED: 4, Outcome.VANISHED: 4}
    assert totals.is_whole


class DamagedOnTheWay(MemoryBackend):
    """A store whose batches arrive damaged. Emulates a bad cable."""

    def get_each(
        self, keys: Sequence[str], pages: Sequence[Sequence[memoryview]]
    ) -> Sequence[bool]:
        filled = super().get_each(keys, pages)
        for page in pages:
            page[0][-1] ^= 1
        return filled


def test_what_was_damaged_on_the_way_only_is_read_again() -> None:
    source = DamagedOnTheWay(MemoryConfig(), CONTEXT)
    source.open()
    for n in range(8):
        source.set(key_of(n), sealed(key_of(n)))
    target = memory()
    assert counts(moved(source, target)) == {Outcome.COPIED: 8}
    assert contents(target) == contents(source)


def with_manifest(namespace: str, manifest: Manifest) -> bytes:
    """The object of a manifest, under the key of another namespace."""
    payload = encode(manifest)
    data = bytearray(HEADER_NBYTES) + payload
    view = memoryview(data)
    seal(manifest_key(namespace), (view[:HEADER_NBYTES], view[HEADER_NBYTES:]))
    return bytes(data)


@pytest.mark.parametrize("side", ["source", "target"])
def test_pages_beside_the_manifest_of_another_cache_are_refused(side: str) -> None:
    stores = {"source": memory(), "target": memory()}
    put(stores["source"], keys_of(MANIFEST))
    other = manifest_of(page_size=8)
    key = manifest_key(MANIFEST.namespace)
    stores[side].delete([key])
    stores[side].set(key, with_manifest(MANIFEST.namespace, other))
    totals = moved(stores["source"], stores["target"], [Part(MANIFEST.namespace)])
    assert counts(totals) == {Outcome.REFUSED: 8}
    assert not totals.is_whole
    assert len(contents(stores["target"])) == (side == "target")


def test_pages_of_another_page_size_under_the_same_namespace_are_refused() -> None:
    source, target = memory(), memory()
    keys = keys_of(MANIFEST)
    put(source, keys[:3])
    alien = keys[5]
    source.set(alien, sealed(alien, 2 * MANIFEST.object_nbytes))
    totals = moved(source, target, [Part(MANIFEST.namespace)])
    assert counts(totals) == {Outcome.COPIED: 4, Outcome.REFUSED: 1}
    assert not target.exists(alien)


def told_of(window: int) -> Manifest:
    return Manifest(MANIFEST.namespace, MANIFEST.described, {"window": window})


def test_manifests_that_differ_in_what_they_tell_are_refused() -> None:
    source, target = memory(), memory()
    key = manifest_key(MANIFEST.namespace)
    put(source, keys_of(MANIFEST))
    target.set(key, with_manifest(MANIFEST.namespace, told_of(128)))
    told: list[Result] = []
    reader = StoreReader(source, [Part(MANIFEST.namespace)], refuses_nothing)
    totals = move(reader, StoreWriter(target), make_slabs(1), told.extend)
    assert counts(totals) == {Outcome.REFUSED: 8}
    assert {one.reason for one in told} == {"window is 0 in the source and 128 in the target"}


class Bare(StorageBackend):
    """A store that cannot list its keys."""

    name = "bare"

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__(BackendConfig(), CONTEXT)
        self.inner = inner

    def get(self, key: str) -> Buffer | None:
        return self.inner.get(key)

    def exists(self, key: str) -> bool:
        return self.inner.exists(key)

    def set(self, key: str, value: Buffer) -> None:
        self.inner.set(key, value)


def test_a_store_that_cannot_list_gives_the_objects_of_prompts_only() -> None:
    source, target = memory(), memory()
    put(source, keys_of(MANIFEST))
    with pytest.raises(BackendError, match="cannot list its keys"):
        moved(Bare(source), target)
    cache = CacheOfPrompts(MANIFEST.namespace, (), PAGE_SIZE)
    parts, found = parts_of(Bare(source), cache, [TOKENS])
    assert (found[0].n_pages, found[0].n_stored) == (7, 7)
    assert counts(moved(Bare(source), Bare(target), parts)) == {Outcome.COPIED: 8}
    assert contents(target) == contents(source)


def test_pages_behind_a_gap_are_left_out() -> None:
    source = memory()
    keys = keys_of(MANIFEST)
    put(source, keys[:2] + keys[4:])
    parts, found = parts_of(source, CacheOfPrompts(MANIFEST.namespace, (), PAGE_SIZE), [TOKENS])
    assert parts == [Part(MANIFEST.namespace, keys[:2])]
    assert (found[0].n_pages, found[0].n_stored) == (7, 2)
    assert count_keys(source, parts) == {MANIFEST.namespace: 3}


def test_units_of_groups_come_with_the_prefix_that_they_belong_to() -> None:
    source = memory()
    keys = keys_of(MANIFEST)
    put(source, keys[:5])
    group = NAMESPACES[0]
    units = [f"{group}/{key.partition('/')[2]}" for key in keys]
    for unit in (units[1], units[3], units[6]):  # the last one behind the stored pages
        source.set(unit, sealed(unit))
    cache = CacheOfPrompts(MANIFEST.namespace, (group,), PAGE_SIZE)
    parts, _ = parts_of(source, cache, [TOKENS, TOKENS])
    assert parts == [
        Part(MANIFEST.namespace, keys[:5]),
        Part(group, [units[1], units[3]]),
    ]
    alone, found = parts_of(source, CacheOfPrompts("", (group,), PAGE_SIZE), [TOKENS])
    assert alone == [Part(group, [units[1], units[3], units[6]])]
    assert found[0].n_stored == 7


def test_several_batches_are_in_flight() -> None:
    """Two workers are in the target at the same time; a single one would wait for ever."""
    meeting = threading.Barrier(2, timeout=30)

    class Meets:
        said = staticmethod(StoreWriter(memory()).said)

        def has(self, keys: Sequence[str]) -> Sequence[bool]:
            return [False] * len(keys)

        def write(self, objects: Sequence[Intact]) -> Sequence[bool]:
            meeting.wait()
            return [True] * len(objects)

    source = memory()
    for n in range(2):
        source.set(key_of(n), sealed(key_of(n)))
    reader = StoreReader(source, PARTS, refuses_nothing)
    totals = move(reader, Meets(), make_slabs(2), lambda _: None)
    assert counts(totals) == {Outcome.COPIED: 2}
