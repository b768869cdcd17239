"""Rules of head groups: the same objects, whoever holds how many heads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_core.errors import BackendTimeout, SpecError, UseAfterClose
from hicache_core.kv.keys import storage_namespace
from hicache_core.kv.spec import Component, KVSpec
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS
from hicache_core.storage.base import Clearable, Listable, Pins, RegistersMemory
from hicache_core.storage.heads.cut import HeadCut, head_group_namespaces
from hicache_core.storage.heads.groups import HeadGroupBackend
from hicache_core.storage.memory import MemoryBackend, MemoryConfig
from hicache_core.storage.sealed import SealedBackend
from hicache_core.storage.segments import join
from hicache_core.testing.faults import StuckBackend
from hicache_core.testing.harness import required
from hicache_core.types import BackendContext, Page

PAGE_SIZE = 4
MHA = KVSpec.mha(num_layers=3, num_heads=8, head_dim=4, dtype="bfloat16", fingerprint="f")
UNEQUAL = KVSpec.mha(
    num_layers=2, num_heads=8, head_dim=6, v_head_dim=4, dtype="float32", fingerprint="f"
)
FP8 = KVSpec.mha(
    num_layers=3,
    num_heads=8,
    head_dim=5,
    dtype="float8_e4m3fn",
    scale_dtype="float32",
    fingerprint="f",
)
BY_LAYER = KVSpec(
    (
        Component("k", (8, 3), "bfloat16", (0, 2)),
        Component("k_1", (16, 5), "int8", (1,)),
        Component("indexer_k", (1, 7), "int8", (0, 1)),
        Component("norm", (9,), "int8"),
    ),
    3,
    "f",
    (0, 3),
    (0, 8, 8),
)
SPECS = {
    "mha": MHA,
    "k and v of unequal width": UNEQUAL,
    "fp8 with scales": FP8,
    "layers that differ": BY_LAYER,
}
N_PAGES = 5
HASHES = [hashlib.sha256(bytes([n])).hexdigest() for n in range(N_PAGES)]


def memory() -> MemoryBackend:
    return MemoryBackend(MemoryConfig(), BackendContext(namespace="0" * 16))


def objects(backend: MemoryBackend) -> dict[str, bytes]:
    return {key: bytes(backend.get(key) or b"") for key in backend.list_keys("")}


class Rank:
    """A rank's host pool, whose rows say which page, component, layer, token and head they are."""

    def __init__(self, spec: KVSpec, layout: str, *, filled: bool = True) -> None:
        self.spec, self.layout = spec, layout
        self.pool = HostPool(spec, PAGE_SIZE, N_PAGES, LAYOUTS[layout])
        self.ids = self.pool.allocator.allocate(N_PAGES)
        prefix = storage_namespace(spec.identity(), PAGE_SIZE, layout) + "/"
        self.keys = [prefix + page_hash for page_hash in HASHES]
        if filled:
            for component in range(len(spec.components)):
                self.pool.rows(component).copy_(torch.from_numpy(self.expected(component)))

    @property
    def pages(self) -> Sequence[Page]:
        return self.pool.pages(self.ids)

    def expected(self, component: int) -> np.ndarray:
        """What ``rows`` must show; bytes are a function of where in the model they belong."""
        kind = self.spec.components[component]
        start, stop, total = self.spec.heads
        head_nbytes = kind.row_nbytes // (stop - start)
        if self.spec.is_shared(kind):  # the same whole row, whichever heads are held
            start, stop, total, head_nbytes = 0, 1, 1, kind.row_nbytes
        n_layers = len(self.spec.layers_of(kind))
        shape = (N_PAGES, n_layers, PAGE_SIZE, total, head_nbytes)
        rng = np.random.default_rng(component)
        whole = rng.integers(0, 256, shape, dtype=np.uint8)
        return np.ascontiguousarray(whole[:, :, :, start:stop]).reshape(*shape[:3], -1)

    def check(self, n_pages: int = N_PAGES) -> None:
        for component in range(len(self.spec.components)):
            found = self.pool.rows(component).numpy()[:n_pages]
            np.testing.assert_array_equal(found, self.expected(component)[:n_pages])

    def grouped(self, inner: object, group: int, **settings: object) -> HeadGroupBackend:
        backend = HeadGroupBackend(
            inner, self.spec, PAGE_SIZE, self.layout, group=group, n_slots=2, **settings
        )
        backend.open()
        return backend


