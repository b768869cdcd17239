"""PagedCache: a transformers ``Cache`` whose prefix is in the pools of a device."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from transformers import Cache
from transformers.cache_utils import DummyLayer

from hicache_core.errors import ConfigError, SpecError, UseAfterClose
from hicache_core.integrations.length_rule import PureRows
from hicache_core.integrations.paged_layers import (
    PagedLayer,
    PagedStateLayer,
    Prefix,
    StateLayer,
    WaitLayer,
    parts_of,
    run_of,
)
from hicache_core.kv.spec import GroupKind
from hicache_core.pools.device import DevicePool
from hicache_core.radix.results import Units


def _arrived(layer: int) -> None:
    """The wait of a prefix that needs none."""


class _Source(NamedTuple):
    """A pool with rows of some layers: that of the full pages (``group`` None) or of a window."""

    group: int | None
    pool: DevicePool
    window: int
    prefix: Prefix


class PagedCache(Cache):
    """The KV of one sequence: a prefix in pools of a device, then what the model adds.

    Pass it to ``model.generate(…, past_key_values=cache)`` or to a forward pass. Attention in
    transformers needs contiguous tensors, so each layer gathers its prefix once, at its first
    update, into memory that grows with the sequence; ``write_pages`` copies whole pages back. A
    layer with a window gathers what it still needs, a layer with a state copies a snapshot.

    The caller owns pages and units and keeps them locked while the cache reads; owner thread only.

    Attributes:
        pure: the rows that other prompts may use, for models whose KV depends on the length.
        has_state: whether some layer keeps a state, of which nothing can be taken back.
    """

    def __init__(
        self,
        pool: DevicePool,
        prefix_pages: array[int],
        wait_layer: WaitLayer = _arrived,
        units: Sequence[Units] = (),
    ) -> None:
        """Reads nothing yet.

        Args:
            pool: where the pages are; its spec says what each layer keeps (see ``kv_spec_of``).
            prefix_pages: pages of the leading tokens, in order; empty for none.
            wait_layer: called before layer i of the prefix is read; returns when it has arrived.
            units: of each group of the spec, those that the prefix needs, all on the device;
                empty for a prefix of no pages.
        """
        self._pool = pool
        self._n_prefix = len(prefix_pages) * pool.page_size
        full = self._prefix(0, prefix_pages, wait_layer)
        sources = [_Source(None, pool, 0, full)]
        self._state_pool: DevicePool | None = None
        self._unit: int | None = None
        for index, group in enumerate(pool.spec.groups):
            has = units[index] if units and prefix_pages else Units(0, array("i"), array("i"))
            if group.kind is GroupKind.STATE:
                self._state_pool = pool.groups[index]
                self._unit = has.device[0] if has.device else None
            else:
                prefix = self._prefix(has.first, has.device, wait_layer)
                sources.append(_Source(index, pool.groups[index], group.window, prefix))
        self._paged: list[PagedLayer] = []
        self._in_group: dict[int | None, list[PagedLayer]] = {at.group: [] for at in sources}
        layers = [self._layer(layer, sources, full) for layer in range(pool.spec.num_layers)]
        super().__init__(layers=layers)
        self._states = [layer for layer in layers if isinstance(layer, StateLayer)]
        self.has_state = bool(self._states)
        self._n_seen = self._n_prefix  # of a model without attention
        self._ended = ""
        self.pure = PureRows(n_rows=self.get_seq_length())

    def _prefix(self, first_page: int, pages: array[int], wait_layer: WaitLayer) -> Prefix:
        run = run_of(pages)
        where = page_index(pages, self._pool.device) if run is None else run
        return Prefix(self._n_prefix, self._pool.page_size, first_page, where, wait_layer)

    def _layer(self, layer: int, sources: Sequence[_Source], full: Prefix) -> Any:
        """A layer that keeps what the spec says."""
        states = () if self._state_pool is None else parts_of(self._state_pool, layer)
        for group, pool, window, prefix in sources:
            parts = parts_of(pool, layer)
            if not parts:
                continue
            paged = (
                PagedStateLayer(layer, parts, prefix, window, states, self._unit)
                if states
                else PagedLayer(layer, parts, prefix, window)
            )
            self._paged.append(paged)
            self._in_group[group].append(paged)
            return paged
        if states:
            return StateLayer(layer, states, self._unit, full.wait_layer)
        return DummyLayer()  # type: ignore[no-untyped-call]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``PagedLayer.update``, for one layer; records which forward pass the rows came from.

        Args:
            key_states: keys of the new tokens, ``(1, heads, n_tokens, width)``.
            value_states: their values, of the same shape but perhaps another width.
            layer_idx: number of the layer.
            args: passed on to the layer.
            kwargs: passed on to the layer.

        Returns:
            Keys and values of all tokens so far, with ``n_tokens`` grown accordingly.
        """
        if self._paged and self.layers[layer_idx] is self._paged[0]:
            start = self.get_seq_length()
            self.pure.note(start, start + key_states.shape[2])
        rows: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return rows

    # States. Models read a state before they change it, maybe in place.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As that of transformers; copies the layer's snapshot first."""
        layer = self._restored(layer_idx)
        if layer is self._counted and state_idx == 0:
            self._note_seen(1)
        state: torch.Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As that of transformers; copies the layer's snapshot first."""
        self._restored(layer_idx)
        state: torch.Tensor | None = super().get_recurrent_state(layer_idx, state_idx)
        return state

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """As that of transformers, for one sequence.

        Args:
            conv_states: what the convolution reads, ``(1, width, n_tokens)``.
            layer_idx: number of the layer.
            state_idx: number of the state in the layer.
            kwargs: passed on to the layer.
        """
        layer = self._restored(layer_idx)
        if conv_states.shape[0] != 1:
            raise SpecError(
                f"a PagedCache holds one sequence, found a batch of {conv_states.shape[0]}; use "
                "one cache for each sequence (no beam search, no num_return_sequences)"
            )
        if layer is self._counted and state_idx == 0:
            self._note_seen(conv_states.shape[-1] - 1)
        state: torch.Tensor = super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)
        return state

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """As that of transformers.

        Args:
            recurrent_states: the new state, ``(1, …)``.
            layer_idx: number of the layer.
            state_idx: number of the state in the layer.
            kwargs: passed on to the layer.
        """
        self._restored(layer_idx)
        state: torch.Tensor = super().update_recurrent_state(
            recurrent_states, layer_idx, state_idx, **kwargs
        )
        return state

    def _restored(self, layer_idx: int) -> Any:
        if self._ended:
            raise UseAfterClose(self._ended)
        layer = self.layers[layer_idx]
        if isinstance(layer, StateLayer):
            layer.restore()
        return layer

    @property
    def _counted(self) -> StateLayer | None:
        """Of a model without attention, the layer that counts the tokens."""
        return None if self._paged else self._states[0]

    def _note_seen(self, n_new: int) -> None:
        """Counts tokens of a model without attention: one for each forward, then the others."""
        self.pure.note(self._n_seen, self._n_seen + n_new)
        self._n_seen += n_new

    def write_state(self, unit: int) -> None:
        """Copies the states as they are now into a unit of the group with the states.

        Raises:
            SpecError: a layer has no state, or one of another shape.
        """
        for layer in self._states:
            layer.write_unit(unit)

    # The whole.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held, those of the prefix included."""
        if not self._paged:
            return self._n_seen
        n_tokens: int = super().get_seq_length(layer_idx)
        return n_tokens

    @property
    def is_initialized(self) -> bool:
        """Whether it holds tokens; some models take a cache that does not for a new prompt."""
        return self.get_seq_length() > 0

    @property
    def is_linear(self) -> list[bool]:
        """Which layers keep a state and, unless they have a window too, no rows."""
        linear = [isinstance(layer, StateLayer) for layer in self.layers]
        for at, layer in enumerate(self.layers):
            if isinstance(layer, PagedLayer) and not layer.is_sliding:
                linear[at] = False
        return linear

    @property
    def n_shared_pages(self) -> int:
        """Leading pages that are still those of the prefix, despite crop or reset."""
        shared = self._paged[0].n_shared if self._paged else min(self._n_prefix, self._n_seen)
        return shared // self._pool.page_size

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens (transformers passes a negative number).

        Raises:
            ConfigError: a layer keeps a state, of which nothing can be taken back.
        """
        if not self.has_state:
            super().crop(tokens_to_remove)
        elif tokens_to_remove:
            raise ConfigError(
                f"{-tokens_to_remove} tokens cannot be taken back: the model has layers whose "
                "state has seen them"
            )

    def reset(self) -> None:
        """Forgets everything, the prefix too."""
        super().reset()  # type: ignore[no-untyped-call]
        self._n_seen = 0

    def end(self, reason: str) -> None:
        """Makes every later use raise with ``reason``: the pages are the cache's own again."""
        self._ended = reason
        for layer in self._paged:
            layer.ended = reason

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Raises ConfigError: the prefix lies in pages that the caller keeps for this one only."""
        raise ConfigError(
            "a PagedCache cannot be copied, since its prefix lies in pages of the device pool that "
            "are kept for this one: open another turn over the same tokens, which finds them cached"
        )

    def activate_past_recording(self) -> None:
        """Called by transformers when assisted decoding starts.

        Raises:
            ConfigError: the cache holds tokens. Assisted decoding feeds the whole prompt to its
                first forward, whatever the cache holds (DynamicCache as well): wrong tokens. Or a
                layer keeps a state, of which no token can be taken back.
        """
        if self.has_state:
            raise ConfigError(
                "assisted decoding is not possible: the model has layers with a state, of which "
                "rejected tokens cannot be taken back; leave out assistant_model and "
                "prompt_lookup_num_tokens"
            )
        if self.get_seq_length():
            raise ConfigError(
                f"assisted decoding cannot start over {self.get_seq_length()} cached tokens: "
                "transformers would compute them a second time; leave out assistant_model and "
                "prompt_lookup_num_tokens, or give it an empty cache"
            )

    def write_pages(self, first_page: int, pages: array[int], group: int | None = None) -> None:
        """Copies pages of the sequence, from page ``first_page`` on, into a pool.

        Args:
            first_page: index of a page in the sequence.
            pages: pages of the pool to write; the caller owns them.
            group: index of a group with a window, whose pages are written; the full ones by
                default.

        Raises:
            SpecError: the sequence is shorter than that, or its window has left these pages behind.
        """
        index = page_index(pages, self._pool.device)
        for layer in self._in_group[group]:
            layer.write_pages(first_page, index)


class TurnCache(PagedCache):
    """The PagedCache of one turn, for one ``generate``."""

    _generates = False

    @property
    def _is_user_defined(self) -> bool:
        """What transformers sets when a ``generate`` is given this cache."""
        return self._generates

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        if self._generates:
            raise ConfigError(
                f"this turn has generated already, and its cache holds {self.get_seq_length()} "
                "tokens: store them and open another turn for the next generate, or call the "
                "model's forward in a loop of your own"
            )
        self._generates = value


def page_index(pages: array[int], device: torch.device) -> torch.Tensor:
    """Page ids as an int64 index (n_pages,) on ``device``."""
    if not pages:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.frombuffer(pages, dtype=torch.int32).to(device, torch.int64)
