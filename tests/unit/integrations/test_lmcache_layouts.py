"""Which layouts a lookup asks for, and how they are listed in a store."""

from __future__ import annotations

from hicache_core.integrations.foreign.identity import model_identity
from hicache_core.integrations.lmcache.layouts import (
    INDEX_NBYTES,
    MAX_OWN_LAYOUTS,
    N_INDEX_SLOTS,
    ChunkNames,
    KnownLayouts,
    Layout,
    Shard,
    chunk_key,
    decode,
    encode,
    index_slot,
    layout_of,
)
from tests.unit.integrations.lmcache_emulation import BF16, FP32

SHARD = Shard("a/model", 0x01000100, 0)


def layout(width: int) -> Layout:
    return layout_of(((4, 16, width),), (BF16,))


def test_a_layout_has_the_bytes_of_all_its_tensors() -> None:
    both = layout_of(((2, 3, 5), (7,)), (BF16, FP32))
    assert both == Layout(("bfloat16", "float32"), ((2, 3, 5), (7,)), 60 + 28)
    assert (both.chunk_size, layout_of(((7,),), (FP32,)).chunk_size) == (3, 1)
    assert layout_of(((7,),), (FP32,), 20).nbytes == 20


def test_an_own_layout_that_a_lookup_names_is_the_only_candidate() -> None:
    known = KnownLayouts()
    assert known.needs_index(SHARD)
    known.add_listed(SHARD, [layout(1), layout(2)])
    assert not known.needs_index(SHARD)
    assert known.candidates(SHARD, layout(3)) == [layout(3), layout(1), layout(2)]
    assert known.candidates(SHARD, None) == [layout(1), layout(2)]
    known.add_own(SHARD, layout(3))
    assert known.candidates(SHARD, layout(3)) == [layout(3)]
    assert known.candidates(SHARD, layout(4)) == [layout(4), layout(3)]
    assert known.candidates(SHARD, None) == [layout(3)]
    assert known.needs_index(SHARD._replace(object_group_id=1))


def test_only_the_last_own_layouts_are_kept() -> None:
    known = KnownLayouts()
    for width in [*range(10), 8]:
        known.add_own(SHARD, layout(width))
    assert known.candidates(SHARD, None) == [layout(n) for n in (6, 7, 9, 8)]
    assert MAX_OWN_LAYOUTS == 4


def test_an_entry_of_the_index_is_read_as_it_was_written() -> None:
    entry = encode(layout(3))
    assert len(entry) == INDEX_NBYTES
    assert decode(memoryview(entry)) == layout(3)
    assert 0 <= index_slot(layout(3)) < N_INDEX_SLOTS
    for other in (b"", b"\xff", b"[]", b"{}", b'{"dtypes": 1, "shapes": [], "nbytes": 1}'):
        assert decode(other.ljust(INDEX_NBYTES)) is None


def test_the_store_learns_no_salt_and_the_manifest_names_what_a_chunk_is() -> None:
    names = ChunkNames("0.5.6", model_identity, "")
    namespace = names.namespace(SHARD, "a secret salt", layout(3))
    assert "a secret salt" not in namespace.described
    assert (namespace.model, namespace.page_size) == ("name:a/model", 16)
    assert namespace.details["dtypes"] == ("bfloat16",)
    assert names.digest(SHARD, "a secret salt", layout(3)) == namespace.digest
    assert len({names.digest(SHARD, salt, layout(3)) for salt in ("", "a", "b")}) == 3


def test_a_hash_of_32_bytes_is_the_page_hash() -> None:
    assert (
        chunk_key("0123456789abcdef", bytes(range(32)))
        == f"0123456789abcdef/{bytes(range(32)).hex()}"
    )
    assert len(chunk_key("0123456789abcdef", b"1234")) == 16 + 1 + 64
