"""The way of pages: in place, staged, refused; what is a miss and what is dropped."""

from __future__ import annotations

import json
import logging
import os
import threading
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hicache_mooncake import MooncakeBackend
from hicache_mooncake.staging import EMPTY

from hicache_core.errors import BackendError, BackendFull, IntegrityError
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import layout_named
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.sealed import SealedBackend
from hicache_core.types import Page

NAMESPACE = "0123456789abcdef"


def key(n: int) -> str:
    return f"{NAMESPACE}/{n:064x}"


def keys(n: int, start: int = 0) -> list[str]:
    return [key(start + i) for i in range(n)]


def page_of(memory: memoryview, start: int, *sizes: int, gap: int = 0) -> Page:
    """Segments of these sizes from ``start``, ``gap`` bytes between them."""
    segments = []
    for size in sizes:
        segments.append(memory[start : start + size])
        start += size + gap
    return tuple(segments)


def registered(backend: MooncakeBackend, nbytes: int) -> memoryview:
    """Fresh registered memory full of random bytes."""
    memory = memoryview(bytearray(os.urandom(nbytes)))
    backend.register_memory([memory])
    return memory


class Gained:
    """What a backend counted since this was made."""

    def __init__(self, backend: MooncakeBackend) -> None:
        self._backend = backend
        self._before = backend.stats()

    def __getitem__(self, name: str) -> float:
        return self._backend.stats().get(name, 0) - self._before.get(name, 0)


@pytest.mark.parametrize("sizes", [(4096,), (64, 4032), (64, 1, 4095, 1000), (1,) * 50])
@pytest.mark.parametrize("gap", [0, 8])
def test_registered_pages_come_back_byte_for_byte_without_a_copy(
    backend: MooncakeBackend, sizes: tuple[int, ...], gap: int
) -> None:
    gained = Gained(backend)
    memory = registered(backend, 1 << 20)
    written = [page_of(memory, n * 8192, *sizes, gap=gap) for n in range(5)]
    read = [page_of(memory, (n + 20) * 8192, *sizes, gap=gap) for n in range(5)]

    assert backend.batch_set(keys(5), written) == 5
    assert backend.batch_exists(keys(5)) == 5
    assert backend.batch_get(keys(5), read) == 5

    assert [b"".join(page) for page in read] == [b"".join(page) for page in written]
    assert gained["staged_pages"] == 0


def test_an_object_may_be_read_into_other_segments_than_it_was_written_from(
    backend: MooncakeBackend,
) -> None:
    memory = registered(backend, 1 << 16)
    written = page_of(memory, 0, 64, 1000)
    read = page_of(memory, 8192, 1000, 60, 4, gap=3)
    backend.batch_set([key(1)], [written])
    assert backend.batch_get([key(1)], [read]) == 1
    assert b"".join(read) == b"".join(written)
    assert backend.get(key(1)) == b"".join(written)


def test_a_batch_larger_than_one_call_is_moved_in_several(
    master: object, make_backend: Callable[..., MooncakeBackend]
) -> None:
    backend = make_backend(master.address, max_call_nbytes=10_000)  # type: ignore[attr-defined]
    backend.clear("")
    memory = registered(backend, 1 << 20)
    written = [page_of(memory, n * 4096, 4096) for n in range(20)]
    read = [page_of(memory, (n + 50) * 4096, 4096) for n in range(20)]
    assert backend.batch_set(keys(20), written) == 20
    backend.delete([key(13)])
    assert backend.batch_get(keys(20), read) == 13
    assert [bytes(page[0]) for page in read[:13]] == [bytes(page[0]) for page in written[:13]]


@pytest.mark.parametrize("hole", [0, 3, 6])
def test_only_the_pages_before_the_first_hole_count(backend: MooncakeBackend, hole: int) -> None:
    gained = Gained(backend)
    memory = registered(backend, 1 << 16)
    backend.batch_set(keys(7), [page_of(memory, n * 100, 100) for n in range(7)])
    backend.delete([key(hole)])
    assert backend.batch_exists(keys(7)) == hole
    assert backend.batch_get(keys(7), [page_of(memory, n * 100, 100) for n in range(7)]) == hole
    assert gained["misses_missing"] == 1


