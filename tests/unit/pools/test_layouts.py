"""The three host layouts: where bytes lie, and what an object is."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import astuple

import pytest
import torch

from hicache_core.errors import SpecError
from hicache_core.kv.keys import storage_namespace
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.host import HEADER_NBYTES, HostPool
from hicache_core.pools.layout import LAYOUTS, PoolShape, layout_named
from hicache_core.storage.segments import join
from tests.unit.specs_by_layer import BY_LAYER, WITHOUT_COMPONENTS

PAGE_SIZE = 4
N_PAGES = 3
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
    "shard": KVSpec.mha(
        num_layers=6,
        num_heads=8,
        head_dim=5,
        v_head_dim=3,
        dtype="int8",
        fingerprint="f",
        scale_dtype="float32",
    ).shard(layers=(2, 5), heads=(4, 6)),
    **BY_LAYER,
}
ALIGNED = {
    name: spec
    for name, spec in SPECS.items()
    if name not in BY_LAYER or len({component.dtype for component in spec.components}) == 1
}
"""Those in which no component of odd size precedes one of a wider dtype."""


def row(component: int, page: int, layer: int, token: int, nbytes: int) -> bytes:
    """Bytes that no other row has."""
    seed = ((component * 8 + page) * 8 + layer) * 8 + token
    return b"".join((seed * 64 + i).to_bytes(4, "little") for i in range(nbytes))[:nbytes]


def rows_in_order(layout: str, spec: KVSpec) -> list[tuple[int, int, int]]:
    """(component, layer of the spec, token) of a page's object, as in the layouts' pictures."""
    layers = [list(spec.layers_of(component)) for component in spec.components]
    components = range(len(layers))
    if layout == "page_first":
        return [(c, layer, token) for c in components for token in TOKENS for layer in layers[c]]
    rows = [
        (layer, c, token)
        for layer, c, token in itertools.product(range(spec.num_layers), components, TOKENS)
        if layer in layers[c]
    ]
    if layout == "page_first_direct":  # a block for each set of layers
        rows.sort(key=lambda row: layers.index(layers[row[1]]))
    return [(c, layer, token) for layer, c, token in rows]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_object_holds_its_page_in_the_order_of_the_picture(name: str, spec: KVSpec) -> None:
    pool = HostPool(spec, PAGE_SIZE, N_PAGES, LAYOUTS[name])
    sizes = [c.row_nbytes for c in spec.components]
    order = rows_in_order(name, spec)
    for page, (c, layer, token) in itertools.product(range(N_PAGES), order):
        content = bytearray(row(c, page, layer, token, sizes[c]))
        at = list(spec.layers_of(spec.components[c])).index(layer)
        pool.rows(c)[page, at, token] = torch.frombuffer(content, dtype=torch.uint8)
    for page, segments in enumerate(pool.pages(range(N_PAGES))):
        expected = b"".join(row(c, page, layer, t, sizes[c]) for c, layer, t in order)
        assert join(segments[1:]) == expected
        assert len(expected) == spec.page_nbytes(PAGE_SIZE)


@pytest.mark.parametrize("spec", ALIGNED.values(), ids=ALIGNED)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_view_shows_the_same_bytes_in_the_dtype_of_the_component(name: str, spec: KVSpec) -> None:
    pool = HostPool(spec, PAGE_SIZE, N_PAGES, LAYOUTS[name])
    for c, component in enumerate(spec.components):
        n_layers = len(spec.layers_of(component))
        view = pool.view(c)
        assert view.shape == (N_PAGES, n_layers, PAGE_SIZE, *component.shape)
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
    places = LAYOUTS[name].placements(pool.shape)
    for component, place in zip(spec.components, places, strict=True):
        sizes = (N_PAGES, len(spec.layers_of(component)), PAGE_SIZE, place.row_nbytes)
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


def test_layer_first_has_a_segment_for_each_layer_that_has_the_component() -> None:
    pool = HostPool(BY_LAYER["two shapes"], PAGE_SIZE, N_PAGES, LAYOUTS["layer_first"])
    assert len(pool.pages([1])[0]) == 1 + 3 * 2 + 2 * 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_page_without_bytes_is_its_header(name: str) -> None:
    pool = HostPool(WITHOUT_COMPONENTS, PAGE_SIZE, N_PAGES, LAYOUTS[name])
    assert [len(page) for page in pool.pages(range(N_PAGES))] == [1] * N_PAGES
    assert pool.object_nbytes == HEADER_NBYTES
    assert pool.nbytes == N_PAGES * HEADER_NBYTES


UNCHANGED = {
    ("mha", "layer_first"): ("27d43b9462132853", "f2b9f9d48a95febd"),
    ("mha", "page_first"): ("ba3b17ce36df6f04", "345a29873bdba665"),
    ("mha", "page_first_direct"): ("a0b4a28f07fb6290", "0d9c5c1c2506f8ca"),
    ("mla", "layer_first"): ("2dd5fe1d9cf3e063", "097f98b6e8a88e11"),
    ("mla", "page_first"): ("3b91c15ce681ff61", "972ae65634cbb88b"),
    ("mla", "page_first_direct"): ("f32ccb1728e360d4", "23a3ece7d92460dc"),
    ("fp8 with scales", "layer_first"): ("cfbcd211a8952a45", "59d1b6ee0d87ab49"),
    ("fp8 with scales", "page_first"): ("5fa1e2822845b912", "f5143c408938287e"),
    ("fp8 with scales", "page_first_direct"): ("527f9a4dfffbe914", "3a9fa7c5332e3df6"),
    ("v narrower", "layer_first"): ("906f947d7ed0106b", "fb03812fcdb5dc12"),
    ("v narrower", "page_first"): ("f61830f512895f50", "6216397420946161"),
    ("v narrower", "page_first_direct"): ("4f32b4e947e2fd1d", "99d8721de1ad479a"),
    ("shard", "layer_first"): ("71deabbdb8982219", "a6ebc9234165a9e5"),
    ("shard", "page_first"): ("bee2854048be31a1", "59cd55bb70506fc0"),
    ("shard", "page_first_direct"): ("21a3ed04ff8b3a12", "ed5820fc4322e091"),
}
"""Storage namespace, and a digest of the segments of three pages, placements and length."""


@pytest.mark.parametrize(("name", "layout"), UNCHANGED)
def test_what_is_stored_stays_where_it_was(name: str, layout: str) -> None:
    """The first version that knew components of some layers kept the others where they were."""
    spec = SPECS[name]
    shape = PoolShape(spec, PAGE_SIZE, N_PAGES)
    kind = LAYOUTS[layout]
    segments = [kind.segments(shape, page) for page in range(N_PAGES)]
    places = [astuple(place) for place in kind.placements(shape)]
    text = json.dumps([segments, places, kind.nbytes(shape)])
    found = (
        storage_namespace(spec.identity(), PAGE_SIZE, layout),
        hashlib.sha256(text.encode()).hexdigest()[:16],
    )
    assert found == UNCHANGED[name, layout]


def test_an_unknown_layout_is_named_with_those_that_exist() -> None:
    assert layout_named("page_first") is LAYOUTS["page_first"]
    with pytest.raises(SpecError, match="'page_last'; the layouts are: layer_first, page_first"):
        layout_named("page_last")
