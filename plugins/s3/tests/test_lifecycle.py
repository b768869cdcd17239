"""Age and usage, of pages alone and in packs, on a real server."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import formatdate

import pytest
from hicache_s3.age import is_expired, now_at_store
from hicache_s3.index import INDEX_NBYTES, PackIndex, is_index_nbytes
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_core.storage.base import Pins, ReportsUsage
from hicache_core.storage.scrub import scrub
from plugins.s3.tests.conftest import MakeBackend
from plugins.s3.tests.world import NAMESPACE, NBYTES, content, hits, keys_of, put
from tests.scrubbing import check_scrub, sealed
from tests.servers.weed import Weed

EIGHT = {"pack_nbytes": 8 * NBYTES}
"""Packs of eight pages."""
OTHER = NAMESPACE[::-1]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 8
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)


def headers(written_s: float | None, now_s: float | None) -> dict[str, str]:
    dates = {"last-modified": written_s, "date": now_s}
    return {name: formatdate(at, usegmt=True) for name, at in dates.items() if at is not None}


@settings(deadline=None)
@given(now=st.integers(1, 4_000_000_000), age=st.integers(0, 10**8), ttl_s=st.integers(1, 10**8))
def test_the_age_is_by_the_clock_of_the_store(now: int, age: int, ttl_s: int) -> None:
    """``now`` has nothing to do with the clock of this machine."""
    answer = headers(now - age, now)
    assert is_expired(answer, ttl_s) == (age >= ttl_s)
    assert not is_expired(answer, None)


@pytest.mark.parametrize("wrong", ["", "yesterday", "Thu, 99 Foo 2026 00:00:00 GMT"])
def test_without_a_date_nothing_is_old_and_now_is_now(wrong: str) -> None:
    assert not is_expired({"last-modified": wrong}, 1.0)
    assert not is_expired(headers(None, time.time()), 1.0)
    assert is_expired(headers(time.time() - 100, None), 50.0)
    assert abs(now_at_store({"date": wrong}) - time.time()) < 5


@pytest.mark.parametrize("n_pages", [1, 4, 128])
def test_the_length_of_an_index_is_known(n_pages: int) -> None:
    index = PackIndex.of(dict.fromkeys(keys_of(n_pages), NBYTES))
    assert is_index_nbytes(len(index.encode()))
    assert not is_index_nbytes(len(index.encode()) + 1)
    assert not is_index_nbytes(INDEX_NBYTES + 40)


@pytest.mark.parametrize("pack", [True, False])
def test_old_pages_are_misses_and_are_stored_anew(make_backend: MakeBackend, pack: bool) -> None:
    options = {**EIGHT, "pack": pack, "ttl_s": 3}
    writer, reader = make_backend(**options), make_backend(**options)
    keys = keys_of(17)
    put(writer, keys)
    assert hits(reader, keys) == 17  # the reader knows the packs from now on
    wait_until(lambda: not reader.exists(keys[16]))
    assert reader.batch_exists(keys) == 0
    assert hits(reader, keys) == 0
    assert reader.get(keys[3]) is None
    wait_until(lambda: not list(reader.list_keys("")))  # a listing tells ages by whole seconds
    assert dict(reader.usage()) == {}
    assert hits(make_backend(**{**options, "ttl_s": None}), keys) == 17, "no rule has removed them"
    put(writer, keys)
    assert hits(reader, keys) == 17
    assert reader.clear("") == 17


def test_an_old_pack_under_young_indexes_is_a_miss_and_is_stored_anew(
    make_backend: MakeBackend,
) -> None:
    backend = make_backend(**EIGHT, ttl_s=3)
    keys = keys_of(8)
    put(backend, keys)
    time.sleep(1.5)
    backend.delete(keys[:1])  # the others get new indexes
    wait_until(lambda: hits(backend, keys[1:]) == 0)
    assert backend.batch_exists(keys[1:]) == 0, "the indexes of a pack that is gone go too"
    put(backend, keys)
    assert hits(backend, keys) == 8


def test_clear_removes_what_is_old_too(make_backend: MakeBackend, weed: Weed) -> None:
    backend = make_backend(**EIGHT, ttl_s=1)
    keys = keys_of(9)
    put(backend, keys)
    wait_until(lambda: not list(backend.list_keys("")))
    assert backend.clear("") == 9
    assert weed.names(backend.settings.prefix) == []


@pytest.mark.parametrize("pack", [True, False])
def test_usage_counts_pages_and_nothing_else(make_backend: MakeBackend, pack: bool) -> None:
    backend = make_backend(**EIGHT, pack=pack)
    assert isinstance(backend, ReportsUsage)
    keys, others = keys_of(35), keys_of(3, "others", OTHER)
    put(backend, keys)
    put(backend, others)
    assert dict(make_backend().usage()) == {NAMESPACE: 35 * NBYTES, OTHER: 3 * NBYTES}
    put(backend, keys[:20])
    backend.delete([keys[4], others[0]])
    assert dict(make_backend().usage()) == {NAMESPACE: 34 * NBYTES, OTHER: 2 * NBYTES}
    backend.clear("")
    assert dict(backend.usage()) == {}


@pytest.mark.parametrize("nbytes", [24 + 40, 24 + 40 * 25, INDEX_NBYTES])
def test_usage_is_not_misled_by_pages_as_long_as_an_index(
    make_backend: MakeBackend, nbytes: int
) -> None:
    backend = make_backend(**EIGHT)
    put(backend, keys_of(8))
    for key in keys_of(3, "short"):
        backend.set(key, content(key, nbytes))
    assert dict(backend.usage()) == {NAMESPACE: 8 * NBYTES + 3 * nbytes}


def test_usage_leaves_what_is_known_of_packs_as_it_is(make_backend: MakeBackend) -> None:
    put(make_backend(**EIGHT), keys_of(32))
    reader = make_backend(**EIGHT)
    assert hits(reader, keys_of(8)) == 8
    reader.usage()
    assert reader.stats()["known_packs"] == 1


def test_pins_are_not_offered(make_backend: MakeBackend) -> None:
    assert not isinstance(make_backend(), Pins)


def test_scrubbing_removes_corrupt_and_foreign_pages(make_backend: MakeBackend) -> None:
    check_scrub(make_backend(), *keys_of(3))


def test_scrubbing_takes_a_bad_page_out_of_its_pack(make_backend: MakeBackend) -> None:
    keys = keys_of(8)
    pages = [(memoryview(sealed(key)),) for key in keys]
    pages[3] = (memoryview(sealed(keys[3])[:-1] + b"!"),)
    backend = make_backend(**EIGHT)
    assert backend.batch_set(keys, pages) == 8
    assert backend.stats()["puts"] == 9, "a pack and its indexes"
    kinds = [checked.kind for checked in scrub(make_backend(**EIGHT))]
    assert sorted(kinds) == ["corrupt", *["good"] * 7]
    reader = make_backend(**EIGHT)
    assert [reader.exists(key) for key in keys] == [n != 3 for n in range(8)]
