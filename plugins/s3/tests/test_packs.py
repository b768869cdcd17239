"""Packs: any page leads to its pack, none leads to wrong bytes, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hicache_s3.index import INDEX_NBYTES, MAX_PACK_PAGES, IndexCache, PackIndex
from hicache_s3.objects import Objects
from hicache_s3.pages import Alone, Found
from hicache_s3.request_threads import RequestThreads
from hicache_s3.search import Search
from hicache_s3.writing import MIN_PACK_PAGES, pages_per_pack, plan
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.storage.base import StorageBackend
from hicache_core.storage.scrub import REMOVED, UNKNOWN, scrub
from hicache_core.storage.sealed import seal
from hicache_core.types import Page
from plugins.s3.tests.conftest import MakeBackend
from plugins.s3.tests.world import (
    NAMESPACE,
    NBYTES,
    blank,
    content,
    filled,
    hits,
    is_right,
    keys_of,
    put,
)
from tests.servers.weed import BUCKET, Weed

EIGHT = {"pack_nbytes": 8 * NBYTES}
"""Packs of eight pages."""


def packs(weed: Weed, backend: StorageBackend) -> list[str]:
    return weed.names(f"{backend.settings.prefix}packs/")  # type: ignore[attr-defined]


def sealed_page(key: str) -> Page:
    """A page of the cache, as it is stored."""
    page = (memoryview(bytearray(64)), memoryview(bytearray(content(key, NBYTES - 64))))
    seal(key, page)
    return page


@pytest.fixture(scope="module")
def threads() -> Iterator[RequestThreads]:
    threads = RequestThreads(3)
    yield threads
    threads.close()


# On a real server


def test_a_write_becomes_packs_and_the_same_write_the_same_packs(
    make_backend: MakeBackend, weed: Weed
) -> None:
    backend = make_backend(**EIGHT)
    keys = keys_of(19)
    put(backend, keys)
    names = packs(weed, backend)
    assert len(names) == 2  # of eight pages each; three are too few for a third
    put(make_backend(**EIGHT), keys)
    assert packs(weed, backend) == names
    assert hits(make_backend(**EIGHT), keys) == 19


def test_a_copy_without_object_metadata_serves_all_pages_and_scrub_removes_none(
    make_backend: MakeBackend, weed: Weed
) -> None:
    """As ``aws s3 sync`` by way of a disk makes it, or ``rclone`` without ``--metadata``."""
    keys = keys_of(19)
    first = make_backend(**EIGHT)
    assert first.batch_set(keys, [sealed_page(key) for key in keys]) == 19
    client, source = weed.client(), first.settings.prefix
    for name in weed.names(source):
        body = client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        client.put_object(Bucket=BUCKET, Key=f"copied-{name}", Body=body)
    options = {"prefix": f"copied-{source}", **EIGHT}
    for reader in (make_backend(**options), make_backend(**{**options, "pack": False})):
        assert reader.batch_exists(keys) == 19
        pages = [blank((64, NBYTES - 64)) for _ in keys]
        assert reader.batch_get(keys, pages) == 19
        assert [b"".join(page) for page in pages] == [b"".join(sealed_page(k)) for k in keys]
        assert all(reader.get(key) == b"".join(sealed_page(key)) for key in keys)
        assert sum(reader.usage().values()) == 19 * NBYTES
    before = weed.names(f"copied-{source}")
    assert {checked.kind for checked in scrub(make_backend(**options))} == {"good"}
    assert weed.names(f"copied-{source}") == before


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the objects that were looked at or read, one for each request."""
    names: list[str] = []
    for method in ("look", "fetch"):
        real = getattr(Objects, method)

        def counted(self: Objects, name: str, *args: Any, real: Any = real, **more: Any) -> Any:
            names.append(name)
            return real(self, name, *args, **more)

        monkeypatch.setattr(Objects, method, counted)
    return names


LARGE = 8 * NBYTES
"""A page that is stored alone, where eight small ones make a pack."""


