"""SGLang's pools and a store: what is answered, what is written, and whose pages are whose."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.errors import ConfigError
from hicache_core.integrations.foreign.opening import open_store
from hicache_core.integrations.foreign.store import ForeignStore
from hicache_core.integrations.sglang import hits
from hicache_core.integrations.sglang.namespace import (
    ServedModel,
    is_shared,
    is_writer,
    namespace_of,
    rank_of,
)
from hicache_core.integrations.sglang.pools import LAYOUTS, pages_of
from hicache_core.integrations.sglang.settings import check_version, read_settings
from hicache_core.integrations.sglang.store import PoolStore
from hicache_core.integrations.sglang.traffic import Traffic
from tests.unit.integrations.sglang_pools import (
    PAGE_SIZE,
    Pool,
    PoolOfSlots,
    PoolWithoutAddresses,
    content,
    slots,
    storage_config,
)

MODEL = ServedModel("name:a model", {}, "0.5.23")
KEYS = [hashlib.sha256(bytes([n])).hexdigest() for n in range(8)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ForeignStore]:
    opened = open_store("file", {"path": str(tmp_path)})
    yield opened
    opened.close()


def pool_store(store: ForeignStore, pool: Pool, name: str = "kv", **changed: Any) -> PoolStore:
    """A store with one pool; ``stores`` and the fields of the storage config may be changed."""
    pools = PoolStore(store, Traffic(counts=True))
    add(pools, pool, name, **changed)
    return pools


def add(pools: PoolStore, pool: Pool, name: str, stores: bool = True, **changed: Any) -> None:
    pages = pages_of(pool, flat=True)
    namespace = namespace_of(storage_config(**changed), pages, name, MODEL)
    pools.add(name, pages, namespace, stores=stores)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_one_path_stores_the_other_reads(store: ForeignStore, layout: str) -> None:
    pool = Pool(layout)
    pools = pool_store(store, pool)
    saved = content(pool, 0), content(pool, 1)
    assert pools.save("kv", KEYS[:1], slots([0])) == [True]
    assert pools.save_tensors("kv", KEYS[1:2], [pool.get_data_page(PAGE_SIZE)]) == [True]
    assert pools.load("kv", KEYS[:3], slots([4, 5, 6])) == [True, True, False]
    assert (content(pool, 4), content(pool, 5)) == saved
    targets = [pool.get_dummy_flat_data_page() for _ in range(3)]
    assert pools.load_tensors("kv", [KEYS[2], *KEYS[:2]], targets) == [False, True, True]
    assert tuple(bytes(one.view(torch.uint8).numpy()) for one in targets[1:]) == saved


def test_pages_that_are_stored_are_not_written_again(store: ForeignStore) -> None:
    pool = Pool()
    pools = pool_store(store, pool)
    assert pools.save("kv", KEYS[1:3], slots([1, 2])) == [True, True]
    first = content(pool, 1)
    pool.kv_buffer.zero_()
    pool.kv_buffer[0, 3 * PAGE_SIZE] = 1.0
    assert pools.save("kv", KEYS[:4], slots([0, 1, 2, 3])) == [True] * 4
    written = pools._traffic.take()
    assert written is not None
    assert written.backup_pgs == [2, 2]
    expected = [bytes(len(first)), first, content(pool, 3)]
    assert pools.load("kv", [KEYS[0], KEYS[1], KEYS[3]], slots([4, 5, 6])) == [True] * 3
    assert [content(pool, n) for n in (4, 5, 6)] == expected


def test_a_damaged_page_is_refused_and_then_stored_anew(
    store: ForeignStore, tmp_path: Path
) -> None:
    pool = Pool()
    pools = pool_store(store, pool)
    assert pools.save("kv", KEYS[:2], slots([0, 1])) == [True, True]
    needle = content(pool, 1)[:64]
    damaged = 0
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        data = file.read_bytes()
        if needle in data:
            file.write_bytes(data.replace(needle, bytes(64)))
            damaged += 1
    assert damaged == 1
    assert pools.load("kv", KEYS[:2], slots([4, 5])) == [True, False]
    assert content(pool, 4) == content(pool, 0)
    assert pools.save("kv", KEYS[:2], slots([0, 1])) == [True, True]
    assert pools.load("kv", KEYS[:2], slots([4, 5])) == [True, True]
    assert content(pool, 5) == content(pool, 1)


def test_leading_pages_are_counted_over_more_keys_than_one_question_has(
    store: ForeignStore,
) -> None:
    pools = pool_store(store, PoolOfSlots())
    keys = [hashlib.sha256(b"long %d" % n).hexdigest() for n in range(1300)]
    assert pools.n_leading("kv", keys) == 0
    present = keys[:1100] + keys[1200:]
    assert all(pools.save("kv", present, slots([0] * len(present))))
    assert pools.n_leading("kv", keys) == 1100
    assert pools.n_leading("kv", keys[:1100]) == 1100
    assert pools.n_leading("kv", []) == 0
    assert sum(pools.present("kv", keys)) == len(present)


def test_nothing_raises_on_the_way_of_a_page(store: ForeignStore) -> None:
    pool: Any = PoolWithoutAddresses()
    pools = pool_store(store, pool)
    assert pools.save("kv", KEYS[:1], slots([0])) == [True]
    unknown = pools.save("swa", KEYS, slots(range(8))), pools.load("swa", KEYS, slots(range(8)))
    assert unknown == ([False] * 8, [False] * 8)
    assert pools.present("swa", KEYS) == [False] * 8
    for indices in (None, torch.arange(3)):
        assert pools.save("kv", KEYS[:2], indices) == [False, False]
        assert pools.load("kv", KEYS[:2], indices) == [False, False]
    # a tensor of another size is no page: the stored one stays as it is
    assert pools.load_tensors("kv", KEYS[:1], [torch.zeros(2)]) == [False]
    assert pools.save_tensors("kv", KEYS[1:2], [torch.zeros(2)]) == [False]
    assert pools.load("kv", KEYS[:1], slots([1])) == [True]

    def broken(*_: object) -> None:
        raise RuntimeError("a pool of another version")

    pool.get_data_page = pool.set_from_flat_data_page = broken
    assert pools.save("kv", KEYS[1:2], slots([1])) == [False]
    assert pools.load("kv", KEYS[:1], slots([1])) == [False]


def test_a_closed_store_has_nothing_and_closes_twice(store: ForeignStore) -> None:
    pool = Pool()
    pools = pool_store(store, pool)
    assert pools.save("kv", KEYS[:1], slots([0])) == [True]
    pools.close()
    pools.close()
    assert pools.pages("kv") is None
    assert pools.n_leading("kv", KEYS) == 0
    assert pools.load("kv", KEYS[:1], slots([1])) == [False]
    assert pools.save("kv", KEYS[:1], slots([0])) == [False]
    assert pools.load_tensors("kv", KEYS[:1], [pool.get_dummy_flat_data_page()]) == [False]
    assert pools.save_tensors("kv", KEYS[:1], [pool.get_data_page(0)]) == [False]


def test_clear_removes_the_pages_of_the_registered_pools_alone(store: ForeignStore) -> None:
    pools = pool_store(store, Pool())
    add(pools, Pool(), "swa")
    other = pool_store(store, Pool(), tp_rank=1, tp_size=2)
    for one, name in ((pools, "kv"), (pools, "swa"), (other, "kv")):
        assert one.save(name, KEYS[:1], slots([0])) == [True]
    assert pools.clear()
    assert [pools.n_leading(name, KEYS) for name in ("kv", "swa")] == [0, 0]
    assert other.n_leading("kv", KEYS) == 1


def test_a_rank_that_does_not_store_says_yes_and_stores_nothing(store: ForeignStore) -> None:
    pool = Pool()
    pools = pool_store(store, pool, stores=False)
    assert pools.save("kv", KEYS[:2], slots([0, 1])) == [True, True]
    assert pools.save_tensors("kv", KEYS[:1], [pool.get_data_page(0)]) == [True]
    assert pools.n_leading("kv", KEYS) == 0


def test_pools_ranks_and_shapes_never_answer_for_each_other(store: ForeignStore) -> None:
    made = [pool_store(store, Pool())]
    made += [pool_store(store, Pool(layout)) for layout in LAYOUTS if layout != "page_first"]
    made.append(pool_store(store, Pool(), tp_rank=0, tp_size=2))
    made.append(pool_store(store, Pool(), tp_rank=1, tp_size=2))
    made.append(pool_store(store, Pool(), pp_rank=1, pp_size=2))
    made.append(pool_store(store, Pool(), attn_cp_rank=1, attn_cp_size=2))
    float16: Any = Pool()
    float16.dtype = torch.float16
    fewer: Any = Pool()
    fewer.head_num, fewer.head_dim = 1, 16
    made += [pool_store(store, float16), pool_store(store, fewer)]
    for writer in made:
        assert writer.save("kv", KEYS[:1], slots([0])) == [True]
        assert [one.n_leading("kv", KEYS[:1]) for one in made] == [int(x is writer) for x in made]
        assert writer.clear()
    replica = pool_store(store, Pool(), dp_rank=1)
    assert made[0].save("kv", KEYS[:1], slots([0])) == [True]
    assert replica.n_leading("kv", KEYS) == 1


def test_with_mla_one_rank_stores_but_state_and_heads_are_shares() -> None:
    latent: Any = Pool()
    del latent.head_num
    pages, heads = pages_of(latent, flat=True), pages_of(Pool(), flat=True)
    ranks = [storage_config(is_mla_model=True, tp_rank=rank, tp_size=2) for rank in (0, 1)]
    for name in ("kv", "swa", "indexer"):
        assert is_shared(ranks[0], pages, name)
        assert len({namespace_of(rank, pages, name, MODEL).digest for rank in ranks}) == 1
    for its_pages, name in ((pages, "mamba"), (heads, "draft")):
        assert not is_shared(ranks[0], its_pages, name)
        assert len({namespace_of(rank, its_pages, name, MODEL).digest for rank in ranks}) == 2
    assert [is_writer(rank) for rank in ranks] == [True, False]
    assert all(is_writer(storage_config(tp_rank=rank, tp_size=2)) for rank in (0, 1))
    assert is_writer(storage_config(is_mla_model=True, tp_rank=1, is_storage_writer=True))


def test_each_process_of_a_server_has_a_rank_of_its_own() -> None:
    ranks = [
        rank_of(
            storage_config(
                dp_rank=dp,
                pp_rank=pp,
                pp_size=2,
                attn_cp_rank=cp,
                attn_cp_size=3,
                tp_rank=tp,
                tp_size=2,
            )
        )
        for dp in range(2)
        for pp in range(2)
        for cp in range(3)
        for tp in range(2)
    ]
    assert sorted(ranks) == list(range(24))


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 6), st.integers(1, 4))
def test_restorable_prefixes_are_those_whose_needed_pages_are_present(
    present: list[bool], window: int, group: int
) -> None:
    lengths = range(1, len(present) + 1)
    assert hits.all_pages(present) == [n for n in lengths if all(present[:n])]
    assert hits.trailing_pages(present, window) == [
        n for n in lengths if all(present[max(0, n - window) : n])
    ]
    whole = 0
    while len(present[whole : whole + group]) == group and all(present[whole : whole + group]):
        whole += group
    assert hits.block_groups(present, 5, group) == whole // group * 5
    assert hits.block_groups(present, 5, 0) == 0


def test_traffic_is_told_once_and_only_if_somebody_asks() -> None:
    traffic = Traffic(counts=True)
    traffic.read(3, 10**9, 2.0)
    traffic.read(0, 10**9, 2.0)
    traffic.written(4, 10**9, 2.0)
    moved = traffic.take()
    assert moved is not None
    assert (moved.prefetch_pgs, moved.prefetch_bandwidth) == ([3], [1.5])
    assert (moved.backup_pgs, moved.backup_bandwidth) == ([4], [2.0])
    again = traffic.take()
    assert again is not None
    assert again.prefetch_pgs == []
    silent = Traffic(counts=False)
    silent.read(3, 10**9, 2.0)
    assert silent.take() is None


def test_settings_name_what_is_wrong() -> None:
    named = {"backend_name": "hicache", "module_path": "m", "class_name": "HiCacheBackend"}
    settings = read_settings({**named, "interface_v1": 1, "backend": "file"})
    assert settings.interface_v1
    assert settings.backend_config == {}
    text = read_settings({"backend": "redis", "backend_config": '{"url": "redis://x"}'})
    assert text.backend_config == {"url": "redis://x"}
    assert not text.interface_v1
    for wrong, message in (
        ({}, r"extra_config\.backend: this setting is required .*such as \"file\" or \"redis\""),
        (None, "backend: this setting is required"),
        ({"backend": "file", "bakend_config": {}}, "did you mean 'backend_config'"),
        ({"backend": "file", "backend_config": "{"}, "backend_config: text is not valid JSON"),
        ({"backend": "file", "interface_v1": "yes"}, "interface_v1 = 'yes'.*true or false"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_settings(wrong)


@pytest.mark.parametrize("version", ["0.5.22", "0.5.23", "0.5.23.post1"])
def test_tested_versions_are_taken(version: str) -> None:
    check_version(version, allow_untested=False)


@pytest.mark.parametrize("version", ["0.5.21", "0.5.24", "0.6.0", "0.0.0.dev0", "main"])
def test_other_versions_are_refused_unless_allowed(version: str) -> None:
    check_version(version, allow_untested=True)
    with pytest.raises(ConfigError, match=f"SGLang is {version}, .* 0.5.22 to 0.5.23; .*untested"):
        check_version(version, allow_untested=False)