@pytest.fixture
def store() -> Iterator[MemoryBackend]:
    backend = memory()
    backend.open()
    yield backend
    backend.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_objects_of_two_ranks_are_those_of_four(spec: KVSpec, layout: str) -> None:
    """Keys and bytes: what TP 2 stores in groups of 2 is what TP 4 stores without groups."""
    by_two, by_four = memory(), memory()
    by_four.open()
    for start in (0, 4):
        rank = Rank(spec.shard(heads=(start, start + 4)), layout)
        assert rank.grouped(SealedBackend(by_two), 2).batch_set(rank.keys, rank.pages) == N_PAGES
    for start in (0, 2, 4, 6):
        rank = Rank(spec.shard(heads=(start, start + 2)), layout)
        assert SealedBackend(by_four).batch_set(rank.keys, rank.pages) == N_PAGES
    assert len(objects(by_two)) == 4 * N_PAGES
    assert objects(by_two) == objects(by_four)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_what_one_fleet_stored_another_reads(spec: KVSpec, layout: str, group: int) -> None:
    """TP 1 stores, ranks that hold two groups or one read their own heads."""
    store = memory()
    whole = Rank(spec, layout)
    backend = whole.grouped(SealedBackend(store), group)
    assert backend.batch_set(whole.keys, whole.pages) == N_PAGES
    for n_heads in {group, min(8, 2 * group)}:
        for start in range(0, 8, n_heads):
            rank = Rank(spec.shard(heads=(start, start + n_heads)), layout, filled=False)
            reader = rank.grouped(SealedBackend(store), group)
            assert reader.batch_exists(rank.keys) == N_PAGES
            assert reader.batch_get(rank.keys, rank.pages) == N_PAGES
            rank.check()


def test_without_groups_no_two_fleets_share_a_key() -> None:
    namespaces = [
        storage_namespace(MHA.shard(heads=(start, start + n)).identity(), PAGE_SIZE, "page_first")
        for n in (1, 2, 4, 8)
        for start in range(0, 8, n)
    ]
    assert len(set(namespaces)) == len(namespaces)


def test_the_groups_of_a_rank_have_the_namespaces_of_ranks_that_hold_them() -> None:
    rank = MHA.shard(layers=(1, 3), heads=(4, 8))
    assert head_group_namespaces(rank, PAGE_SIZE, "page_first", 2) == [
        storage_namespace(MHA.shard(layers=(1, 3), heads=heads).identity(), PAGE_SIZE, "page_first")
        for heads in ((4, 6), (6, 8))
    ]


@pytest.mark.parametrize(
    ("heads", "group"), [((0, 8), 3), ((0, 8), 0), ((0, 2), 4), ((2, 6), 4), ((0, 8), 16)]
)
def test_groups_that_do_not_fit_the_heads_are_refused(heads: tuple[int, int], group: int) -> None:
    spec = MHA.shard(heads=heads)
    with pytest.raises(SpecError, match=f"storage_head_group {group} does not cut KV heads"):
        head_group_namespaces(spec, PAGE_SIZE, "page_first", group)
    with pytest.raises(SpecError, match="storage_head_group"):
        HeadCut(spec, PAGE_SIZE, LAYOUTS["page_first"], group)


def test_a_group_has_no_part_of_a_head() -> None:
    """k_1 has half as many heads as the model."""
    k_1 = Component("k_1", (4, 5), "int8", (1,))
    spec = KVSpec((*MHA.components, k_1), 3, "f", (0, 3), (0, 8, 8))
    HeadCut(spec, PAGE_SIZE, LAYOUTS["page_first"], 2)
    with pytest.raises(SpecError, match="component 'k_1': its 4 heads cannot be divided"):
        HeadCut(spec, PAGE_SIZE, LAYOUTS["page_first"], 1)