@pytest.mark.parametrize("least_nbytes", [0, NBYTES])
def test_small_pages_beside_large_ones_are_found_by_a_request_for_each_pack(
    make_backend: MakeBackend, asked: list[str], least_nbytes: int
) -> None:
    """All are found, whatever is known of their sizes; one that is known saves requests."""
    options = {**EIGHT, "object_nbytes": LARGE}
    small, large = keys_of(64), keys_of(8, "large", "fedcba9876543210")
    writer = make_backend(**options)
    put(writer, small)
    put(writer, large, (64, LARGE - 64))
    reader = make_backend(**options, least_nbytes=least_nbytes)
    asked.clear()
    assert reader.exists_each([*small, *large]) == [True] * 72
    # At most two for each pack and for each large page.
    assert (len(asked) <= 2 * (8 + 8)) == (least_nbytes > 0)
    assert hits(reader, small) == 64
    assert hits(reader, large, (64, LARGE - 64)) == 8


def test_the_size_of_pages_is_learnt_for_each_namespace(
    make_backend: MakeBackend, asked: list[str]
) -> None:
    """An engine with several kinds of pages says the size of the first only."""
    options = {**EIGHT, "object_nbytes": LARGE}
    small, others = keys_of(64), keys_of(64, "others")
    writer = make_backend(**options)
    put(writer, small)
    put(writer, others)
    reader = make_backend(**options)
    assert hits(reader, small[:8]) == 8
    asked.clear()
    assert reader.exists_each(others) == [True] * 64
    assert len(asked) == 8


def test_a_short_page_that_could_be_an_index_is_read_as_a_page(make_backend: MakeBackend) -> None:
    nbytes = INDEX_NBYTES
    (key,) = keys_of(1)
    for backend in (make_backend(), make_backend(pack=False)):
        backend.set(key, content(key, nbytes))
        assert hits(backend, [key], (64, nbytes - 64)) == 1
        assert hits(backend, [key], (64, nbytes - 104)) == 0
        assert backend.get(key) == content(key, nbytes)
        assert backend.exists(key)
        assert sum(backend.usage().values()) == nbytes


def test_objects_of_other_tools_are_not_listed_and_never_removed(
    make_backend: MakeBackend, weed: Weed
) -> None:
    backend = make_backend(**EIGHT)
    prefix, keys = backend.settings.prefix, keys_of(8)
    put(backend, keys)
    others = [f"{prefix}{name}" for name in ("pages/README.txt", "packs/notes.txt", "x/y")]
    for name in others:
        weed.client().put_object(Bucket=BUCKET, Key=name, Body=b"another tool's")
    assert sorted(backend.list_keys("")) == sorted(keys)
    assert set(backend.usage()) == {NAMESPACE}
    assert len(list(scrub(backend, kinds=REMOVED | {UNKNOWN}))) == 8
    put(backend, keys)
    assert backend.clear("") == 8
    assert weed.names(prefix) == sorted(others)


@pytest.mark.parametrize("before", ["/", "a//b///"])
def test_slashes_too_many_in_the_prefix_are_left_out(
    make_backend: MakeBackend, weed: Weed, before: str
) -> None:
    backend = make_backend(prefix=f"{before}{time.monotonic_ns():x}//", **EIGHT)
    keys = keys_of(12)
    put(backend, keys)
    assert sorted(backend.list_keys(f"{NAMESPACE}/")) == sorted(keys)
    assert dict(backend.usage()) == {NAMESPACE: 12 * NBYTES}
    assert backend.clear(f"{NAMESPACE}/") == 12
    assert hits(backend, keys) == 0
    assert weed.names(backend.settings.prefix) == []


def test_what_is_stored_is_not_written_again(make_backend: MakeBackend) -> None:
    first, second = make_backend(**EIGHT), make_backend(**EIGHT)
    keys = keys_of(32)
    put(first, keys[:16])
    put(second, keys)
    assert second.stats()["puts"] == 2 + 16  # packs and indexes of the new half only
    assert hits(make_backend(**EIGHT), keys) == 32