@pytest.mark.parametrize("way", ["in place", "staged"])
def test_pages_behind_gaps_are_found_read_and_stored(
    master: object, backend: MooncakeBackend, make_backend: Callable[..., MooncakeBackend], way: str
) -> None:
    store = backend
    if way == "staged":
        store = make_backend(master.address, global_segment_size=0)  # type: ignore[attr-defined]
    gained = Gained(store)
    memory = memoryview(bytearray(os.urandom(1 << 16)))
    if way == "in place":
        store.register_memory([memory])
    written = [page_of(memory, n * 1000, 64, 936) for n in range(16)]
    gaps = {0, 3, 4, 9, 15}
    assert store.batch_set(keys(16), written) == 16
    store.delete([key(n) for n in gaps | {7}])
    store.set(key(7), b"of another length")
    present = [n not in gaps for n in range(16)]
    readable = [n not in gaps | {7} for n in range(16)]
    assert store.exists_each(keys(16)) == present == StorageBackend.exists_each(store, keys(16))
    read = [page_of(memory, 20_000 + n * 1000, 500, 500) for n in range(16)]
    for get_each in (store.get_each, partial(StorageBackend.get_each, store)):
        for page in read:
            page[0][:] = bytes(500)
        assert get_each(keys(16), read) == readable
        same = [b"".join(new) == b"".join(old) for new, old in zip(read, written, strict=True)]
        assert same == readable
    assert gained["misses_missing"] == 2 * len(gaps)
    store.delete([key(7)])
    assert store.set_each(keys(16), written) == [True] * 16
    assert store.batch_get(keys(16), read) == 16
    assert store.exists_each([]) == store.get_each([], []) == store.set_each([], []) == []


def test_a_key_that_stands_twice_in_a_batch_fills_both_pages(backend: MooncakeBackend) -> None:
    memory = registered(backend, 1 << 16)
    backend.batch_set(keys(2), [page_of(memory, 0, 100), page_of(memory, 100, 100)])
    targets = [page_of(memory, 4096 * n, 100) for n in range(1, 4)]
    assert backend.batch_get([key(0), key(1), key(0)], targets) == 3
    assert [bytes(page[0]) for page in targets] == [
        bytes(memory[:100]),
        bytes(memory[100:200]),
        bytes(memory[:100]),
    ]


@pytest.mark.parametrize("sizes", [(99,), (101,), (64, 35), (64, 37)])
def test_an_object_of_another_size_than_its_page_is_a_miss(
    backend: MooncakeBackend, sizes: tuple[int, ...]
) -> None:
    memory = registered(backend, 1 << 16)
    backend.batch_set(keys(1), [page_of(memory, 0, 100)])
    assert backend.batch_get(keys(1), [page_of(memory, 4096, *sizes, gap=8)]) == 0
    assert backend.exists(key(0))


def test_the_first_value_of_a_key_stays(backend: MooncakeBackend) -> None:
    backend.set(key(0), b"first")
    backend.set(key(0), b"second")
    assert backend.get(key(0)) == b"first"


def test_an_empty_object_is_kept_apart_from_every_other(backend: MooncakeBackend) -> None:
    memory = registered(backend, 4096)
    other = bytearray(EMPTY)
    other[0] ^= 1
    backend.set(key(0), b"")
    backend.set(key(1), bytes(other))
    assert backend.get(key(0)) == b""
    assert backend.get(key(1)) == bytes(other)
    assert backend.exists(key(0))

    assert backend.batch_set([key(2), key(3)], [(), page_of(memory, 0, 0)]) == 2
    assert backend.batch_get([key(0), key(2), key(3)], [(), (), page_of(memory, 0, 0)]) == 3
    assert backend.batch_get([key(0)], [page_of(memory, 0, 16)]) == 0
    assert backend.batch_get([key(1)], [()]) == 0
    assert backend.batch_get([key(1)], [page_of(memory, 100, 16)]) == 1
    assert memory[100:116] == other


def test_the_bytes_that_stand_for_an_empty_object_are_refused(backend: MooncakeBackend) -> None:
    memory = registered(backend, 4096)
    memory[:16] = EMPTY
    with pytest.raises(BackendError, match="represent an empty object"):
        backend.set(key(0), EMPTY)
    with pytest.raises(BackendError, match="represent an empty object"):
        backend.batch_set([key(0)], [page_of(memory, 0, 16)])
    assert not backend.exists(key(0))


