"""The spec of a model's KV: what each layer of transformers' own cache holds after a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from hicache_core.errors import SpecError
from hicache_core.integrations.model_check import (
    failing_as_spec_error,
    fill,
    name_of,
    new_cache,
    undisturbed,
)
from hicache_core.kv.spec import Component, Group, GroupKind, KVSpec

__all__ = ["full_kv_spec_of", "kv_spec_of"]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor that a layer holds.

    Attributes:
        role: ``k``, ``v``, ``indexer_k``, ``conv_0``, ``recurrent_0``, …
        shape: of a row, or of a state.
        dtype: torch's name of the dtype.
    """

    role: str
    shape: tuple[int, ...]
    dtype: str


def kv_spec_of(model: Any, fingerprint: str) -> KVSpec:
    """The spec of what ``model`` passes to its cache, found by computing one token.

    A config does not always tell: of an MLA model, transformers caches the latent as keys and the
    rotary key as values, and a model's cache may have another dtype than its weights.

    Layers with a window, and states, are groups of the spec; layers with full attention are its
    components, indexer keys among them. Where layers differ in shape, a component is one shape.

    Raises:
        SpecError: the model cannot compute a token, or keeps nothing.
    """
    past = _filled(model)
    return _spec(model, past, fingerprint, windows=True)


def full_kv_spec_of(model: Any, fingerprint: str) -> KVSpec:
    """As ``kv_spec_of``, but layers with a window keep all their pages, like the others.

    Raises:
        SpecError: as ``kv_spec_of``; or a layer keeps something else than keys and values of the
            same shape as the others.
    """
    spec = _spec(model, _filled(model), fingerprint, windows=False)
    if spec.groups:
        raise SpecError(
            f"{name_of(model)} has layers that keep a state, not the K and V of every token: with "
            "prefill and decode apart it needs a transfer backend that moves groups of layers"
        )
    if [(part.name, part.layers) for part in spec.components] != [("k", None), ("v", None)]:
        found = {part.name: (part.shape, part.dtype) for part in spec.components}
        raise SpecError(
            f"the layers of {name_of(model)} have several shapes of KV, and all need one: {found}"
        )
    return spec


def _filled(model: Any) -> Cache:
    """transformers' own cache with one token."""
    past = new_cache(model)
    with undisturbed(model), failing_as_spec_error(model, "cached", "over an empty cache"):
        fill(model, [0], past)
    return past


def _spec(model: Any, past: Cache, fingerprint: str, *, windows: bool) -> KVSpec:
    rows = {at: found for at, layer in enumerate(past.layers) if (found := _rows(model, layer))}
    states = {at: found for at, layer in enumerate(past.layers) if (found := _states(layer))}
    if not rows and not states:
        raise SpecError(
            f"{name_of(model)} cannot be cached: it keeps no KV in the cache that it is given"
        )
    by_window: dict[int, dict[int, list[_Tensor]]] = {0: {}}
    for at, found in rows.items():
        window = getattr(past.layers[at], "sliding_window", 0) if windows else 0
        by_window.setdefault(window, {})[at] = found
    n_layers = len(past.layers)

    def spec(found: dict[int, list[_Tensor]], groups: tuple[Group, ...] = ()) -> KVSpec:
        components = _components(found)
        n_heads = components[0].shape[0] if components and components[0].name == "k" else 1
        heads = (0, n_heads, n_heads)
        if groups and not components:
            heads = groups[0].spec.heads  # which ranks share, though these pages are empty
        return KVSpec(components, n_layers, fingerprint, (0, n_layers), heads, groups)

    groups = [
        Group(f"swa_{at}" if at else "swa", GroupKind.WINDOW, spec(by_window[window]), window)
        for at, window in enumerate(sorted(by_window.keys() - {0}))
    ]
    if states:
        groups.append(Group("mamba", GroupKind.STATE, spec(states)))
    return spec(by_window[0], tuple(groups))


def _rows(model: Any, layer: Any) -> list[_Tensor]:
    """What a layer holds of each token."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or not keys.numel():
        return []
    if getattr(layer, "indexer_position_ids", None) is not None:
        raise SpecError(
            f"{name_of(model)} cannot be cached: its indexer keeps positions beside its keys"
        )
    found = [_row("k", keys[0].transpose(0, 1)), _row("v", values[0].transpose(0, 1))]
    indexer_keys = getattr(layer, "indexer_keys", None)
    if indexer_keys is not None:
        found.append(_row("indexer_k", indexer_keys[0]))
    return found


def _row(role: str, rows: torch.Tensor) -> _Tensor:
    """Of rows (n_tokens, *shape)."""
    return _Tensor(role, tuple(rows.shape[1:]), _name(rows.dtype))


def _states(layer: Any) -> list[_Tensor]:
    """What a layer holds of the sequence as a whole."""
    found = []
    for at in range(getattr(layer, "number_of_states", 0)):
        for kind in ("conv", "recurrent"):
            state = getattr(layer, f"{kind}_states")[at]
            if state is not None:
                found.append(_Tensor(f"{kind}_{at}", tuple(state.shape[1:]), _name(state.dtype)))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _components(found: dict[int, list[_Tensor]]) -> tuple[Component, ...]:
    """A component for each role and shape: in the order of a layer, the most common shape first."""
    layers_of: dict[_Tensor, list[int]] = {}
    for at, tensors in found.items():
        for tensor in tensors:
            layers_of.setdefault(tensor, []).append(at)
    components = []
    for role in sorted({tensor.role for tensor in layers_of}, key=_order):
        variants = [tensor for tensor in layers_of if tensor.role == role]
        variants.sort(key=lambda tensor: -len(layers_of[tensor]))
        for number, tensor in enumerate(variants):
            name = f"{role}_{number}" if number else role
            layers = tuple(layers_of[tensor])
            components.append(Component(name, tensor.shape, tensor.dtype, layers))
    return tuple(components)


def _order(role: str) -> tuple[int, str]:
    """Keys, values, indexer keys; states by number."""
    known = ("k", "v", "indexer_k")
    return (known.index(role), "") if role in known else (len(known), role)
