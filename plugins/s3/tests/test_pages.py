"""What goes in comes out: packed or not, by whatever number and length of segments."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from hicache_s3.objects import split_page

from hicache_core.errors import UseAfterClose
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.sealed import SealedBackend
from hicache_core.types import Page
from plugins.s3.tests.conftest import MakeBackend
from plugins.s3.tests.world import (
    NBYTES,
    PAGE,
    blank,
    content,
    filled,
    hits,
    is_right,
    keys_of,
    put,
)
from tests.servers.weed import BUCKET, Weed, settings

PEER = Path(__file__).parent / "peer.py"


@pytest.fixture(params=[True, False], ids=["packed", "alone"])
def pack(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize(
    "shape", [(4096,), PAGE, (64, *[256] * 16), (0, 100, 0, 28, 0), tuple([16] * 1100)]
)
def test_a_batch_comes_back_whatever_its_segments(
    make_backend: MakeBackend, pack: bool, shape: tuple[int, ...]
) -> None:
    backend = make_backend(pack=pack)
    keys = keys_of(10)
    put(backend, keys, shape)
    other = make_backend(pack=pack)
    assert other.batch_exists(keys) == 10
    assert hits(other, keys, shape) == 10
    assert hits(make_backend(pack=not pack), keys, shape) == 10
    assert hits(backend, keys, shape) == 10


def test_single_calls_and_batches_see_the_same_objects(
    make_backend: MakeBackend, pack: bool
) -> None:
    backend, other = make_backend(pack=pack), make_backend(pack=pack)
    keys = keys_of(6)
    put(backend, keys)
    for key in reversed(keys):
        assert other.exists(key)
        assert bytes(other.get(key) or b"") == content(key, NBYTES)
    single = keys_of(1, "single")[0]
    backend.set(single, content(single, NBYTES))
    assert hits(other, [*keys, single, keys[0]]) == 8
    assert other.get(keys_of(1, "absent")[0]) is None
    assert not other.exists(keys_of(1, "absent")[0])


def test_pages_behind_gaps_are_found_read_and_stored(make_backend: MakeBackend, pack: bool) -> None:
    """Packs of four; gaps at their borders, in their middle, and one pack that is gone whole."""
    options = {"pack": pack, "pack_nbytes": 4 * NBYTES, "object_nbytes": NBYTES}
    writer = make_backend(**options)
    keys = keys_of(32, "gaps")
    gaps = {0, 5, 6, 11, 12, 16, 17, 18, 19, 31}
    put(writer, keys)
    writer.delete([keys[n] for n in gaps])
    writer.set(keys[6], b"of another length")
    present = [n not in gaps or n == 6 for n in range(32)]
    readable = [n not in gaps for n in range(32)]
    for reader in (writer, make_backend(**options), make_backend(pack=not pack)):
        assert reader.exists_each(keys) == present == StorageBackend.exists_each(reader, keys)
        for get_each in (reader.get_each, partial(StorageBackend.get_each, reader)):
            pages = [blank(PAGE) for _ in keys]
            assert get_each(keys, pages) == readable
            assert [is_right(key, page) for key, page in zip(keys, pages, strict=True)] == readable
        assert reader.exists_each(keys_of(40, "absent")) == [False] * 40
    fresh = make_backend(**options)
    assert fresh.set_each(keys, [filled(key, PAGE) for key in keys]) == [True] * 32
    assert hits(make_backend(**options), keys) == 32
    assert fresh.stats()["writes"] == 32
    assert fresh.exists_each([]) == fresh.get_each([], []) == fresh.set_each([], []) == []


def test_each_page_is_shown_while_it_moves_and_may_be_refused(
    make_backend: MakeBackend, pack: bool
) -> None:
    backend, other = make_backend(pack=pack), make_backend(pack=pack)
    keys = keys_of(12, "shown")
    pages = [filled(key, PAGE) for key in keys]
    assert backend.batch_set_visiting(keys, pages, _number(pages)) == 12
    backend.delete([keys[9], keys[10]])
    assert backend.set_each_visiting([keys[9]], [pages[9]], _number([pages[9]])) == [True]
    for reader in (backend, other):
        seen: list[int] = []
        came = [blank(PAGE) for _ in keys]

        def arrived(n: int, seen: list[int] = seen, came: list[Page] = came) -> bool:
            seen.append(n)
            return came[n][0][0] == (0 if n == 9 else n) and n not in (4, 7)

        wanted = [n not in (4, 7, 10) for n in range(12)]
        assert reader.get_each_visiting(keys, came, arrived) == wanted
        assert sorted(seen) == [n for n in range(12) if n != 10]
        assert reader.batch_get_visiting(keys, came, arrived) == 4
        assert reader.exists(keys[4]), "whoever refuses a page says what becomes of it"


def _number(pages: Sequence[Page]) -> Callable[[int], None]:
    """Writes its index into each page that leaves."""

    def leaving(n: int) -> None:
        pages[n][0][0] = n

    return leaving


def test_the_count_ends_at_a_hole_wherever_it_is(make_backend: MakeBackend, pack: bool) -> None:
    backend, other = make_backend(pack=pack), make_backend(pack=pack)
    for hole in range(7):
        keys = keys_of(7, f"hole {hole}")
        put(backend, keys[:hole])
        put(backend, keys[hole + 1 :])
        for _ in ("it knows none of the packs", "it knows them"):
            assert other.batch_exists(keys) == hole
            assert hits(other, keys) == hole


def test_an_object_of_another_length_is_a_miss(make_backend: MakeBackend, pack: bool) -> None:
    backend, other = make_backend(pack=pack), make_backend(pack=pack)
    keys = keys_of(8, "length")
    put(backend, keys)
    for nbytes in (0, 1, NBYTES - 1, NBYTES + 1, 200_000):
        pages = [blank((NBYTES,)), blank((nbytes,))]
        assert other.batch_get(keys[:2], pages) == 1
    assert hits(other, keys) == 8


def test_empty_objects_are_objects(make_backend: MakeBackend, pack: bool) -> None:
    backend, other = make_backend(pack=pack), make_backend(pack=pack)
    single, *keys = keys_of(6, "empty")
    backend.set(single, b"")
    put(backend, keys, (0,))
    assert other.exists(single)
    value = other.get(single)
    assert value is not None
    assert len(value) == 0
    assert other.batch_get(keys, [() for _ in keys]) == 5
    assert other.batch_exists([single, *keys]) == 6


def test_large_objects_go_up_in_parts(make_backend: MakeBackend, weed: Weed) -> None:
    parts = {"multipart_nbytes": "6MiB", "part_nbytes": "5MiB"}
    backend = make_backend(**parts)
    keys = keys_of(2, "large")
    shape = (64, 12 << 20)
    put(backend, keys, shape)
    assert hits(make_backend(), keys, shape) == 2
    entry = weed.client().head_object(
        Bucket=BUCKET, Key=f"{backend.settings.prefix}pages/{keys[0]}"
    )
    assert entry["ETag"].strip('"').endswith("-3")
    assert not weed.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_parts_cover_a_page_without_a_copy() -> None:
    page = filled("x", (3, 0, 10, 4))
    parts = split_page(page, 6)
    assert [sum(piece.nbytes for piece in part) for part in parts] == [6, 6, 5]
    assert b"".join(piece for part in parts for piece in part) == b"".join(page)
    parts[0][0][0] ^= 1
    assert parts[0][0][0] == page[0][0]


def test_delete_removes_its_keys_and_no_others(make_backend: MakeBackend, pack: bool) -> None:
    backend, other = make_backend(pack=pack), make_backend(pack=pack)
    keys = keys_of(8, "delete")
    put(backend, keys)
    assert other.batch_exists(keys) == 8
    other.delete([keys[3], keys_of(1, "absent")[0]])
    other.delete([])
    for fresh in (other, make_backend(pack=pack)):
        assert fresh.batch_exists(keys) == 3
        assert fresh.get(keys[3]) is None
        assert hits(fresh, keys) == 3
        assert hits(fresh, keys[4:]) == 4
    put(backend, keys)
    assert hits(make_backend(pack=pack), keys) == 8
    backend.delete(keys)
    assert list(backend.list_keys("")) == []


def test_keys_are_listed_and_cleared_by_prefix(
    make_backend: MakeBackend, pack: bool, weed: Weed
) -> None:
    backend = make_backend(pack=pack)
    ours, theirs = keys_of(9), keys_of(9, namespace="f" * 16)
    put(backend, ours)
    put(backend, theirs)
    assert sorted(backend.list_keys("")) == sorted(ours + theirs)
    assert list(backend.list_keys(ours[2])) == ours[2:3]
    assert backend.clear(ours[2][:60]) == 1
    assert hits(backend, ours) == 2
    assert backend.clear(ours[0][:17]) == 8
    assert hits(backend, theirs) == 9
    assert backend.clear("") == 9
    assert weed.names(backend.settings.prefix) == []


def test_another_process_finds_every_page_by_itself(make_backend: MakeBackend, weed: Weed) -> None:
    backend = make_backend()
    ours, theirs = keys_of(40, "ours"), keys_of(40, "theirs")
    put(backend, ours)
    config = settings(weed.url, prefix=backend.settings.prefix)
    request = {"config": config, "read": ours[::-1], "write": theirs, "nbytes": NBYTES}
    done = subprocess.run(
        [sys.executable, PEER],
        check=False,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["40", "40"], done.stderr
    assert hits(backend, theirs) == 40


def test_many_threads_read_what_they_wrote(make_backend: MakeBackend, pack: bool) -> None:
    backend = make_backend(pack=pack, threads=4, max_connections=5)
    results: list[int] = []

    def run(thread: int) -> None:
        for turn in range(3):
            keys = keys_of(12, f"{thread} {turn}")
            put(backend, keys)
            results.append(hits(backend, keys))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [12] * 18


def test_damage_is_a_miss_and_can_be_written_again(
    make_backend: MakeBackend, pack: bool, weed: Weed
) -> None:
    backend = make_backend(pack=pack)
    sealed = SealedBackend(backend)
    keys, shape = keys_of(6, "damage"), (64, 4032)
    pages = [filled(key, shape) for key in keys]
    payload = bytes(pages[4][1])
    assert sealed.batch_set(keys, pages) == 6
    name = next(n for n in weed.names(backend.settings.prefix) if pack == ("packs/" in n))
    if not pack:
        name = f"{backend.settings.prefix}pages/{keys[4]}"
    client = weed.client()
    data = bytearray(client.get_object(Bucket=BUCKET, Key=name)["Body"].read())
    data[4 * NBYTES + 1000 if pack else 1000] ^= 1
    client.put_object(Bucket=BUCKET, Key=name, Body=bytes(data))
    got = [blank(shape) for _ in keys]
    assert sealed.batch_get(keys, got) == 4
    assert sealed.batch_exists(keys) == 4
    assert sealed.batch_set(keys[4:], pages[4:]) == 2
    assert sealed.batch_get(keys, got) == 6
    assert bytes(got[4][1]) == payload


def test_calls_after_close_say_so(make_backend: MakeBackend) -> None:
    backend = make_backend()
    key = keys_of(1)[0]
    backend.open()
    before = threading.active_count()
    put(backend, keys_of(9))
    backend.close()
    backend.close()
    assert threading.active_count() <= before
    with pytest.raises(UseAfterClose):
        backend.get(key)
    with pytest.raises(UseAfterClose):
        backend.batch_set([key], [filled(key, PAGE)])
    with pytest.raises(UseAfterClose):
        backend.list_keys("")


def test_figures_count_pages_and_bytes(make_backend: MakeBackend) -> None:
    backend = make_backend()
    keys = keys_of(12, "stats")
    put(backend, keys)
    hits(backend, [*keys, *keys_of(1, "absent")])
    stats = backend.stats()
    assert stats["writes"] == 12
    assert stats["hits"] == 12
    assert stats["misses"] == 1
    assert stats["read_nbytes"] == 12 * NBYTES
    assert stats["puts"] == 13  # a pack, and its index under each key
    assert stats["known_packs"] == 1
    assert stats["slow_downs"] == 0