def test_a_latent_is_one_group_and_no_more() -> None:
    spec = KVSpec.mla(num_layers=2, kv_lora_rank=8, rope_dim=4, dtype="bfloat16", fingerprint="f")
    whole = storage_namespace(spec.identity(), PAGE_SIZE, "page_first")
    assert head_group_namespaces(spec, PAGE_SIZE, "page_first", 1) == [whole]
    with pytest.raises(SpecError, match="MLA"):
        head_group_namespaces(spec, PAGE_SIZE, "page_first", 2)


def test_a_page_counts_only_with_all_of_its_groups(store: MemoryBackend) -> None:
    """And a page that does not count is not written to."""
    rank = Rank(MHA, "page_first")
    backend = rank.grouped(SealedBackend(store), 2)
    backend.batch_set(rank.keys, rank.pages)
    store.delete([backend.inner_keys([rank.keys[2]])[3]])
    assert backend.batch_exists(rank.keys) == 2
    assert not backend.exists(rank.keys[2])
    assert backend.get(rank.keys[2]) is None
    reader = Rank(MHA, "page_first", filled=False)
    assert backend.batch_get(reader.keys, reader.pages) == 2
    reader.check(2)
    assert not reader.pool.rows(0)[2].any()


def test_pages_behind_one_that_lacks_a_group_are_read(store: MemoryBackend) -> None:
    """And a page that does not count is not written to."""
    rank = Rank(MHA, "page_first")
    backend = rank.grouped(SealedBackend(store), 2)
    assert list(backend.set_each(rank.keys, rank.pages)) == [True] * N_PAGES
    for lacking, group in ((0, 3), (2, 0)):
        store.delete([backend.inner_keys([rank.keys[lacking]])[group]])
    mask = [n not in (0, 2) for n in range(N_PAGES)]
    assert list(backend.exists_each(rank.keys)) == mask
    reader = Rank(MHA, "page_first", filled=False)
    assert list(backend.get_each(reader.keys, reader.pages)) == mask
    for component in range(len(MHA.components)):
        found, expected = reader.pool.rows(component).numpy(), rank.expected(component)
        for n, is_filled in enumerate(mask):
            np.testing.assert_array_equal(found[n], expected[n] if is_filled else 0 * expected[n])
    assert backend.exists_each([]) == backend.get_each([], []) == backend.set_each([], []) == []


@settings(max_examples=25, deadline=None)
@given(st.sets(st.tuples(st.integers(0, N_PAGES - 1), st.integers(0, 3))))
def test_each_page_is_there_exactly_if_its_four_groups_are(missing: set[tuple[int, int]]) -> None:
    rank, store = Rank(MHA, "page_first"), memory()
    backend = rank.grouped(SealedBackend(store), 2)
    backend.set_each(rank.keys, rank.pages)
    for n, group in missing:
        store.delete([backend.inner_keys([rank.keys[n]])[group]])
    alone = [backend.exists(key) for key in rank.keys]
    assert alone == [all((n, group) not in missing for group in range(4)) for n in range(N_PAGES)]
    assert list(backend.exists_each(rank.keys)) == alone
    assert list(backend.get_each(rank.keys, rank.pages)) == alone


def test_a_full_store_takes_whole_pages_behind_one_without_room() -> None:
    class Full(MemoryBackend):
        """Has no room for the third object of each call."""

        def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
            return [
                n != 2 and super(Full, self).batch_set([k], [p]) == 1
                for n, (k, p) in enumerate(zip(keys, pages, strict=True))
            ]

    rank = Rank(MHA, "page_first")
    inner = Full(MemoryConfig(), BackendContext(namespace="0" * 16))
    backend = rank.grouped(SealedBackend(inner), 4)
    assert list(backend.set_each(rank.keys, rank.pages)) == [n != 1 for n in range(N_PAGES)]
    assert list(backend.exists_each(rank.keys)) == [n != 1 for n in range(N_PAGES)]


def test_calls_are_bounded_if_those_of_the_store_are(store: MemoryBackend) -> None:
    """Staging alone bounds nothing: a call that comes back late copies into its page then."""

    class Bounding(MemoryBackend):
        bounds = True

        def bounds_calls(self) -> bool:
            return self.bounds

    inner = Bounding(MemoryConfig(), BackendContext(namespace="0" * 16))
    backend = Rank(MHA, "page_first").grouped(SealedBackend(inner), 2)
    assert backend.bounds_calls()
    inner.bounds = False
    assert not backend.bounds_calls()


