"""Layers of a PagedCache: each restores its part of a prefix from pools of the device."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from hicache_core.errors import ConfigError, SpecError, UseAfterClose
from hicache_core.kv.spec import Component
from hicache_core.pools.device import DevicePool

WaitLayer = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Part:
    """A component of one layer in a pool.

    Attributes:
        component: its name, shape and dtype.
        buffer: its rows of this layer, ``(n_units, page_size, *shape)``.
    """

    component: Component
    buffer: torch.Tensor

    @property
    def state(self) -> tuple[str, int]:
        """Of ``conv_0``: its kind and index. A further number in the name tells shapes apart."""
        kind, index, *_ = self.component.name.split("_")
        return kind, int(index)


def parts_of(pool: DevicePool, layer: int) -> tuple[Part, ...]:
    """What a pool has of a layer, in the order of the spec."""
    spec = pool.spec
    return tuple(
        Part(spec.components[index], pool.buffers[index][at])
        for index, at in spec.components_in(layer)
    )


def run_of(pages: array[int]) -> slice | None:
    """The pages as a slice of their pool, if they follow each other there."""
    if not pages:
        return slice(0, 0)
    run = range(pages[0], pages[0] + len(pages))
    return slice(run.start, run.stop) if pages == array("i", run) else None


@dataclass(frozen=True, slots=True)
class Prefix:
    """The part of a prefix that a layer reads.

    Attributes:
        n_tokens: tokens of the whole prefix.
        page_size: tokens of a page.
        first_page: index of the first page that is read: those before it have left the window.
        pages: ids of the pages from there on, int64 of shape ``(n_pages,)``; a slice if they follow
            each other in the pool, so that a layer copies their rows once.
        wait_layer: blocks until the rows of a layer have arrived on the device.
    """

    n_tokens: int
    page_size: int
    first_page: int
    pages: torch.Tensor | slice
    wait_layer: WaitLayer


class _Rows:
    """The rows of one component in one layer as attention reads them, with room to grow.

    ::

        memory  | first ........ n_tokens |  room  |        (*heads, capacity, width)

    A head has its tokens one behind the other, as in transformers' own cache: attention over rows
    that are a token apart takes a quarter more time on a CPU.
    """

    def __init__(self, past: torch.Tensor, first: int, n_new: int) -> None:
        """Copies ``past`` (n, *heads, width), the rows from token ``first`` on.

        Args:
            past: the rows.
            first: their first token.
            n_new: tokens for which there is room behind them.
        """
        self.first = first
        self.n_tokens = first + len(past)
        *heads, width = past.shape[1:]
        self._memory = past.new_empty(*heads, _capacity(len(past) + n_new), width)
        self._memory[..., : len(past), :] = past.movedim(0, -2)

    def append(self, rows: torch.Tensor) -> None:
        """Adds ``rows`` of shape (*heads, n, width)."""
        n_new = rows.shape[-2]
        held, stop = self.n_tokens - self.first, self.n_tokens - self.first + n_new
        if stop > self._memory.shape[-2]:
            *heads, _, width = self._memory.shape
            grown = self._memory.new_empty(*heads, _capacity(stop), width)
            grown[..., :held, :] = self._memory[..., :held, :]
            self._memory = grown
        self._memory[..., held:stop, :] = rows
        self.n_tokens += n_new

    def crop(self, n_tokens: int) -> None:
        """Forgets the tokens from ``n_tokens`` on."""
        self.n_tokens = n_tokens

    def tokens(self, start: int, stop: int | None = None) -> torch.Tensor:
        """The tokens from ``start`` to ``stop``, the last one held by default.

        Returns:
            A view, ``(*heads, n, width)``.
        """
        stop = self.n_tokens if stop is None else stop
        return self._memory[..., start - self.first : stop - self.first, :]


def _capacity(n_tokens: int) -> int:
    """Half as much again, so that appending token by token copies each row a few times only."""
    return n_tokens + max(64, n_tokens // 2)


class PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The attention of one layer; made by a PagedCache.

    Nothing is read before the layer's first ``update``, which waits until the rows of this layer
    have arrived; those of later layers may still be copied.

    Attributes:
        ended: why it can no longer be used; empty while it can.
    """

    is_croppable = True

    def __init__(self, layer: int, parts: Sequence[Part], prefix: Prefix, window: int = 0) -> None:
        """Reads nothing yet.

        Args:
            layer: number of this layer.
            parts: its keys, its values, and its indexer keys if it has an indexer.
            prefix: what it reads.
            window: tokens that a token attends to, itself included; 0 for all before it. The layer
                keeps all rows from the prefix on, and passes on those that transformers' own layer
                would have kept.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._layer = layer
        self._parts = tuple(parts)
        self._prefix = prefix
        self._window = window
        self.is_sliding = bool(window)
        self._rows: dict[int, _Rows] = {}
        self._n_tokens = prefix.n_tokens
        self.n_shared = self._n_tokens
        self.ended = ""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Gathers keys and values of the prefix from the pages.

        Raises:
            SpecError: the states are not what the pool's spec says.
            LoadFailed: the copy of the prefix into its pages failed.
        """
        self._gather(0, key_states[0])
        self._gather(1, value_states[0])
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _gather(self, index: int, new: torch.Tensor) -> _Rows:
        """The rows of a component, of the prefix at first; ``new`` will be added.

        Args:
            index: of the component.
            new: the first rows to add, ``(*heads, n, width)``.
        """
        rows = self._rows.get(index)
        if rows is None:
            part, prefix = self._part(index, new), self._prefix
            if prefix.n_tokens and not self._rows:
                prefix.wait_layer(self._layer)
            past = part.buffer[prefix.pages].flatten(0, 1)
            first = prefix.first_page * prefix.page_size
            past = past[: self._n_tokens - first].to(new.device)
            rows = self._rows[index] = _Rows(past, first, new.shape[-2])
        return rows

    def _part(self, index: int, new: torch.Tensor) -> Part:
        """The component for rows like ``new``.

        Raises:
            SpecError: the spec has none, or another.
        """
        if index >= len(self._parts):
            names = [part.component.name for part in self._parts]
            raise SpecError(
                f"layer {self._layer}: transformers caches {_STATES[index]} too; the pool's spec "
                f"has {names}"
            )
        component = self._parts[index].component
        *heads, _, width = new.shape
        found = ((*heads, width), str(new.dtype))
        if found != (component.shape, f"torch.{component.dtype}"):
            raise SpecError(
                f"layer {self._layer}: the model's {component.name} has the shape and dtype "
                f"{found[0]}, {found[1]}; the pool has {component.shape}, torch.{component.dtype}"
            )
        return self._parts[index]

    def _check(self, states: torch.Tensor) -> None:
        if self.ended:
            raise UseAfterClose(self.ended)
        if states.shape[0] != 1:
            raise SpecError(
                f"a PagedCache holds one sequence, found a batch of {states.shape[0]}; use one "
                "cache for each sequence (no beam search, no num_return_sequences)"
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (1, heads, n, width) each; returns the keys and values that they may attend to.

        These are all, as (1, heads, n_tokens, width), or the new ones and the window before them.

        Raises:
            SpecError: more than one sequence, or states that the spec does not describe.
            LoadFailed: the copy of the prefix into its pages failed.
            UseAfterClose: the cache has ended.
        """
        self._check(key_states)
        if not self.is_initialized:
            PagedLayer.lazy_initialization(self, key_states, value_states)
        start = self._first_visible()
        for index, states in enumerate((key_states, value_states)):
            self._rows[index].append(states[0])
        self._n_tokens = self._rows[0].n_tokens
        return self._show(start)

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Appends indexer keys (1, n, width); returns all of them, (1, n_tokens, width).

        Raises:
            SpecError, LoadFailed, UseAfterClose: as ``update``.
        """
        self._check(indexer_key_states)
        new = indexer_key_states[0]
        rows = self._gather(2, new)
        rows.append(new)
        return rows.tokens(0).unsqueeze(0)

    def _first_visible(self) -> int:
        """The first token that the next one may attend to."""
        return max(0, self._n_tokens - self._window + 1) if self._window else 0

    def _show(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sets keys and values, from token ``start`` on, as attention wants them."""
        keys, values = (self._rows[index].tokens(start).unsqueeze(0) for index in (0, 1))
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens held, those of the prefix included."""
        return self._n_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the attention mask."""
        start = self._first_visible()
        return self._n_tokens - start + query_length, start

    def get_max_length(self) -> int:
        """The window, or -1 for no limit."""
        return self._window or -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens (transformers passes a negative number).

        Raises:
            ConfigError: the window before the tokens that are left has not been loaded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, found {tokens_to_remove}")
        n_tokens, first = max(0, self._n_tokens + tokens_to_remove), self._prefix.first_page
        if first and max(0, n_tokens - self._window + 1) < first * self._prefix.page_size:
            raise ConfigError(
                f"a PagedCache of {self._n_tokens} tokens cannot be cropped to {n_tokens}: of its "
                f"layers with a window of {self._window} tokens, only the end was loaded"
            )
        self._n_tokens = n_tokens
        self.n_shared = min(self.n_shared, n_tokens)
        for rows in self._rows.values():
            rows.crop(n_tokens)
        if self.is_initialized:
            self._show(self._first_visible())

    def reset(self) -> None:
        """Forgets everything, the prefix too."""
        self.crop(-self._n_tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:  # noqa: ARG002
        """Raises SpecError: one sequence has no beams."""
        raise SpecError("a PagedCache holds one sequence: beam search needs one cache for each")

    def batch_repeat_interleave(self, repeats: int) -> None:  # noqa: ARG002
        """Raises SpecError: the cache holds one sequence."""
        raise SpecError("a PagedCache holds one sequence and cannot be repeated")

    def batch_select_indices(self, indices: torch.Tensor) -> None:  # noqa: ARG002
        """Raises SpecError: the cache holds one sequence."""
        raise SpecError("a PagedCache holds one sequence: there is nothing to select")

    def write_pages(self, first_page: int, pages: torch.Tensor) -> None:
        """Copies this layer's tokens from page ``first_page`` of the sequence on into ``pages``.

        Raises:
            SpecError: the layer does not hold these tokens.
        """
        page_size = self._prefix.page_size
        start, stop = first_page * page_size, (first_page + len(pages)) * page_size
        held = [self._rows.get(index) for index in range(len(self._parts))]
        if stop > self._n_tokens or (
            len(pages) and not all(rows and rows.first <= start for rows in held)
        ):
            raise SpecError(
                f"layer {self._layer} holds {self._n_tokens} tokens; {stop} are to be stored"
            )
        if not len(pages):
            return  # maybe of a model that has left this cache: it has no rows of its own
        for rows, part in zip(held, self._parts, strict=True):
            assert rows is not None
            new = rows.tokens(start, stop).movedim(-2, 0)
            part.buffer.index_copy_(0, pages, new.view(-1, page_size, *new.shape[1:]))


_STATES = ("keys", "values", "indexer keys")


class StateLayer(LinearAttentionLayer):
    """The state of one layer with linear attention, convolutions or the like; made by a PagedCache.

    The snapshot is copied before the layer is first used, so it is never written.
    """

    is_compileable = False  # its memory is not that of the sequence before
    is_croppable = False  # of a state, nothing can be taken back

    def __init__(
        self, layer: int, parts: Sequence[Part], unit: int | None, wait: WaitLayer
    ) -> None:
        """Copies nothing yet.

        Args:
            layer: number of this layer.
            parts: its states, named ``conv_0``, ``recurrent_0``, ``conv_1``, …
            unit: the snapshot to go on from; None for none.
            wait: blocks until what a layer reads has arrived on the device.
        """
        self._layer = layer
        self._states = [(*part.state, part) for part in parts]
        LinearAttentionLayer.__init__(self, 1 + max(index for _, index, _ in self._states))
        self._unit = unit
        self._wait = wait
        if unit is not None:
            for _, index, _ in self._states:
                self.has_previous_state[index] = True

    def restore(self) -> None:
        """Copies the snapshot, once.

        Raises:
            LoadFailed: the copy of the snapshot to the device failed.
        """
        if self._unit is None:
            return
        self._wait(self._layer)
        for kind, index, part in self._states:
            state = part.buffer[self._unit].clone()  # a unit is a page of one "token"
            if kind == "conv":
                self.conv_states[index] = state
                self.conv_kernel_size[index] = state.shape[-1]
                self.is_conv_states_initialized[index] = True
                vars(self).update(dtype=state.dtype, device=state.device)
            else:
                self.recurrent_states[index] = state
                self.is_recurrent_states_initialized[index] = True
        self._unit = None

    def reset(self) -> None:
        """Forgets everything, the snapshot too."""
        self._unit = None
        LinearAttentionLayer.reset(self)

    def write_unit(self, unit: int) -> None:
        """Copies the state as it is now into a unit of the pool.

        Raises:
            SpecError: the layer has no state, or of another shape.
        """
        self.restore()
        for kind, index, part in self._states:
            states = self.conv_states if kind == "conv" else self.recurrent_states
            state, target = states[index], part.buffer[unit]
            if state is None or state.shape != target.shape or state.dtype != target.dtype:
                found = None if state is None else (tuple(state.shape), state.dtype)
                raise SpecError(
                    f"layer {self._layer}: the model's {part.component.name} is {found}; the pool "
                    f"has {tuple(target.shape)}, {target.dtype}"
                )
            target.copy_(state)


class PagedStateLayer(StateLayer, PagedLayer):  # type: ignore[misc,no-untyped-call]
    """A layer with attention and a state; made by a PagedCache."""

    def __init__(
        self,
        layer: int,
        parts: Sequence[Part],
        prefix: Prefix,
        window: int,
        states: Sequence[Part],
        unit: int | None,
    ) -> None:
        """Reads nothing yet.

        Args:
            layer: number of this layer.
            parts: keys and values, as of a ``PagedLayer``.
            prefix: what it reads of them.
            window: as of a ``PagedLayer``.
            states: its states, as of a ``StateLayer``.
            unit: the snapshot to go on from; None for none.
        """
        PagedLayer.__init__(self, layer, parts, prefix, window)
        StateLayer.__init__(self, layer, states, unit, prefix.wait_layer)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """As that of attention with two states in order, as that of a state with named ones."""
        if args:
            PagedLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def get_max_length(self) -> int:
        """As that of attention."""
        return PagedLayer.get_max_length(self)

    def reset(self) -> None:
        """Forgets everything, the prefix too."""
        StateLayer.reset(self)
        PagedLayer.reset(self)