def test_reading_takes_one_request_for_each_run(make_backend: MakeBackend, weed: Weed) -> None:
    keys = keys_of(32)
    put(make_backend(**EIGHT), keys)
    reader = make_backend(**EIGHT)
    asked: list[str] = []
    objects = reader._opened().objects
    fetch = objects.fetch

    def counting(name: str, *rest: Any, **named: Any) -> Any:
        asked.append(name)
        return fetch(name, *rest, **named)

    objects.fetch = counting  # type: ignore[method-assign]
    assert reader.batch_exists(keys) == 32
    assert len(asked) <= 5  # four packs; one more where the first guess of their size was wrong
    asked.clear()
    assert hits(reader, keys) == 32
    assert len(asked) == 4
    asked.clear()
    assert hits(reader, keys[5:20]) == 15
    assert len(asked) == 3


@pytest.mark.parametrize("start", [0, 1, 7, 8, 13, 31])
def test_a_read_may_begin_in_the_middle_of_a_pack(make_backend: MakeBackend, start: int) -> None:
    keys = keys_of(32)
    put(make_backend(**EIGHT), keys)
    assert hits(make_backend(**EIGHT), keys[start:]) == 32 - start
    fresh = make_backend(**EIGHT)
    assert fresh.batch_exists(keys[start:]) == 32 - start
    assert fresh.batch_exists([keys[start], *keys_of(3, "other")]) == 1


def test_packs_of_any_size_and_pages_alone_are_read_together(make_backend: MakeBackend) -> None:
    keys = keys_of(40)
    put(make_backend(**EIGHT), keys[:8])
    put(make_backend(pack=False), keys[8:11])
    put(make_backend(pack_nbytes=4 * NBYTES), keys[11:23])
    put(make_backend(**EIGHT), keys[23:40])
    for reader in (make_backend(**EIGHT), make_backend(), make_backend(pack=False)):
        assert reader.batch_exists(keys) == 40
        assert hits(reader, keys) == 40


def test_overlapping_packs_serve_each_others_pages(make_backend: MakeBackend) -> None:
    keys = keys_of(24)
    put(make_backend(**EIGHT), keys[8:16])
    put(make_backend(**EIGHT), keys)  # the first page is new: all is written
    reader = make_backend(**EIGHT)
    assert hits(reader, keys) == 24
    reader.delete(keys[10:11])
    assert hits(make_backend(**EIGHT), keys) == 10


def test_a_lost_pack_is_a_miss_and_can_be_written_again(
    make_backend: MakeBackend, weed: Weed
) -> None:
    writer, warm = make_backend(**EIGHT), make_backend(**EIGHT)
    keys = keys_of(16)
    put(writer, keys)
    assert hits(warm, keys) == 16
    client = weed.client()
    for name in packs(weed, writer):
        client.delete_object(Bucket=BUCKET, Key=name)
    cold = make_backend(**EIGHT)
    assert hits(warm, keys) == 0
    assert cold.get(keys[8]) is None
    assert hits(cold, keys) == 0
    assert cold.batch_exists(keys) == 0  # the keys that led nowhere are gone
    put(cold, keys)
    assert hits(warm, keys) == 16


def test_a_pack_that_moved_is_found_again(make_backend: MakeBackend) -> None:
    """What one process knows of a pack may be outdated; the pages may be elsewhere by now."""
    keys = keys_of(16)
    first, warm = make_backend(**EIGHT), make_backend(**EIGHT)
    put(first, keys)
    assert hits(warm, keys) == 16
    first.delete(keys)
    put(make_backend(pack_nbytes=16 * NBYTES), keys)
    assert hits(warm, keys) == 16


def test_a_pack_that_was_cut_short_is_a_miss(make_backend: MakeBackend, weed: Weed) -> None:
    backend = make_backend(**EIGHT)
    keys = keys_of(8)
    put(backend, keys)
    (name,) = packs(weed, backend)
    client = weed.client()
    data = client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
    client.put_object(Bucket=BUCKET, Key=name, Body=data[: 3 * NBYTES + 5])
    assert hits(make_backend(**EIGHT), keys) == 0
    assert make_backend(**EIGHT).get(keys[5]) is None


