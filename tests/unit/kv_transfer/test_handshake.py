"""Handshake and page memory: every head is asked for once, every byte has one place."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.errors import SpecError, TransferError
from hicache_core.kv.spec import KVSpec
from hicache_core.kv_transfer.handshake import (
    check_hello,
    divide,
    hello_of,
    want_of,
    wanted_of,
    welcome_of,
    welcomed_of,
)
from hicache_core.kv_transfer.page_memory import PageMemory
from hicache_core.testing.transfer_kit import (
    LAYERS_DIFFER,
    N_HEADS,
    PAGE_SIZE,
    memory_of,
    spec_of,
)

RANGES = st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda r: r[0] < r[1])


@given(st.lists(RANGES, max_size=8))
def test_each_head_is_asked_of_one_sender(offers: list[tuple[int, int]]) -> None:
    missing: list[tuple[int, int]] = [(0, 12)]
    asked: list[int] = []
    for offer in offers:
        heads, missing = divide(missing, offer)
        if heads is not None:
            assert offer[0] <= heads[0] < heads[1] <= offer[1]
            asked += range(*heads)
    left = [head for hole in missing for head in range(*hole)]
    assert sorted(asked + left) == list(range(12))


def test_a_latent_comes_from_the_first_sender() -> None:
    assert divide([(0, 1)], (0, 1)) == ((0, 1), [])
    assert divide([], (0, 1)) == (None, [])


def test_equal_nodes_welcome_each_other_whatever_heads_they_hold() -> None:
    half = memory_of(spec_of((0, 4)), None)
    check_hello(hello_of(half, 0, 2), memory_of(spec_of((6, 8)), None))


@pytest.mark.parametrize(
    "want",
    [
        {"heads": [0, 9], "start": 0, "stop": 4},
        {"heads": [3, 3], "start": 0, "stop": 4},
        {"heads": [0, 1, 2], "start": 0, "stop": 4},
        {"heads": None, "start": -1, "stop": 4},
        {"heads": None, "start": "0", "stop": 4},
        {"heads": None},
        {"heads": 5, "start": 0, "stop": 4},
        {"heads": {"0": 1, "1": 2}, "start": 0, "stop": 4},
        {"heads": [True, 2], "start": 0, "stop": 4},
    ],
)
def test_a_want_without_sense_is_an_error(want: dict[str, object]) -> None:
    memory = memory_of(spec_of(), None)
    with pytest.raises(TransferError):
        wanted_of(want, hello_of(memory, 0, 1), memory)


@pytest.mark.parametrize(("rank", "n_ranks"), [(0, 0), (2, 2), (0, 10**9)])
def test_a_rank_that_cannot_be_is_an_error(rank: int, n_ranks: int) -> None:
    memory = memory_of(spec_of(), None)
    with pytest.raises(TransferError, match=f"rank {rank} of {n_ranks}"):
        wanted_of(want_of(None, (0, 4)), hello_of(memory, rank, n_ranks), memory)


@pytest.mark.parametrize(
    ("told", "reached"),
    [
        ("10.0.0.2:7", "10.0.0.2:7"),
        ("0.0.0.0:7", "node:7"),
        (":::7", "node:7"),
        ("[::]:7", "node:7"),
        (":7", "node:7"),
        ("127.0.1.1:7", "node:7"),
        ("localhost:7", "node:7"),
        ("[::1]:7", "node:7"),
    ],
)
def test_a_rank_that_tells_no_address_for_us_is_reached_as_its_sender(
    told: str, reached: str
) -> None:
    value = welcome_of(memory_of(spec_of((2, 5)), None), {"a": 1}, [told])
    welcome = welcomed_of(value, "node:1")
    assert (welcome.heads, welcome.carrier, welcome.others) == ((2, 5), {"a": 1}, (reached,))


def test_ranks_on_one_machine_may_name_each_other_by_loopback() -> None:
    value = welcome_of(memory_of(spec_of(), None), {}, ["127.0.0.1:7"])
    assert welcomed_of(value, "127.0.0.1:1").others == ("127.0.0.1:7",)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": [0]},
        {"heads": ["a", 1]},
        {"heads": None},
        {"carrier": 3},
        {"others": 3},
        {"others": ["node"]},
        {"others": ["node:x"]},
        {"others": ["node:1"] * 256},
    ],
)
def test_a_welcome_without_sense_is_an_error(change: dict[str, object]) -> None:
    value = welcome_of(memory_of(spec_of(), None), {}, []) | change
    with pytest.raises(TransferError, match="node:1 sent a malformed welcome"):
        welcomed_of(value, "node:1")


@given(
    st.permutations(range(8)),
    st.tuples(st.integers(0, 31), st.integers(1, 32)).filter(lambda r: r[0] < r[1]),
    st.tuples(st.integers(0, N_HEADS - 1), st.integers(1, N_HEADS)).filter(lambda r: r[0] < r[1]),
    st.sampled_from([spec_of(), LAYERS_DIFFER]),
    st.integers(0, 2),
)
def test_segments_are_the_rows_in_order(
    pages: list[int], tokens: tuple[int, int], heads: tuple[int, int], spec: KVSpec, layer: int
) -> None:
    """Against the plain meaning: for each component and token, the bytes of the heads."""
    memory = memory_of(spec, seed=3)
    start, stop = tokens
    expected = b""
    for component, regions in zip(memory.spec.components, memory.regions, strict=True):
        row, layers = component.row_nbytes, list(spec.layers_of(component))
        if layer not in layers:
            continue
        first, last = (0, N_HEADS) if component.name == "indexer_k" else heads
        region = regions[layers.index(layer)]
        for token in range(start, stop):
            slot = pages[token // PAGE_SIZE] * PAGE_SIZE + token % PAGE_SIZE
            at = slot * row
            expected += region[at + first * row // N_HEADS : at + last * row // N_HEADS]
    segments = memory.segments(layer, pages, start, stop, heads)
    assert b"".join(segments) == expected
    assert memory.nbytes(stop - start, heads, layer) == len(expected)


def test_identities_of_ranks_agree_whatever_heads_they_have() -> None:
    whole = memory_of(LAYERS_DIFFER, None)
    for heads in ((0, 4), (2, 4)):
        rank = memory_of(LAYERS_DIFFER.shard(heads=heads), None)
        assert rank.identity() == whole.identity()
    k, *others = LAYERS_DIFFER.components
    elsewhere = replace(LAYERS_DIFFER, components=(replace(k, layers=(0, 1)), *others))
    assert memory_of(elsewhere, None).identity() != whole.identity()


def test_the_identity_of_layers_that_are_alike_is_as_it_was() -> None:
    assert memory_of(spec_of(heads=(0, 4)), None).identity()["components"] == [
        ["k", "float16", 12],
        ["v", "float16", 8],
    ]


def test_adjacent_pages_are_one_segment_a_component() -> None:
    memory = memory_of(spec_of(), None)
    assert len(memory.segments(0, [4, 5, 6], 2, 12, memory.heads)) == 2
    assert len(memory.segments(0, [4, 6, 7], 2, 12, memory.heads)) == 4


def test_a_memory_that_does_not_fit_its_spec_is_an_error() -> None:
    spec = KVSpec.mla(num_layers=2, kv_lora_rank=8, rope_dim=4, dtype="bfloat16", fingerprint="m")
    with pytest.raises(SpecError, match="component latent: need 2 layers of 192 bytes"):
        PageMemory(spec, 4, 2, [[memoryview(bytearray(10))] * 2])
    with pytest.raises(SpecError, match="regions of 1 components"):
        PageMemory(spec, 4, 2, [])
