"""PoolCache: a transformers ``Cache`` for one forward, whose layers read and write device pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, LinearAttentionLayer

from hicache_core.integrations.paged_layers import parts_of
from hicache_core.kv.spec import GroupKind
from hicache_core.pools.device import DevicePool

EachLayer = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the tokens of a forward are, in slots (page * page_size + offset) of a pool.

    Attributes:
        new: slots of the tokens that are computed, (n_sequences * n_new,), int64.
        read: slots of past and new tokens, (n_sequences, n_rows), int64: all of them, or the last
            ones of a window. A shorter sequence is padded at the left with its own first slot:
            masked, and a number in any case. A slice for one sequence whose slots follow each
            other: it is read where it is.
    """

    new: torch.Tensor
    read: torch.Tensor | slice

    def last(self, n_rows: int) -> torch.Tensor | slice:
        """The last ``n_rows`` of ``read``."""
        if isinstance(self.read, slice):
            return slice(self.read.stop - n_rows, self.read.stop)
        return self.read[:, -n_rows:]


@dataclass(frozen=True, slots=True)
class Forward:
    """What one forward reads and writes.

    Attributes:
        rows: in the full pages, then in those of each window of the spec.
        n_past: tokens before the new ones in the longest sequence.
        n_new: tokens computed of each sequence.
        state_from: units with the state that each sequence goes on from, (n_sequences,), int64;
            None for sequences that begin.
        state_to: units that get the state afterwards, of the same shape; None without states.
    """

    rows: tuple[Rows, ...]
    n_past: int
    n_new: int
    state_from: torch.Tensor | None = None
    state_to: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class StatePart:
    """A state of one layer.

    Attributes:
        kind: ``conv`` or ``recurrent``.
        index: which of the layer's states of this kind.
        buffer: its units, (n_units, 1, *shape).
    """

    kind: str
    index: int
    buffer: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What a layer of the model keeps, and where.

    Attributes:
        slots: its keys, values and indexer keys in the pool, (n_slots, *row) each; none without
            attention of its own.
        source: which of ``Forward.rows`` says where the rows are.
        window: tokens that one attends to; 0 for all.
        states: its states.
    """

    slots: tuple[torch.Tensor, ...]
    source: int
    window: int
    states: tuple[StatePart, ...]


def layer_plans(pool: DevicePool, windows: Sequence[int]) -> list[LayerPlan]:
    """The plan of each layer of a model.

    Args:
        pool: the full pages, with the pools of the groups.
        windows: of each layer, the tokens that one attends to; 0 for all.
    """
    groups = list(zip(pool.spec.groups, pool.groups, strict=True))
    row_pools = [pool, *(its for group, its in groups if group.kind is GroupKind.WINDOW)]
    state_pools = [its for group, its in groups if group.kind is GroupKind.STATE]
    plans = []
    for layer, window in enumerate(windows):
        slots: tuple[torch.Tensor, ...] = ()
        source = 0
        for at, its in enumerate(row_pools):
            if found := tuple(part.buffer.flatten(0, 1) for part in parts_of(its, layer)):
                slots, source = found, at
        states = tuple(
            StatePart(*part.state, part.buffer)
            for its in state_pools
            for part in parts_of(its, layer)
        )
        plans.append(LayerPlan(slots, source, window, states))
    return plans


class PoolCache(Cache):
    """Several sequences, each with pages of its own, for one forward."""

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        forward: Forward,
        before_layer: EachLayer,
        after_layer: EachLayer,
    ) -> None:
        """Reads and writes nothing yet.

        Args:
            plans: of the layers.
            forward: what is written and read.
            before_layer: called before a layer's memory is touched; returns when it may be.
            after_layer: called when a layer's new rows are written.
        """
        self.forward = forward
        self.before_layer = before_layer
        self.after_layer = after_layer
        super().__init__(layers=[_layer_of(self, at, plan) for at, plan in enumerate(plans)])

    def save_states(self) -> None:
        """Writes the states into their units; to be called after the forward."""
        for layer in self.layers:
            if isinstance(layer, _StateLayer):
                layer.save()

    # A state is read before the model changes it, maybe in place.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        # docstring inherited
        self._restore(layer_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        # docstring inherited
        self._restore(layer_idx)
        return super().get_recurrent_state(layer_idx, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Any:
        # docstring inherited
        self._restore(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Any:
        # docstring inherited
        self._restore(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def _restore(self, layer: int) -> None:
        its = self.layers[layer]
        if isinstance(its, _StateLayer):
            its.restore()

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have a state and no attention."""
        return [
            isinstance(layer, _StateLayer) and not isinstance(layer, _RowLayer)
            for layer in self.layers
        ]