def test_an_index_that_is_damaged_is_a_miss(make_backend: MakeBackend, weed: Weed) -> None:
    backend = make_backend(**EIGHT)
    keys = keys_of(8)
    put(backend, keys)
    client = weed.client()
    name = f"{backend.settings.prefix}pages/{keys[0]}"
    mark = client.get_object(Bucket=BUCKET, Key=name)["Metadata"]
    other = PackIndex.of({key: NBYTES for key in keys_of(4, "other")}).encode()
    for body in (b"", b"HiS3", other, other[:-1], bytes(INDEX_NBYTES + 1), bytes(300_000)):
        client.put_object(Bucket=BUCKET, Key=name, Body=body, Metadata=mark)
        fresh = make_backend(**EIGHT)
        assert fresh.get(keys[0]) is None
        assert hits(fresh, keys) == 0
        assert hits(fresh, keys[1:]) == 7


def test_readers_meet_whole_pages_or_none_while_packs_come_and_go(
    make_backend: MakeBackend,
) -> None:
    writer, reader = make_backend(**EIGHT), make_backend(**EIGHT)
    keys = keys_of(16)
    failures: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                hits(reader, keys)
                for key in keys[::5]:
                    value = reader.get(key)
                    assert value is None or is_right(key, (memoryview(value),))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(12):
        put(writer, keys)
        writer.delete(keys if turn % 3 else keys[3:9])
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_nothing_is_left_when_all_keys_are_deleted(make_backend: MakeBackend, weed: Weed) -> None:
    backend = make_backend(**EIGHT)
    keys = keys_of(20)
    put(backend, keys)
    for key in keys[::3]:
        backend.delete([key])
    backend.delete(keys)
    assert weed.names(backend.settings.prefix) == []


def test_the_same_key_twice_in_a_batch_is_stored_once_and_read_twice(
    make_backend: MakeBackend,
) -> None:
    backend = make_backend(**EIGHT)
    keys = keys_of(6)
    twice = [*keys, keys[0], keys[5]]
    assert backend.batch_set(twice, [filled(key, (NBYTES,)) for key in twice]) == 8
    assert hits(make_backend(**EIGHT), twice, (NBYTES,)) == 8
    pages = [blank((NBYTES,)) for _ in range(2)]
    assert backend.batch_get([keys[2]] * 2, pages) == 2
    assert all(is_right(keys[2], page) for page in pages)


# By themselves


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=MAX_PACK_PAGES))
def test_an_index_is_read_as_it_was_written(sizes: list[int]) -> None:
    index = PackIndex.of(dict(zip(keys_of(len(sizes)), sizes, strict=True)))
    data = index.encode()
    assert len(data) <= INDEX_NBYTES
    assert PackIndex.decode(index.namespace, data) == index
    assert PackIndex.decode(index.namespace, data[:-1]) is None
    ends = [slot.offset + slot.nbytes for slot in index.slots.values()]
    assert [0, *ends[:-1]] == [slot.offset for slot in index.slots.values()]


@given(st.sampled_from([b"HiS3", b"HiCP", b""]), st.integers(0, 3), st.binary(max_size=130))
def test_any_bytes_are_an_index_or_none(magic: bytes, n_pages: int, rest: bytes) -> None:
    data = magic + bytes(16) + n_pages.to_bytes(4, "little") + rest
    index = PackIndex.decode("0" * 16, data)
    assert (index is not None) == (magic == b"HiS3" and len(rest) == 40 * n_pages)


@given(
    st.lists(st.sampled_from([100, 1000, 5000]), max_size=40),
    st.sets(st.integers(0, 39)),
    st.sampled_from([0, 4000, 10_000]),
)
def test_a_plan_writes_each_page_once_and_packs_neighbours_only(
    sizes: list[int], left_out: set[int], pack_nbytes: int
) -> None:
    keys = keys_of(len(sizes))
    wanted = [n for n in range(len(sizes)) if n not in left_out]
    groups = plan(keys, sizes, wanted, pack_nbytes)
    assert [n for group in groups for n in group] == wanted
    for group in groups:
        assert group == list(range(group[0], group[0] + len(group)))
        assert len({sizes[n] for n in group}) == 1
        assert len(group) == 1 or len(group) >= MIN_PACK_PAGES
        assert len(group) <= pages_per_pack(sizes[group[0]], pack_nbytes)