def test_a_group_that_is_damaged_is_a_miss_of_its_page(store: MemoryBackend) -> None:
    rank = Rank(MHA, "layer_first")
    backend = rank.grouped(SealedBackend(store), 4)
    backend.batch_set(rank.keys, rank.pages)
    damaged = backend.inner_keys([rank.keys[1]])[1]
    value = bytearray(store.get(damaged) or b"")
    value[-1] ^= 1
    store.set(damaged, value)
    sealed = backend.inner
    assert isinstance(sealed, SealedBackend)
    assert backend.batch_get(rank.keys, rank.pages) == 1
    assert backend.batch_exists(rank.keys) == 1  # the seal removed what it found
    verdicts = [backend.verdict(key, sealed.verdict) for key in rank.keys[:3]]
    assert verdicts == [None, "corrupt", None]


def test_a_full_store_ends_the_count_at_whole_pages() -> None:
    """Room for 5 objects is room for 2 pages of 2 groups."""

    class Full(MemoryBackend):
        def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
            return super().batch_set(keys[:5], pages[:5])

    rank = Rank(MHA, "page_first")
    inner = Full(MemoryConfig(), BackendContext(namespace="0" * 16))
    assert rank.grouped(SealedBackend(inner), 4).batch_set(rank.keys, rank.pages) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_objects_are_whole_payloads(store: MemoryBackend, layout: str) -> None:
    rank = Rank(FP8, layout)
    backend = rank.grouped(SealedBackend(store), 2)
    for key, page in zip(rank.keys, rank.pages, strict=True):
        backend.set(key, join(page[1:]))
        assert bytes(backend.get(key) or b"") == join(page[1:])
    assert backend.batch_exists(rank.keys) == N_PAGES
    reader = Rank(FP8, layout, filled=False)
    assert backend.batch_get(reader.keys, reader.pages) == N_PAGES
    reader.check()
    backend.delete(rank.keys[:1])
    assert not backend.exists(rank.keys[0])
    assert backend.batch_exists(rank.keys[1:]) == N_PAGES - 1