class _RowLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Attention of one layer: new rows are written into the pages, then read there with the past.

    A layer with a window reads the rows that its new tokens may attend to, and no others.
    """

    def __init__(self, cache: PoolCache, layer: int, plan: LayerPlan) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        forward = cache.forward
        self.is_initialized = True
        self.is_sliding = plan.window > 0
        self._cache = cache
        self._layer = layer
        self._plan = plan
        self._n_behind = max(0, forward.n_past - plan.window + 1) if plan.window else 0
        self._n_unwritten = len(plan.slots)
        rows = forward.rows[plan.source]
        self._new = rows.new
        self._read = rows.last(forward.n_past + forward.n_new - self._n_behind)

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """The pool has its memory already."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes (n_sequences, heads, n_new, width) each; rows to attend to, (…, n_rows, width)."""
        self._cache.before_layer(self._layer)
        keys, values = (
            self._exchange(slots, states.transpose(1, 2)).transpose(1, 2)
            for slots, states in zip(self._plan.slots[:2], (key_states, value_states), strict=True)
        )
        self._wrote(2)
        return keys, values

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Takes (n_sequences, n_new, width); all of them, (n_sequences, n_rows, width)."""
        self._cache.before_layer(self._layer)
        keys = self._exchange(self._plan.slots[2], indexer_key_states)
        self._wrote(1)
        return keys

    def _exchange(self, slots: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Writes new rows (n_sequences, n_new, *row); reads (n_sequences, n_rows, *row)."""
        slots.index_copy_(0, self._new, states.flatten(0, 1))
        if isinstance(self._read, slice):
            return slots[self._read][None]
        rows = slots.index_select(0, self._read.flatten())
        return rows.view(*self._read.shape, *rows.shape[1:])

    def _wrote(self, n: int) -> None:
        """Notes that ``n`` more components have their new rows."""
        self._n_unwritten -= n
        if self._n_unwritten == 0:
            self._cache.after_layer(self._layer)

    def get_seq_length(self) -> int:
        """Tokens of the past, those that have left the window included."""
        return self._cache.forward.n_past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the attention mask."""
        return self._cache.forward.n_past + query_length - self._n_behind, self._n_behind

    def get_max_length(self) -> int:
        """The window; -1: no limit."""
        return self._plan.window or -1


class _StateLayer(LinearAttentionLayer):
    """States of one layer: gathered before its first use, and scattered after the forward."""

    is_compileable = False

    def __init__(self, cache: PoolCache, layer: int, plan: LayerPlan) -> None:
        n_states = 1 + max(part.index for part in plan.states)
        LinearAttentionLayer.__init__(self, n_states)
        self._cache = cache
        self._layer = layer
        self._plan = plan
        self._units = cache.forward.state_from
        if self._units is not None:
            self.has_previous_state = dict.fromkeys(range(n_states), True)

    def restore(self) -> None:
        """Copies the states of all sequences, once."""
        units, self._units = self._units, None
        if units is None:
            return
        self._cache.before_layer(self._layer)
        for part in self._plan.states:
            states = part.buffer.index_select(0, units).squeeze(1)
            if part.kind == "conv":
                self.conv_states[part.index] = states
                self.conv_kernel_size[part.index] = states.shape[-1]
                self.is_conv_states_initialized[part.index] = True
                self.dtype, self.device = states.dtype, states.device  # type: ignore[assignment]
            else:
                self.recurrent_states[part.index] = states
                self.is_recurrent_states_initialized[part.index] = True

    def save(self) -> None:
        """Writes the states of all sequences."""
        units = self._cache.forward.state_to
        assert units is not None
        for part in self._plan.states:
            states = self.conv_states if part.kind == "conv" else self.recurrent_states
            part.buffer.index_copy_(0, units, cast("torch.Tensor", states[part.index])[:, None])


class _RowStateLayer(_StateLayer, _RowLayer):  # type: ignore[override]
    """A layer with attention and states."""

    def __init__(self, cache: PoolCache, layer: int, plan: LayerPlan) -> None:
        _RowLayer.__init__(self, cache, layer, plan)
        _StateLayer.__init__(self, cache, layer, plan)

    def lazy_initialization(self, *_: Any, **states: Any) -> None:
        """That of states, which transformers passes by name; rows need none."""
        if states:
            LinearAttentionLayer.lazy_initialization(self, **states)  # type: ignore[no-untyped-call]

    def get_max_length(self) -> int:
        """As that of attention."""
        return _RowLayer.get_max_length(self)


def _layer_of(cache: PoolCache, layer: int, plan: LayerPlan) -> Any:
    if plan.slots and plan.states:
        return _RowStateLayer(cache, layer, plan)
    if plan.slots:
        return _RowLayer(cache, layer, plan)
    return _StateLayer(cache, layer, plan) if plan.states else DummyLayer()  # type: ignore[no-untyped-call]