def test_keys_that_are_no_page_keys_are_not_packed() -> None:
    keys = [f"{'0' * 16}/{n}" for n in range(8)]
    assert plan(keys, [10] * 8, range(8), 1000) == [[n] for n in range(8)]
    mixed = [*keys_of(4), *keys_of(4, namespace="f" * 16)]
    assert plan(mixed, [10] * 8, range(8), 1000) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(
    st.lists(st.sampled_from(["pack", "join", "alone", "absent"]), max_size=30),
    st.integers(1, 12),
    st.booleans(),
)
def test_a_search_finds_what_asking_for_each_key_finds(
    threads: RequestThreads, kinds: list[str], stride: int, leading: bool
) -> None:
    keys = keys_of(len(kinds))
    groups: list[list[int]] = []
    for n, kind in enumerate(kinds):
        if kind == "join" and groups and groups[-1][-1] == n - 1:
            groups[-1].append(n)
        elif kind in ("pack", "join"):
            groups.append([n])
    truth: list[Found] = [Alone(1) if kind == "alone" else None for kind in kinds]
    for group in groups:
        index = PackIndex.of({keys[n]: 1 for n in group})
        for n in group:
            truth[n] = index
    search = Search(keys, stride, leading=leading)
    asked: list[int] = []

    def ask(n: int) -> Found:
        asked.append(n)
        return truth[n]

    search.run(threads, ask)
    assert search.end == next((n for n, place in enumerate(truth) if place is None), len(keys))
    assert search.stop == (search.end if leading else len(keys))
    stop = search.end if leading else len(keys)
    assert search.places[:stop] == truth[:stop]
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("every", [1, 2, 128])
def test_absent_keys_are_asked_in_a_few_rounds(threads: RequestThreads, every: int) -> None:
    """Of 128 keys, one in so many is absent; the others are in packs of 32 neighbours."""
    keys = keys_of(128)
    there = [key for n, key in enumerate(keys) if n % every]
    index_of: dict[str, Found] = {}
    for start in range(0, len(there), 32):
        index = PackIndex.of(dict.fromkeys(there[start : start + 32], 1))
        index_of.update(dict.fromkeys(index.slots, index))
    rounds: list[int] = []

    class Counting(RequestThreads):
        def run(self, work: Callable[[int], None], items: Iterable[int]) -> None:  # type: ignore[override]
            rounds.append(len(list(items)))
            threads.run(work, items)

    counting = Counting(1)
    search = Search(keys, 32, leading=False)
    search.run(counting, lambda n: index_of.get(keys[n]))
    counting.close()
    assert [place is not None for place in search.places] == [key in index_of for key in keys]
    assert len(rounds) <= 8
    assert sum(rounds) <= 128 - len(there) + 8  # one for each absent key, and for each pack


def test_the_cache_forgets_what_is_old_or_too_much() -> None:
    now = [0.0]
    cache = IndexCache(limit=2, ttl_s=10, clock=lambda: now[0])
    one, two, three = (PackIndex.of({key: 1 for key in keys_of(4, label)}) for label in "abc")
    key = [next(iter(index.slots)) for index in (one, two, three)]
    for index in (one, two):
        cache.add(index)
        cache.check_integrity()
    assert cache.find(key[0]) is one
    cache.add(three)
    cache.check_integrity()
    assert cache.find(key[1]) is None  # the one that was used least recently
    assert cache.find(key[0]) is one
    now[0] = 10.0
    assert cache.find(key[0]) is None
    cache.check_integrity()
    cache.add(one.without({key[0]}))
    assert cache.find(key[0]) is None
    cache.drop(one)
    cache.check_integrity()
    assert len(cache) == 1
