"""Specs whose layers differ: in shape, in what lies beside k and v, and in having anything."""

from __future__ import annotations

from hicache_core.kv.spec import Component, Group, GroupKind, KVSpec


def _spec(n_layers: int, n_heads: int, *components: Component) -> KVSpec:
    return KVSpec(components, n_layers, "f", (0, n_layers), (0, n_heads, n_heads))


BY_LAYER = {
    "two shapes": _spec(
        5,
        4,
        Component("k", (4, 6), "bfloat16", (0, 1, 3)),
        Component("v", (4, 6), "bfloat16", (0, 1, 3)),
        Component("k_1", (2, 10), "bfloat16", (2, 4)),
        Component("v_1", (2, 5), "bfloat16", (2, 4)),
    ),
    "latent and indexer keys": _spec(
        3, 1, Component("latent", (20,), "bfloat16"), Component("indexer_k", (7,), "int8", (0, 2))
    ),
    "heads and indexer keys": _spec(
        3,
        4,
        Component("k", (4, 3), "float32"),
        Component("v", (4, 3), "float32"),
        Component("indexer_k", (1, 5), "int8", (1, 2)),
    ),
    "layers that have nothing": _spec(
        6, 4, Component("k", (4, 3), "int8", (1, 4)), Component("v", (4, 2), "int8", (1, 4))
    ),
    "one layer each": _spec(
        2, 4, Component("a", (4, 1), "int8", (1,)), Component("b", (4, 3), "float32", (0,))
    ),
}
"""All with at most 4 KV heads; sizes are odd, so that an offset that is wrong shows."""


STATE = Group("mamba", GroupKind.STATE, _spec(3, 4, Component("conv_0", (5,), "int8", (0, 1))))
WITHOUT_COMPONENTS = KVSpec((), 3, "f", (0, 3), (0, 4, 4), (STATE,))
"""As of a model whose layers all keep a state: its full pages have no bytes."""