def test_memory_that_was_never_registered_is_staged_counted_and_logged_once(
    unregistered: MooncakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend = unregistered
    gained = Gained(backend)
    caplog.set_level(logging.INFO, "hicache_mooncake")
    memory = memoryview(bytearray(os.urandom(40_000)))
    written = [page_of(memory, n * 1000, 64, 936) for n in range(10)]
    read = [page_of(memory, 20_000 + n * 1000, 500, 500) for n in range(10)]
    assert backend.batch_set(keys(10), written) == 10
    assert backend.batch_get(keys(10), read) == 10
    assert memory[20_000:30_000] == memory[:10_000]
    assert gained["staged_pages"] == 20
    assert gained["staged_nbytes"] == 20_000
    assert sum("staging buffer" in record.message for record in caplog.records) == 1


def test_the_staging_buffer_grows_to_its_limit_and_no_further(
    master: object, make_backend: Callable[..., MooncakeBackend]
) -> None:
    backend = make_backend(master.address, staging_nbytes="4MiB")  # type: ignore[attr-defined]
    for n, size in enumerate([10, 1 << 20, (1 << 20) + 1, 4 << 20]):
        value = os.urandom(size)
        backend.delete([key(n)])
        backend.set(key(n), value)
        assert backend.get(key(n)) == value
    with pytest.raises(BackendError, match="staging_nbytes"):
        backend.set(key(9), bytes((4 << 20) + 1))


def test_a_page_outside_registered_memory_is_refused_once_memory_is_registered(
    backend: MooncakeBackend,
) -> None:
    memory = registered(backend, 4096)
    foreign = memoryview(bytearray(4096))
    for call in (backend.batch_set, backend.batch_get):
        with pytest.raises(IntegrityError, match="page 1 of 2 is outside"):
            call(keys(2), [page_of(memory, 0, 64), (memory[:64], foreign[:64])])
    assert backend.batch_exists(keys(2)) == 0


@pytest.mark.parametrize("required", [True, False])
def test_require_registered_overrides_what_registration_implies(
    master: object, make_backend: Callable[..., MooncakeBackend], required: bool
) -> None:
    backend = make_backend(master.address, require_registered=required)  # type: ignore[attr-defined]
    backend.clear("")
    page = (memoryview(bytearray(64)),)
    if required:
        with pytest.raises(IntegrityError, match="register_memory"):
            backend.batch_set(keys(1), [page])
    else:
        registered(backend, 4096)
        assert backend.batch_set(keys(1), [page]) == 1


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_no_page_of_the_real_host_pool_is_ever_staged(
    backend: MooncakeBackend, layout: str
) -> None:
    gained = Gained(backend)
    spec = KVSpec.mha(num_layers=3, num_heads=2, head_dim=8, dtype="bfloat16", fingerprint="test")
    pool = HostPool(spec, 4, 16, layout_named(layout))
    sealed = SealedBackend(backend)
    backend.register_memory(pool.buffers)
    try:
        ids = array("i", range(8))
        pages = pool.pages(ids)
        contents = []
        for page in pages:
            for segment in page[1:]:
                segment[:] = os.urandom(segment.nbytes)
            contents.append(b"".join(page[1:]))
        assert sealed.batch_set(keys(8), pages) == 8
        target = pool.pages(array("i", range(15, 7, -1)))
        assert sealed.batch_get(keys(8), target) == 8
        assert [b"".join(page[1:]) for page in target] == contents
        assert gained["staged_pages"] == 0
    finally:
        del pages, target, page, segment
        pool.close()


def test_overlapping_memory_is_refused(backend: MooncakeBackend) -> None:
    memory = registered(backend, 4096)
    with pytest.raises(IntegrityError, match="overlaps"):
        backend.register_memory([memory[1024:2048]])


def test_a_read_that_outlives_its_lease_is_a_miss(
    make_master: Callable[..., object], make_backend: Callable[..., MooncakeBackend]
) -> None:
    server = make_master(lease_ms=0)
    backend = make_backend(server.address)  # type: ignore[attr-defined]
    gained = Gained(backend)
    memory = registered(backend, 8192)
    assert backend.batch_set(keys(2), [page_of(memory, n * 64, 64) for n in range(2)]) == 2
    assert backend.batch_get(keys(2), [page_of(memory, n * 64, 64) for n in range(2)]) == 0
    assert gained["misses_leases_expired"] == 1


def test_a_full_store_drops_writes_counts_them_and_goes_on(
    make_master: Callable[..., object], make_backend: Callable[..., MooncakeBackend]
) -> None:
    server = make_master()  # its own, since a full store goes on evicting for a while
    backend = make_backend(server.address)  # type: ignore[attr-defined]
    gained = Gained(backend)
    size = 8 << 20
    memory = registered(backend, size)
    n_stored = backend.batch_set(keys(16), [page_of(memory, 0, size)] * 16)
    assert 0 < n_stored < 16
    assert gained["dropped_writes"] == 16 - n_stored
    with pytest.raises(BackendFull, match="global_segment_size"):
        backend.set(key(99), bytes(60 << 20))
    backend.clear("")
    assert backend.batch_set(keys(2, 200), [page_of(memory, 0, size)] * 2) == 2
    gained = Gained(backend)
    stored = backend.set_each(keys(16), [page_of(memory, 0, size)] * 16)
    assert 0 < sum(stored) < 16
    assert gained["dropped_writes"] == gained["dropped_no_room"] == stored.count(False)
    there = backend.get_each(keys(16), [page_of(memory, 0, size)] * 16)
    assert not any(is_there for is_there, was in zip(there, stored, strict=True) if not was)


def test_an_object_under_lease_can_be_deleted(backend: MooncakeBackend) -> None:
    backend.set(key(0), b"value")
    assert backend.get(key(0)) == b"value"
    backend.delete(keys(3))
    assert not backend.exists(key(0))
    backend.delete([])


def test_clear_removes_what_has_the_prefix_and_nothing_else(backend: MooncakeBackend) -> None:
    for name in ("aaaa/1", "aaaa/2", "aaab/1", "baaaa/1"):
        backend.set(name, b"x")
    assert backend.clear("aaaa/") == 2
    assert [backend.exists(name) for name in ("aaaa/1", "aaab/1", "baaaa/1")] == [
        False,
        True,
        True,
    ]
    assert backend.clear("nothing/") == 0


def test_keys_and_pages_must_be_as_many(backend: MooncakeBackend) -> None:
    with pytest.raises(ValueError, match="2 keys do not fit 1 pages"):
        backend.batch_get(keys(2), [(memoryview(bytearray(1)),)])
    assert backend.batch_get([], []) == backend.batch_set([], []) == backend.batch_exists([]) == 0


def test_the_caller_may_reuse_its_buffer_when_batch_set_returns(backend: MooncakeBackend) -> None:
    memory = registered(backend, 2 << 20)
    for n in range(20):
        memory[: 1 << 20] = bytes([n]) * (1 << 20)
        assert backend.batch_set([key(n)], [page_of(memory, 0, 1 << 20)]) == 1
    for n in range(20):
        assert backend.batch_get([key(n)], [page_of(memory, 1 << 20, 1 << 20)]) == 1
        assert memory[1 << 20 :] == bytes([n]) * (1 << 20)


def test_many_threads_share_one_client(backend: MooncakeBackend) -> None:
    memory = registered(backend, 8 << 20)
    wrong: list[int] = []

    def work(worker: int) -> None:
        base = worker << 20
        names = keys(8, worker * 100)
        pages = [page_of(memory, base + n * 65536, 64, 65000) for n in range(8)]
        value = [b"".join(page) for page in pages]
        for _ in range(5):
            if backend.batch_set(names, pages) != 8 or backend.batch_get(names, pages) != 8:
                wrong.append(worker)
        backend.set(key(1000 + worker), bytes([worker]) * 70_000)
        if backend.get(key(1000 + worker)) != bytes([worker]) * 70_000:
            wrong.append(worker)
        if [b"".join(page) for page in pages] != value:
            wrong.append(worker)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_soft_pinned_replicated_preferred_object_is_an_ordinary_hit(
    master: object, make_backend: Callable[..., MooncakeBackend]
) -> None:
    first = make_backend(master.address)  # type: ignore[attr-defined]
    backend = make_backend(
        master.address,  # type: ignore[attr-defined]
        replica_num=2,
        soft_pin=True,
        soft_pin_ttl_s=60,
        preferred_segment="127.0.0.1:1",
        global_segment_size=0,
    )
    backend.clear("")
    backend.set(key(0), b"value")
    assert first.get(key(0)) == b"value"
    assert backend.client.replication.replica_num == 2
    assert backend.client.replication.soft_pin_ttl_ms == 60_000


def test_tenants_do_not_see_each_other(
    make_master: Callable[..., object],
    make_backend: Callable[..., MooncakeBackend],
    tmp_path: Path,
) -> None:
    quotas = tmp_path / "quotas.yaml"
    tenants = [{"name": name, "quota": "16MB"} for name in ("default", "ours", "theirs")]
    quotas.write_text(json.dumps({"version": 1, "tenants": tenants}))
    flags = ["--enable_multi_tenants=true", f"--tenant_quota_connector_uri={quotas}"]
    server = make_master(flags=flags)
    address = server.address  # type: ignore[attr-defined]
    ours = make_backend(address, tenant_id="ours")
    theirs = make_backend(address, tenant_id="theirs", global_segment_size=0)
    ours.set(key(0), b"value")
    assert ours.get(key(0)) == b"value"
    assert theirs.get(key(0)) is None
    assert not theirs.exists(key(0))


def test_a_closed_backend_can_be_opened_again(
    master: object, make_backend: Callable[..., MooncakeBackend]
) -> None:
    backend = make_backend(master.address, require_registered=True)  # type: ignore[attr-defined]
    memory = registered(backend, 4096)
    page = page_of(memory, 0, 100)
    assert backend.batch_set([key(7)], [page]) == 1
    backend.close()
    backend.open()
    assert backend.stats()["registered_nbytes"] == 0
    backend.register_memory([memory])
    assert backend.batch_set([key(8)], [page]) == 1
    assert backend.batch_get([key(8)], [page]) == 1
