"""Runner: forwards of a transformers causal LM over sequences whose past lies in device pools."""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hicache_core.engine.pool_cache import EachLayer, Forward, PoolCache, Rows, layer_plans
from hicache_core.integrations.model_check import windows_of
from hicache_core.integrations.paged_layers import run_of
from hicache_core.kv.spec import GroupKind
from hicache_core.pools.device import DevicePool
from hicache_core.radix.results import LACKING

__all__ = ["NO_UNITS", "EachLayer", "HeldUnits", "Past", "Runner", "WindowPages", "nothing"]


def nothing(layer: int) -> None:
    """A layer callback that does nothing."""


@dataclass(frozen=True, slots=True)
class WindowPages:
    """The pages that a sequence has of a window.

    Attributes:
        first: index of the first of them in the sequence; those before have left the window.
        units: ids in the pool of the window's group, of consecutive pages.
    """

    first: int
    units: array[int]

    @property
    def from_start(self) -> array[int]:
        """One unit for each page of the sequence; those before ``first`` mean nothing."""
        return array("i", [0]) * self.first + self.units


@dataclass(frozen=True, slots=True)
class HeldUnits:
    """What a sequence has in the groups of layers.

    Attributes:
        windows: of each window of the spec.
        state_from: unit with the state to go on from, which stays as it is; ``LACKING`` for none.
        state_to: unit that gets the new state; it may be the same.
    """

    windows: tuple[WindowPages, ...] = ()
    state_from: int = LACKING
    state_to: int = LACKING


NO_UNITS = HeldUnits()
"""Of a model with full attention only."""


