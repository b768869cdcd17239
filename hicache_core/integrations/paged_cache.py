"""PagedCache: a transformers ``Cache`` whose prefix is in the pages of a device pool."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from hicache_core.errors import ConfigError, SpecError, UseAfterClose
from hicache_core.integrations.length_rule import PureRows
from hicache_core.pools.device import DevicePool

WaitLayer = Callable[[int], None]


def _arrived(layer: int) -> None:
    """The wait of a prefix that needs none."""


class _Rows:
    """The rows of one component in one layer, tokens outermost, with room to grow.

    ::

        memory  | 0 ........ n_tokens |  room  | capacity         (capacity, heads, width)
        view    (1, heads, n_tokens, width), a view of the first n_tokens rows
    """

    def __init__(self, past: torch.Tensor, n_new: int) -> None:
        """Copies ``past`` (n_tokens, heads, width) and leaves room for ``n_new`` rows or more."""
        self.n_tokens = len(past)
        self._memory = past.new_empty(_capacity(self.n_tokens + n_new), *past.shape[1:])
        self._memory[: self.n_tokens] = past

    def append(self, states: torch.Tensor) -> None:
        """Adds ``states`` of shape (1, heads, n, width)."""
        stop = self.n_tokens + states.shape[2]
        if stop > len(self._memory):
            grown = self._memory.new_empty(_capacity(stop), *self._memory.shape[1:])
            grown[: self.n_tokens] = self._memory[: self.n_tokens]
            self._memory = grown
        self._memory[self.n_tokens : stop] = states[0].transpose(0, 1)
        self.n_tokens = stop

    def crop(self, n_tokens: int) -> None:
        """Keeps the first ``n_tokens`` rows."""
        self.n_tokens = n_tokens

    def tokens(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), of shape (stop - start, heads, width)."""
        return self._memory[start:stop]

    def view(self, start: int = 0) -> torch.Tensor:
        """Rows from ``start`` on as attention wants them: (1, heads, n_rows, width)."""
        return self._memory[start : self.n_tokens].transpose(0, 1).unsqueeze(0)