def test_more_pages_than_the_staging_holds_go_in_turns(
    store: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hicache_core.storage.heads.groups.SLOT_NBYTES", 5000)
    rank = Rank(MHA, "page_first")
    backend = rank.grouped(SealedBackend(store), 2)
    assert backend.staging_nbytes < 2 * 5000 < 2 * N_PAGES * MHA.page_nbytes(PAGE_SIZE)
    assert backend.batch_set(rank.keys, rank.pages) == N_PAGES
    reader = Rank(MHA, "page_first", filled=False)
    assert backend.batch_get(reader.keys, reader.pages) == N_PAGES
    reader.check()
    store.delete([backend.inner_keys(rank.keys)[-1]])
    assert backend.batch_get(reader.keys, reader.pages) == N_PAGES - 1
    assert list(backend.set_each(rank.keys[:-1], rank.pages[:-1])) == [True] * (N_PAGES - 1)
    for number in range(len(MHA.components)):
        reader.pool.rows(number).zero_()
    assert list(backend.get_each(reader.keys, reader.pages)) == [n < 4 for n in range(N_PAGES)]
    reader.check(N_PAGES - 1)


def test_threads_do_not_share_staging(store: MemoryBackend) -> None:
    """Eight threads on two slots: each stores and reads pages of its own."""
    inner = SealedBackend(store)
    ranks = [Rank(MHA, "page_first") for _ in range(8)]
    backend = ranks[0].grouped(inner, 2)
    failures: list[object] = []

    def work(number: int, rank: Rank) -> None:
        rank.pool.rows(0).fill_(number)
        prefix = backend.key_prefix
        keys = [prefix + hashlib.sha256(f"{number} {n}".encode()).hexdigest() for n in range(5)]
        for _ in range(20):
            stored = backend.batch_set(keys, rank.pages)
            rank.pool.rows(0).zero_()
            read = backend.batch_get(keys, rank.pages)
            if (stored, read) != (5, 5) or not (rank.pool.rows(0) == number).all():
                failures.append((number, stored, read))

    threads = [threading.Thread(target=work, args=it) for it in enumerate(ranks, start=1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_when_all_staging_is_with_calls_that_hang_the_next_fails_in_bounded_time(
    store: MemoryBackend,
) -> None:
    stuck = StuckBackend(store)
    rank = Rank(MHA, "page_first")
    backend = rank.grouped(SealedBackend(stuck), 2, slot_timeout_s=0.05)
    threads = [
        threading.Thread(target=backend.batch_set, args=(rank.keys, rank.pages)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert stuck.wait_for_calls(2, 5.0)
    with pytest.raises(BackendTimeout, match="2 calls of backend 'memory' have not returned"):
        backend.get_each(rank.keys, rank.pages)
    stuck.release()
    for thread in threads:
        thread.join()
    assert backend.batch_get(rank.keys, rank.pages) == N_PAGES


def test_what_the_store_can_do_is_said_in_pages(store: MemoryBackend) -> None:
    rank = Rank(MHA, "page_first")
    backend = rank.grouped(SealedBackend(store), 2)
    backend.batch_set(rank.keys, rank.pages)
    lists, clears = required(backend, Listable), required(backend, Clearable)
    assert backend.capability(RegistersMemory) is None
    assert sorted(lists.list_keys("")) == sorted(rank.keys)
    assert list(lists.list_keys(rank.keys[3])) == [rank.keys[3]]
    assert list(lists.list_keys("fedcba")) == []
    store.delete([backend.inner_keys(rank.keys[:1])[1]])
    assert sorted(lists.list_keys(backend.key_prefix)) == sorted(rank.keys[1:])
    assert clears.clear("fedcba") == 0
    assert clears.clear(backend.key_prefix) == N_PAGES
    assert not objects(store)


class Registered(MemoryBackend):
    """Wants to know its memory, and pins what it is told to."""

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        self.registered = buffers

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        return sum(self.exists(key) for key in keys)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        (memory,) = [np.frombuffer(buffer, np.uint8) for buffer in self.registered]
        for page in pages:
            for segment in page:
                assert np.shares_memory(memory, np.frombuffer(segment, np.uint8))
        return super().batch_set(keys, pages)


def test_a_transport_registers_the_staging_and_meets_no_other_memory() -> None:
    inner = Registered(MemoryConfig(), BackendContext(namespace="0" * 16))
    rank = Rank(MHA, "layer_first")
    backend = rank.grouped(SealedBackend(inner), 2)
    required(backend, RegistersMemory).register_memory(rank.pool.buffers)
    assert backend.batch_set(rank.keys, rank.pages) == N_PAGES


def test_a_pin_counts_whole_pages() -> None:
    inner = Registered(MemoryConfig(), BackendContext(namespace="0" * 16))
    rank = Rank(MHA, "layer_first")
    backend = rank.grouped(SealedBackend(inner), 2)
    required(backend, RegistersMemory).register_memory(rank.pool.buffers)
    backend.batch_set(rank.keys, rank.pages)
    pins = required(backend, Pins)
    assert pins.pin(rank.keys, 10.0) == N_PAGES
    inner.delete(backend.inner_keys(rank.keys[2:4])[1:6])
    assert pins.pin(rank.keys, 10.0) == N_PAGES - 2


def test_foreign_keys_and_pages_of_another_shape_are_refused(store: MemoryBackend) -> None:
    rank, other = Rank(MHA, "page_first"), Rank(MHA.shard(heads=(0, 4)), "page_first")
    backend = rank.grouped(SealedBackend(store), 2)
    with pytest.raises(ValueError, match="is not a key of this rank"):
        backend.batch_exists(other.keys)
    with pytest.raises(ValueError, match="segments of"):
        backend.batch_set(rank.keys, other.pages)
    with pytest.raises(ValueError, match=r"expected a payload of \d+ bytes, found 3"):
        backend.set(rank.keys[0], b"abc")
    assert not objects(store)
    assert backend.batch_set(rank.keys, rank.pages) == N_PAGES  # no slot was lost


def test_after_close_it_is_closed(store: MemoryBackend) -> None:
    rank = Rank(MHA, "page_first")
    backend = rank.grouped(SealedBackend(store), 2)
    backend.close()
    backend.close()
    with pytest.raises(UseAfterClose):
        backend.batch_get(rank.keys, rank.pages)
