"""Pages of SGLang's host pools: whose memory they are, and in which order of bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hicache_core.errors import SpecError
from hicache_core.integrations.sglang.pools import LAYOUTS, CopiedPages, MappedPages, pages_of
from tests.unit.integrations.sglang_pools import (
    N_PAGES,
    PAGE_SIZE,
    Pool,
    PoolOfSlots,
    PoolWithoutAddresses,
    content,
    slots,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_the_pools_own_memory_in_the_order_of_the_generic_path(layout: str) -> None:
    pool = Pool(layout)
    pages = pages_of(pool, flat=True)
    assert isinstance(pages, MappedPages)
    chosen = [5, 0, N_PAGES - 1]
    sources = pages.sources(slots(chosen))
    assert [b"".join(page) for page in sources] == [content(pool, n) for n in chosen]
    assert pages.nbytes == len(content(pool, 0))
    for segment in sources[0]:
        segment[:] = bytes(segment.nbytes)
    assert content(pool, 5) == bytes(pages.nbytes)


def test_read_fills_the_pages_that_came_and_leaves_the_others() -> None:
    for pool in (Pool(), PoolWithoutAddresses()):
        pages = pages_of(pool, flat=False)
        before = [content(pool, n) for n in range(3)]

        def fill_second(targets: Any) -> list[bool]:
            for segment in targets[1]:
                segment[:] = b"\x07" * segment.nbytes
            return [False, True, False]

        assert pages.read(slots([0, 1, 2]), fill_second) == [False, True, False]
        assert [content(pool, n) for n in (0, 2)] == [before[0], before[2]]
        assert content(pool, 1) == b"\x07" * pages.nbytes


@pytest.mark.parametrize("make", [PoolWithoutAddresses, PoolOfSlots])
def test_a_pool_without_addresses_copies_its_pages(make: type[Pool]) -> None:
    pool = make()
    pages = pages_of(pool, flat=False)
    assert isinstance(pages, CopiedPages)
    assert [b"".join(page) for page in pages.sources(slots([2, 4]))] == [
        content(pool, 2),
        content(pool, 4),
    ]


def test_addresses_outside_the_known_buffers_are_not_used() -> None:
    pool = Pool()
    elsewhere = Pool()
    pool.get_page_buffer_meta = elsewhere.get_page_buffer_meta  # type: ignore[method-assign]
    assert isinstance(pages_of(pool, flat=False), CopiedPages)


def test_pages_of_several_buffers_are_flat_only_as_copies() -> None:
    pool = Pool()
    keys, values = pool.kv_buffer[0].clone(), pool.kv_buffer[1].clone()
    pool.kv_buffer = [keys, values]
    pool.view = lambda first: torch.stack(
        [part[first : first + PAGE_SIZE] for part in (keys, values)]
    )  # type: ignore[method-assign]

    def addresses(indices: torch.Tensor) -> Any:
        firsts = indices[::PAGE_SIZE].tolist()
        parts = [part[first : first + PAGE_SIZE] for first in firsts for part in (keys, values)]
        return [part.data_ptr() for part in parts], [2 * part.numel() for part in parts]

    pool.get_page_buffer_meta = addresses  # type: ignore[method-assign]
    mapped = pages_of(pool, flat=False)
    assert isinstance(mapped, MappedPages)
    assert not mapped.is_flat
    assert isinstance(pages_of(pool, flat=True), CopiedPages)
    assert b"".join(mapped.sources(slots([3]))[0]) == content(pool, 3)
    with pytest.raises(SpecError, match="order of the generic path"):
        mapped.flat([pool.get_dummy_flat_data_page()])


def test_pools_that_are_not_known_are_refused_in_a_sentence() -> None:
    pool = Pool()
    pool.layout = "page_unified"
    with pytest.raises(SpecError, match=r"layout 'page_unified'; --hicache-mem-layout must be"):
        pages_of(pool, flat=False)
    sharded: Any = Pool()
    sharded.logical_size = 2 * sharded.size
    with pytest.raises(SpecError, match="shares out its pages over several ranks"):
        pages_of(sharded, flat=False)
    empty: Any = PoolWithoutAddresses()
    empty.get_data_page = PoolOfSlots().get_data_page
    with pytest.raises(SpecError, match=r"gives neither addresses nor copies .*pages of 0 bytes"):
        pages_of(empty, flat=False)


def test_a_tensor_that_is_no_page_is_refused() -> None:
    pages = pages_of(Pool(), flat=True)
    with pytest.raises(SpecError, match="a page has"):
        pages.flat([torch.zeros(3)])
    with pytest.raises(SpecError, match="strides"):
        pages.flat([torch.zeros(pages.nbytes, 2, dtype=torch.uint8)[:, 0]])