def _capacity(n_tokens: int) -> int:
    """Half as much again, so that appending token by token copies each row a few times only."""
    return n_tokens + max(64, n_tokens // 2)


class PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a PagedCache; made by it.

    Nothing is read before the layer's first ``update``, which waits until the rows of this layer
    have arrived; those of later layers may still be copied.

    Attributes:
        ended: why it can no longer be used; empty while it can.
    """

    is_croppable = True

    def __init__(
        self,
        pool: DevicePool,
        layer: int,
        prefix_pages: torch.Tensor,
        wait_layer: WaitLayer,
        window: int = 0,
    ) -> None:
        """Reads nothing yet.

        Args:
            pool: the device pool with the pages of the prefix.
            layer: number of this layer.
            prefix_pages: pages of the prefix, in order, int64 of shape ``(n_pages,)``.
            wait_layer: blocks until the rows of a layer have arrived on the device.
            window: tokens that a token attends to, itself included; 0 for all before it. The layer
                keeps all rows, and passes on those that transformers' own layer would have kept.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._pool = pool
        self._layer = layer
        self._prefix_pages = prefix_pages
        self._wait_layer = wait_layer
        self._window = window
        self.is_sliding = bool(window)
        self._rows: list[_Rows] = []
        self._n_tokens = len(prefix_pages) * pool.page_size
        self.n_shared = self._n_tokens
        self.ended = ""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Gathers the prefix from the pages.

        Raises:
            SpecError: the states are not what the pool's spec says.
            LoadFailed: the copy of the prefix into its pages failed.
        """
        states = (key_states, value_states)
        self._check(states)
        if len(self._prefix_pages):
            self._wait_layer(self._layer)
        n_new = key_states.shape[2]
        for buffers, new in zip(self._pool.buffers, states, strict=True):
            past = buffers[self._layer].index_select(0, self._prefix_pages).flatten(0, 1)
            self._rows.append(_Rows(past[: self._n_tokens].to(new.device), n_new))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _check(self, states: tuple[torch.Tensor, torch.Tensor]) -> None:
        components = self._pool.spec.components
        if len(components) != len(states):
            names = [component.name for component in components]
            raise SpecError(f"transformers caches keys and values; the pool's spec has {names}")
        for component, new in zip(components, states, strict=True):
            found = ((new.shape[1], new.shape[3]), f"torch.{component.dtype}")
            if found != (component.shape, str(new.dtype)):
                raise SpecError(
                    f"layer {self._layer}: the model's {component.name} has (heads, width) and "
                    f"dtype {(new.shape[1], new.shape[3])}, {new.dtype}; the pool has "
                    f"{component.shape}, torch.{component.dtype}"
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
        if self.ended:
            raise UseAfterClose(self.ended)
        if key_states.shape[0] != 1:
            raise SpecError(
                f"a PagedCache holds one sequence, found a batch of {key_states.shape[0]}; use one "
                "cache for each sequence (no beam search, no num_return_sequences)"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self._first_visible()
        for rows, states in zip(self._rows, (key_states, value_states), strict=True):
            rows.append(states)
        self._n_tokens = self._rows[0].n_tokens
        self.keys, self.values = (rows.view(start) for rows in self._rows)
        return self.keys, self.values

    def _first_visible(self) -> int:
        """The first token that the next one may attend to."""
        return max(0, self._n_tokens - self._window + 1) if self._window else 0

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
        """Forgets the last ``-tokens_to_remove`` tokens (transformers passes a negative number)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, found {tokens_to_remove}")
        self._n_tokens = max(0, self._n_tokens + tokens_to_remove)
        self.n_shared = min(self.n_shared, self._n_tokens)
        for rows in self._rows:
            rows.crop(self._n_tokens)
        if self._rows:
            start = self._first_visible()
            self.keys, self.values = (rows.view(start) for rows in self._rows)

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
            SpecError: the layer holds fewer tokens than ``pages`` want.
        """
        page_size = self._pool.page_size
        start, stop = first_page * page_size, (first_page + len(pages)) * page_size
        if stop > self._n_tokens or (len(pages) and not self._rows):
            raise SpecError(
                f"layer {self._layer} holds {self._n_tokens} tokens; {stop} are to be stored"
            )
        if not len(pages):
            return  # maybe of a model that has left this cache: it has no rows of its own
        for rows, buffers in zip(self._rows, self._pool.buffers, strict=True):
            buffer = buffers[self._layer]
            buffer.index_copy_(0, pages, rows.tokens(start, stop).view(-1, *buffer.shape[1:]))


class PagedCache(Cache):
    """The KV of one sequence: a prefix in pages of a device pool, then what the model adds.

    Pass it to ``model.generate(…, past_key_values=cache)`` or to a forward pass. Attention in
    transformers needs contiguous tensors, so each layer gathers its prefix once, at its first
    update, into memory that grows with the sequence; ``write_pages`` copies whole pages back.

    The caller owns the pages and keeps them locked while the cache reads; owner thread only.

    Attributes:
        pure: the rows that other prompts may use, for models whose KV depends on the length.
    """

    def __init__(
        self,
        pool: DevicePool,
        prefix_pages: array[int],
        wait_layer: WaitLayer = _arrived,
        windows: Sequence[int] | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            pool: where the pages are; its spec has two components, keys and values.
            prefix_pages: pages of the leading tokens, in order; empty for none.
            wait_layer: called before layer i of the prefix is read; returns when it has arrived.
            windows: the window of each layer, 0 for none (see ``windows_of``); none by default.
        """
        pages = page_index(prefix_pages, pool.device)
        self._paged = [
            PagedLayer(pool, layer, pages, wait_layer, window)
            for layer, window in enumerate(windows or [0] * pool.spec.num_layers)
        ]
        super().__init__(layers=list(self._paged))
        self.pure = PureRows(n_rows=self.get_seq_length())
        self._pool = pool

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
        if layer_idx == 0:
            start = self.get_seq_length()
            self.pure.note(start, start + key_states.shape[2])
        rows: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return rows

    @property
    def n_shared_pages(self) -> int:
        """Leading pages that are still those of the prefix, despite crop or reset."""
        return self._paged[0].n_shared // self._pool.page_size

    def end(self, reason: str) -> None:
        """Makes every later use raise with ``reason``: the pages are the cache's own again."""
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
                first forward, whatever the cache holds (DynamicCache as well): wrong tokens.
        """
        if self.get_seq_length():
            raise ConfigError(
                f"assisted decoding cannot start over {self.get_seq_length()} cached tokens: "
                "transformers would compute them a second time; leave out assistant_model and "
                "prompt_lookup_num_tokens, or give it an empty cache"
            )

    def write_pages(self, first_page: int, pages: array[int]) -> None:
        """Copies whole pages of the sequence, from page ``first_page`` on, into the pool.

        Args:
            first_page: index of a page in the sequence.
            pages: pages of the pool to write; the caller owns them.

        Raises:
            SpecError: the sequence is shorter than that.
        """
        index = page_index(pages, self._pool.device)
        for layer in self._paged:
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
