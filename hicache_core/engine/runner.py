"""Runner: forwards of a transformers causal LM over sequences whose past lies in device pages."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from hicache_core.integrations.model_check import windows_of
from hicache_core.pools.device import DevicePool

EachLayer = Callable[[int], None]


def nothing(layer: int) -> None:
    """A layer callback that does nothing."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the tokens of a forward are, in slots (page * page_size + offset) of the pool.

    Attributes:
        new: slots of the tokens that are computed, (n_sequences * n_new,), int64.
        all: slots of past and new tokens, (n_sequences, n_tokens), int64. A shorter sequence is
            padded at the left with its own first slot: masked, and a number in any case.
        n_new: tokens computed of each sequence.
    """

    new: torch.Tensor
    all: torch.Tensor
    n_new: int


@dataclass(frozen=True, slots=True)
class Past:
    """A sequence that is decoded: its last token is to be computed, all before it are in pages.

    Attributes:
        last_token: its id.
        n_tokens: tokens in pages; also the position of ``last_token``.
        pages: ids of its pages, with room for one more token.
    """

    last_token: int
    n_tokens: int
    pages: array[int]


class _PoolLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a PoolCache: new rows are written into the pages, then read there with the past.

    A layer with a window reads the rows that its new tokens may attend to, and no others.
    """

    def __init__(self, cache: PoolCache, layer: int, window: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self.is_sliding = window > 0
        self._cache = cache
        self._layer = layer
        self._window = window
        self._n_behind = max(0, cache.n_past - window + 1) if window else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The pool has its memory already."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes (n_sequences, heads, n_new, width) each; rows to attend to, (…, n_rows, width)."""
        cache = self._cache
        cache.before_layer(self._layer)
        read = cache.rows.all[:, self._n_behind :]
        keys, values = (
            _exchange(buffers[self._layer], states, cache.rows.new, read)
            for buffers, states in zip(cache.pool.buffers, (key_states, value_states), strict=True)
        )
        cache.after_layer(self._layer)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens of the past, those that have left the window included."""
        return self._cache.n_past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the attention mask."""
        return self._cache.n_past + query_length - self._n_behind, self._n_behind

    def get_max_length(self) -> int:
        """The window; -1: no limit."""
        return self._window or -1


class PoolCache(Cache):
    """A transformers ``Cache`` for one forward; several sequences, each with pages of its own."""

    def __init__(
        self,
        pool: DevicePool,
        windows: Sequence[int],
        rows: Rows,
        before_layer: EachLayer,
        after_layer: EachLayer,
    ) -> None:
        """Reads and writes nothing yet.

        Args:
            pool: where the pages are; two components, keys and values.
            windows: of each layer, the tokens that one attends to; 0 for all.
            rows: what is written and read.
            before_layer: called before a layer's pages are touched; returns when they may be.
            after_layer: called when a layer's new rows are written.
        """
        self.pool = pool
        self.rows = rows
        self.n_past = rows.all.shape[1] - rows.n_new
        self.before_layer = before_layer
        self.after_layer = after_layer
        super().__init__(layers=[_PoolLayer(self, *each) for each in enumerate(windows)])


def _exchange(
    buffer: torch.Tensor, states: torch.Tensor, new: torch.Tensor, read: torch.Tensor
) -> torch.Tensor:
    """Writes ``states`` into slots ``new`` of one layer, and reads the slots ``read``."""
    slots = buffer.flatten(0, 1)
    slots.index_copy_(0, new, states.transpose(1, 2).flatten(0, 1))
    rows = slots.index_select(0, read.flatten())
    return rows.view(*read.shape, *rows.shape[1:]).transpose(1, 2)


class Runner:
    """Computes prompts and next tokens. Owner thread only.

    Attributes:
        pool: where the pages are.

    KV is written into the pages first and read from there, so a page holds what attention saw.
    Sequences of a batch end together, as ``generate`` pads them: a mask of two dimensions names the
    padding, and the model makes of it what each kind of its layers needs.
    """

    def __init__(self, model: Any, pool: DevicePool) -> None:
        """Joins a ``…ForCausalLM`` in eval mode and a pool of its spec."""
        self.pool = pool
        self._model = model
        self._windows = windows_of(model.config)
        self._offsets = torch.arange(pool.page_size, device=pool.device)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows; ids are below it."""
        return int(self._model.config.vocab_size)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Sequence[int],
        n_past: int,
        pages: array[int],
        *,
        before_layer: EachLayer = nothing,
        after_layer: EachLayer = nothing,
    ) -> torch.Tensor:
        """Computes the next tokens of one sequence; logits of the last, (vocabulary,), float32.

        Args:
            tokens: ids of the tokens to compute, at least one.
            n_past: tokens before them, whose KV is in ``pages``.
            pages: of the sequence, with room for ``tokens``.
            before_layer, after_layer: as of ``PoolCache``.
        """
        n_tokens = n_past + len(tokens)
        slots = self._slots(pages, n_tokens)
        rows = Rows(slots[n_past:], slots[None], len(tokens))
        ids = torch.tensor([list(tokens)], device=self.pool.device)
        positions = torch.arange(n_past, n_tokens, device=self.pool.device)[None]
        past = PoolCache(self.pool, self._windows, rows, before_layer, after_layer)
        return self._forward(ids, positions, past, None)[0]

    @torch.inference_mode()
    def decode(self, batch: Sequence[Past]) -> torch.Tensor:
        """Computes the last token of each sequence; logits, (n_sequences, vocabulary), float32."""
        device = self.pool.device
        lengths = [past.n_tokens + 1 for past in batch]
        slots = [self._slots(past.pages, n) for past, n in zip(batch, lengths, strict=True)]
        both = torch.stack([own[:1].expand(max(lengths)) for own in slots])
        for row, own in zip(both, slots, strict=True):
            row[-len(own) :] = own
        rows = Rows(both[:, -1], both, 1)
        ids = torch.tensor([[past.last_token] for past in batch], device=device)
        positions = torch.tensor([[past.n_tokens] for past in batch], device=device)
        cache = PoolCache(self.pool, self._windows, rows, nothing, nothing)
        return self._forward(ids, positions, cache, self._padding_mask(lengths))

    def check_device(self) -> None:
        """Raises RuntimeError: the device has failed for good, as a GPU does after a bad access."""
        if self.pool.device.type == "cuda":
            torch.cuda.synchronize(self.pool.device)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, past: Cache, mask: torch.Tensor | None
    ) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=past,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _padding_mask(self, lengths: list[int]) -> torch.Tensor | None:
        """1 for a token and 0 for padding, (n_sequences, n_tokens), int64; None without padding."""
        longest = max(lengths)
        if min(lengths) == longest:
            return None
        padding = [longest - n for n in lengths]
        at = torch.arange(longest, device=self.pool.device)
        return (at >= torch.tensor(padding, device=self.pool.device)[:, None]).long()

    def _slots(self, pages: array[int], n_tokens: int) -> torch.Tensor:
        """Slots of the first ``n_tokens`` tokens, (n_tokens,), int64."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.pool.device)
        slots = index[:, None] * self.pool.page_size + self._offsets
        return slots.flatten()[:n_tokens]
