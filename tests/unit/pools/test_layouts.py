"""The three host layouts: where bytes lie, and what an object is."""

from __future__ import annotations

import itertools

import pytest
import torch

from hicache_core.errors import SpecError
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS, layout_named
from hicache_core.storage.segments import join

PAGE_SIZE = 4
N_PAGES = 3
LAYERS = range(3)
TOKENS = range(PAGE_SIZE)

SPECS = {
    "mha": KVSpec.mha(num_layers=3, num_heads=2, head_dim=4, dtype="bfloat16", fingerprint="f"),
    "mla": KVSpec.mla(num_layers=3, kv_lora_rank=12, rope_dim=4, dtype="bfloat16", fingerprint="f"),
    "fp8 with scales": KVSpec.mha(
        num_layers=3,
        num_heads=2,
        head_dim=8,
        dtype="float8_e4m3fn",
        fingerprint="f",
        scale_dtype="float32",
    ),
    "v narrower": KVSpec.mha(
        num_layers=3, num_heads=2, head_dim=8, dtype="float16", fingerprint="f", v_head_dim=2
    ),
}


def row(component: int, page: int, layer: int, token: int, nbytes: int) -> bytes:
    """Bytes that no other row has."""
    seed = ((component * 8 + page) * 8 + layer) * 8 + token
    return b"".join((seed * 64 + i).to_bytes(4, "little") for i in range(nbytes))[:nbytes]


def rows_in_order(layout: str, n_components: int) -> list[tuple[int, int, int]]:
    """The order of a page's rows in its object, as written in the layouts' pictures."""
    components = range(n_components)
    if layout == "page_first":
        order = itertools.product(components, TOKENS, LAYERS)
        return [(c, layer, token) for c, token, layer in order]
    order = itertools.product(LAYERS, components, TOKENS)
    return [(c, layer, token) for layer, c, token in order]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_object_holds_its_page_in_the_order_of_the_picture(name: str, spec: KVSpec) -> None:
    pool = HostPool(spec, PAGE_SIZE, N_PAGES, LAYOUTS[name])
    sizes = [c.row_nbytes for c in spec.components]
    for c, page, layer, token in itertools.product(
        range(len(sizes)), range(N_PAGES), LAYERS, TOKENS
    ):
        content = bytearray(row(c, page, layer, token, sizes[c]))
        pool.rows(c)[page, layer, token] = torch.frombuffer(content, dtype=torch.uint8)
    for page, segments in enumerate(pool.pages(range(N_PAGES))):
        order = rows_in_order(name, len(sizes))
        expected = b"".join(row(c, page, layer, t, sizes[c]) for c, layer, t in order)
        assert join(segments[1:]) == expected
        assert len(expected) == spec.page_nbytes(PAGE_SIZE)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_view_shows_the_same_bytes_in_the_dtype_of_the_component(name: str, spec: KVSpec) -> None:
    pool = HostPool(spec, PAGE_SIZE, N_PAGES, LAYOUTS[name])
    for c, component in enumerate(spec.components):
        view = pool.view(c)
        assert view.shape == (N_PAGES, spec.num_layers, PAGE_SIZE, *component.shape)
        assert str(view.dtype) == f"torch.{component.dtype}"
        value = torch.arange(view[0].numel(), dtype=torch.float32).view(view[0].shape)
        view[1].copy_(value % 8)
        assert torch.equal(view[1].float(), value % 8)
        flat = pool.rows(c)[1].reshape(-1)
        assert torch.equal(flat.view(view.dtype).float(), (value % 8).reshape(-1))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_two_rows_share_a_byte_and_all_lie_in_the_pool(name: str, spec: KVSpec) -> None:
    pool = HostPool(spec, PAGE_SIZE, N_PAGES, LAYOUTS[name])
    claimed = torch.zeros(LAYOUTS[name].nbytes(pool.shape), dtype=torch.int32)
    for place in LAYOUTS[name].placements(pool.shape):
        sizes = (N_PAGES, spec.num_layers, PAGE_SIZE, place.row_nbytes)
        strides = (place.page_stride, place.layer_stride, place.token_stride, 1)
        claimed.as_strided(sizes, strides, place.offset).add_(1)
    assert claimed.max() == 1
    assert claimed.sum() == N_PAGES * spec.page_nbytes(PAGE_SIZE)


@pytest.mark.parametrize(("name", "n_segments"), [("page_first", 1), ("page_first_direct", 1)])
def test_page_first_layouts_have_one_payload_segment(name: str, n_segments: int) -> None:
    pool = HostPool(SPECS["mha"], PAGE_SIZE, N_PAGES, LAYOUTS[name])
    assert len(pool.pages([1])[0]) == 1 + n_segments


def test_layer_first_has_a_segment_for_each_layer_and_component() -> None:
    pool = HostPool(SPECS["mha"], PAGE_SIZE, N_PAGES, LAYOUTS["layer_first"])
    assert len(pool.pages([1])[0]) == 1 + 3 * 2


def test_an_unknown_layout_is_named_with_those_that_exist() -> None:
    assert layout_named("page_first") is LAYOUTS["page_first"]
    with pytest.raises(SpecError, match="'page_last'; the layouts are: layer_first, page_first"):
        layout_named("page_last")
