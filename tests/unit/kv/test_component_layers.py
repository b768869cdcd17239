"""Components that live in some layers: sizes, shards, identity."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_core.errors import SpecError
from hicache_core.kv.spec import Component, KVSpec
from tests.unit.specs_by_layer import BY_LAYER, WITHOUT_COMPONENTS

TWO_SHAPES = BY_LAYER["two shapes"]


def spec_of(*components: Component, n_layers: int = 4, n_heads: int = 4) -> KVSpec:
    return KVSpec(components, n_layers, "f", (0, n_layers), (0, n_heads, n_heads))


@pytest.mark.parametrize("layers", [(), (1, 0), (1, 1), (-1, 2), (True,), (0.0,)])
def test_layers_are_numbers_ascending_and_distinct(layers: Any) -> None:
    with pytest.raises(SpecError, match="component 'k': layer"):
        Component("k", (1,), "int8", layers)


def test_layers_lie_inside_those_of_the_spec() -> None:
    with pytest.raises(SpecError, match="component 'k': layer 4 is not one of the 4 layers"):
        spec_of(Component("k", (1,), "int8", (0, 4)))


def test_a_token_has_each_component_in_its_own_layers() -> None:
    assert TWO_SHAPES.token_nbytes == 3 * (48 + 48) + 2 * (40 + 20)
    assert TWO_SHAPES.page_nbytes(3) == 3 * TWO_SHAPES.token_nbytes
    found = [list(TWO_SHAPES.layers_of(component)) for component in TWO_SHAPES.components]
    assert found == [[0, 1, 3], [0, 1, 3], [2, 4], [2, 4]]


def test_a_layer_knows_what_it_has() -> None:
    assert TWO_SHAPES.components_in(3) == [(0, 2), (1, 2)]
    assert TWO_SHAPES.components_in(4) == [(2, 1), (3, 1)]
    assert BY_LAYER["layers that have nothing"].components_in(2) == []
    assert BY_LAYER["heads and indexer keys"].components_in(2) == [(0, 2), (1, 2), (2, 1)]


def test_all_layers_by_number_are_all_layers() -> None:
    numbered = spec_of(Component("k", (4,), "int8", (0, 1, 2, 3)))
    assert numbered == spec_of(Component("k", (4,), "int8"))
    assert numbered.identity() == spec_of(Component("k", (4,), "int8")).identity()


def test_layers_are_in_the_identity_unless_they_are_all() -> None:
    spec = BY_LAYER["latent and indexer keys"]
    assert spec.identity()["components"] == [
        ["latent", [20], "bfloat16"],
        ["indexer_k", [7], "int8", [0, 2]],
    ]
    other = spec_of(*spec.components[:1], Component("indexer_k", (7,), "int8", (0, 1)), n_layers=3)
    assert other.identity()["components"] != spec.identity()["components"]


@given(st.sampled_from(list(BY_LAYER.values())), st.data())
def test_shards_by_layers_have_each_row_once(spec: KVSpec, data: st.DataObject) -> None:
    """Whatever the cuts, the layers of the parts are those of the whole, renumbered."""
    cuts = sorted({0, spec.num_layers, *data.draw(st.sets(st.integers(0, spec.num_layers)))})
    found = set()
    for start, stop in itertools.pairwise(cuts):
        rows = {
            (component.name, layer)
            for component in spec.components
            for layer in spec.layers_of(component)
            if start <= layer < stop
        }
        part = spec.shard(layers=(start, stop))
        assert (part.num_layers, part.layers) == (stop - start, (start, stop))
        found |= {(c.name, start + layer) for c in part.components for layer in part.layers_of(c)}
        assert part.token_nbytes == sum(
            c.row_nbytes for c in spec.components for name, _ in rows if name == c.name
        )
    assert found == {(c.name, layer) for c in spec.components for layer in spec.layers_of(c)}


def test_a_shard_of_a_shard_counts_the_model_s_layers() -> None:
    part = TWO_SHAPES.shard(layers=(1, 5)).shard(layers=(3, 5))
    assert part == TWO_SHAPES.shard(layers=(3, 5))
    assert [(c.name, c.layers) for c in part.components] == [
        ("k", (0,)),
        ("v", (0,)),
        ("k_1", (1,)),
        ("v_1", (1,)),
    ]


def test_a_shard_keeps_the_groups_even_without_layers_of_theirs() -> None:
    """All ranks hold the same units, so that they evict alike; some have no bytes."""
    k = Component("k", (4, 3), "int8", (2,))
    whole = replace(spec_of(k, n_layers=3), groups=WITHOUT_COMPONENTS.groups)
    first, last = whole.shard(layers=(0, 2)), whole.shard(layers=(2, 3))
    assert (first.components, first.token_nbytes, last.token_nbytes) == ((), 0, 12)
    specs = [part.groups[0].spec for part in (first, last)]
    assert [(spec.layers, spec.token_nbytes) for spec in specs] == [((0, 2), 10), ((2, 3), 0)]


def test_heads_are_cut_in_proportion_where_layers_have_fewer() -> None:
    shapes = [component.shape for component in TWO_SHAPES.shard(heads=(2, 4)).components]
    assert shapes == [(2, 6), (2, 6), (1, 10), (1, 5)]
    with pytest.raises(SpecError, match="component 'k_1': its 2 heads cannot be divided"):
        TWO_SHAPES.shard(heads=(0, 1))
    with pytest.raises(SpecError, match="component 'k_1'"):
        TWO_SHAPES.shard(heads=(2, 4)).shard(heads=(2, 3))


@pytest.mark.parametrize("shape", [(1, 5), (5,), (6,), (1, 4)])
def test_side_data_without_heads_is_whole_on_every_rank(shape: tuple[int, ...]) -> None:
    spec = spec_of(Component("k", (4, 3), "int8"), Component("indexer_k", shape, "int8"))
    for part in (spec.shard(heads=(3, 4)), spec.shard(heads=(2, 4)).shard(heads=(3, 4))):
        assert [component.shape for component in part.components] == [(1, 3), shape]
        assert not part.is_shared(part.components[0])
        assert part.is_shared(part.components[1])
        assert part.identity()["components"][1] == ["indexer_k", list(shape), "int8"]


def test_a_component_may_say_that_all_heads_share_it() -> None:
    """Its length is that of the heads by chance."""
    k = Component("k", (4, 3), "int8")
    by_chance = spec_of(k, Component("indexer_k", (4,), "int8", shared=True))
    assert by_chance.shard(heads=(0, 2)).components[1].shape == (4,)
    assert spec_of(k, Component("k_scale", (4,), "int8")).shard(heads=(0, 2)).components[
        1
    ].shape == (2,)