@dataclass(frozen=True, slots=True)
class Past:
    """A sequence that is decoded: its last token is to be computed, all before it are in pages.

    Attributes:
        last_token: its id.
        n_tokens: tokens in pages; also the position of ``last_token``.
        pages: ids of its pages, with room for one more token.
        units: what it has in the groups, with room likewise.
    """

    last_token: int
    n_tokens: int
    pages: array[int]
    units: HeldUnits = NO_UNITS


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
        self._plans = layer_plans(pool, windows_of(model.config))
        self._offsets = torch.arange(pool.page_size, device=pool.device)
        groups = pool.spec.groups
        self._windows = [group.window for group in groups if group.kind is GroupKind.WINDOW]
        self._states = [
            its
            for group, its in zip(groups, pool.groups, strict=True)
            if group.kind is GroupKind.STATE
        ]
        known = inspect.signature(model.forward).parameters
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
        self._takes_positions = "position_ids" in known or takes_any
        is_state_only = "cache_params" in known and "past_key_values" not in known
        self._cache_argument = "cache_params" if is_state_only else "past_key_values"

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
        units: HeldUnits = NO_UNITS,
        *,
        n_rows: int = 1,
        before_layer: EachLayer = nothing,
        after_layer: EachLayer = nothing,
    ) -> torch.Tensor:
        """Computes the next tokens of one sequence; logits, (n_rows, vocabulary), float32.

        Args:
            tokens: ids of the tokens to compute, at least one.
            n_past: tokens before them, whose KV is in ``pages``.
            pages: of the sequence, with room for ``tokens``.
            units: what it has in the groups, with room likewise.
            n_rows: of how many of the last tokens logits are made.
            before_layer, after_layer: as of ``PoolCache``.
        """
        n_tokens = n_past + len(tokens)
        rows = self._rows(pages, units, n_past, n_tokens)
        ids = torch.tensor([list(tokens)], device=self.pool.device)
        positions = torch.arange(n_past, n_tokens, device=self.pool.device)[None]
        forward = Forward(rows, n_past, len(tokens), *self._state_units([units]))
        cache = PoolCache(self._plans, forward, before_layer, after_layer)
        return self._forward(ids, positions, cache, None, n_rows)[0]

    @torch.inference_mode()
    def decode(self, batch: Sequence[Past]) -> torch.Tensor:
        """Computes the last token of each sequence; logits, (n_sequences, vocabulary), float32."""
        device = self.pool.device
        lengths = [past.n_tokens + 1 for past in batch]
        own = [
            self._rows(past.pages, past.units, past.n_tokens, past.n_tokens + 1) for past in batch
        ]
        rows = own[0] if len(own) == 1 else tuple(map(self._together, zip(*own, strict=True)))
        ids = torch.tensor([[past.last_token] for past in batch], device=device)
        positions = torch.tensor([[past.n_tokens] for past in batch], device=device)
        states = self._state_units([past.units for past in batch])
        cache = PoolCache(
            self._plans, Forward(rows, max(lengths) - 1, 1, *states), nothing, nothing
        )
        return self._forward(ids, positions, cache, self._padding_mask(lengths), 1)[:, 0]

    @torch.inference_mode()
    def copy_state(self, source: int, target: int) -> None:
        """Copies one unit of the state over another."""
        for pool in self._states:
            for layers in pool.buffers:
                for buffer in layers:
                    buffer[target] = buffer[source]

    def check_device(self) -> None:
        """Raises RuntimeError: the device has failed for good, as a GPU does after a bad access."""
        if self.pool.device.type == "cuda":
            torch.cuda.synchronize(self.pool.device)

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: PoolCache,
        mask: torch.Tensor | None,
        n_rows: int,
    ) -> torch.Tensor:
        """Logits of the last ``n_rows`` of each sequence, (n_sequences, n_rows, vocabulary)."""
        arguments: dict[str, Any] = {self._cache_argument: cache}
        if self._takes_positions:
            arguments["position_ids"] = positions
        output = self._model(
            input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=n_rows, **arguments
        )
        cache.save_states()
        logits: torch.Tensor = output.logits[:, -n_rows:].float()
        return logits

    def _padding_mask(self, lengths: list[int]) -> torch.Tensor | None:
        """1 for a token and 0 for padding, (n_sequences, n_tokens), int64; None without padding."""
        longest = max(lengths)
        if min(lengths) == longest:
            return None
        padding = [longest - n for n in lengths]
        at = torch.arange(longest, device=self.pool.device)
        return (at >= torch.tensor(padding, device=self.pool.device)[:, None]).long()

    def _rows(
        self, pages: array[int], units: HeldUnits, n_past: int, n_tokens: int
    ) -> tuple[Rows, ...]:
        """Where the tokens of a sequence are, of which those from ``n_past`` on are computed."""
        windows = zip(self._windows, units.windows, strict=True)
        return (
            self._rows_in(pages, 0, n_past, n_tokens),
            *(
                self._rows_in(
                    held.units,
                    max(0, n_past - window + 1) - held.first * self.pool.page_size,
                    n_past - held.first * self.pool.page_size,
                    n_tokens - held.first * self.pool.page_size,
                )
                for window, held in windows
            ),
        )

    def _rows_in(self, pages: array[int], start: int, n_past: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` of pages in order; those from ``n_past`` on are new."""
        device, page_size = self.pool.device, self.pool.page_size
        if (run := run_of(pages)) is not None:
            first = run.start * page_size
            new = torch.arange(first + n_past, first + stop, device=device)
            return Rows(new, slice(first + start, first + stop))
        index = torch.tensor(pages, dtype=torch.int64, device=device)
        slots = (index[:, None] * page_size + self._offsets).flatten()
        return Rows(slots[n_past:stop], slots[None, start:stop])

    def _together(self, own: Sequence[Rows]) -> Rows:
        """The rows of sequences that each compute their last one, padded at the left."""
        slots = [self._slots(rows.read) for rows in own]
        longest = max(map(len, slots))
        both = torch.stack([each[:1].expand(longest) for each in slots])
        for row, each in zip(both, slots, strict=True):
            row[-len(each) :] = each
        return Rows(both[:, -1], both)

    def _slots(self, read: torch.Tensor | slice) -> torch.Tensor:
        """The slots of one sequence, (n_rows,), int64."""
        if isinstance(read, slice):
            return torch.arange(read.start, read.stop, device=self.pool.device)
        return read[0]

    def _state_units(
        self, units: Sequence[HeldUnits]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Units to go on from, None for sequences that begin; and units to write."""
        if not self._states:
            return None, None
        device = self.pool.device
        state_from = [each.state_from for each in units]
        state_to = torch.tensor([each.state_to for each in units], device=device)
        begins = state_from[0] == LACKING
        return None if begins else torch.tensor(state_from, device=device), state_to
