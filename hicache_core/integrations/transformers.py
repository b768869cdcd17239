"""Prefix caching for Hugging Face transformers: a model whose prompts come from HiCache.

::

    with CachedModel.open(model, HiCacheConfig()) as cached:
        answer = cached.generate(input_ids, max_new_tokens=32)
        print(answer.tokens, answer.cached)

One sequence at a time, on one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.controller.controller import Controller
from hicache_core.errors import LoadFailed
from hicache_core.integrations.arguments import Arguments
from hicache_core.integrations.generation import AfterEachStep, from_its_end
from hicache_core.integrations.identity import ModelIdentity, fingerprint_of_model
from hicache_core.integrations.length_rule import Kind, PureRows, length_rule_of
from hicache_core.integrations.model_check import (
    cache_argument,
    check_layers,
    check_model,
    fill,
    restart,
)
from hicache_core.integrations.model_spec import kv_spec_of
from hicache_core.integrations.overrides import Overrides
from hicache_core.integrations.tokens import Tokens, token_list
from hicache_core.integrations.turn import Turn
from hicache_core.kv.keys import pack_tokens
from hicache_core.kv.spec import Group, GroupKind
from hicache_core.pools.device import DevicePool
from hicache_core.process.logs import log_once
from hicache_core.types import CachedTokens, Namespace

__all__ = [
    "Answer",
    "CachedModel",
    "CachedTokens",
    "Turn",
    "check_layers",
    "fingerprint_of_model",
    "kv_spec_of",
]

log = logging.getLogger(__name__)

# The default namespace, which all requests without a name share.
_SHARED = Namespace()

_PREFETCH_POLICY = "hicache_storage_prefetch_policy"


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of ``CachedModel.generate``.

    Attributes:
        tokens: the new tokens, without the prompt.
        cached: tokens of the prompt that were cached, by tier.
    """

    tokens: list[int]
    cached: CachedTokens


class CachedModel:
    """A transformers ``…ForCausalLM`` and a HiCache for its prefixes.

    It belongs to the thread that uses it first; another thread, or a forked child, gets
    ``WrongThread``. There is one turn at a time: a new turn ends the one before.

    Attributes:
        model: the model, unchanged.
        cache: the cache with its three tiers.
        device_pool: the device tier.
    """

    def __init__(
        self,
        model: Any,
        cache: Controller,
        device_pool: DevicePool,
        identity: ModelIdentity | None = None,
    ) -> None:
        """Uses an existing cache; ``open`` builds the cache as well.

        Args:
            model: a transformers ``…ForCausalLM``.
            cache: the cache.
            device_pool: its device tier, whose spec has the model's fingerprint.
            identity: of the model; by default, the model as it is now has that fingerprint.

        Raises:
            SpecError: the model has layers of a kind that cannot be cached.
        """
        check_layers(model.config)
        self.model = model
        self.cache = cache
        self.device_pool = device_pool
        self._identity = identity or ModelIdentity(model, device_pool.spec.model_fingerprint)
        self._overrides = Overrides(model)
        self._length_rule = length_rule_of(model)
        self._snapshot_interval = 1024
        self._keeps_answers = True
        self._cache_argument = cache_argument(model)
        self._open_turn: Turn | None = None

    @classmethod
    def open(
        cls,
        model: Any,
        config: HiCacheConfig,
        *,
        device_tokens: int = 8192,
        fingerprint: str | None = None,
    ) -> CachedModel:
        """Builds pools and cache for ``model``; close it, or use it in a with statement.

        Args:
            model: a transformers ``…ForCausalLM``.
            config: settings of the cache. Unless it sets a prefetch policy, a prompt waits for
                everything that storage has of it (``wait_complete``).
            device_tokens: tokens that the device tier holds.
            fingerprint: digest of config, weights, adapters and hooks as they are now;
                ``fingerprint_of_model`` by default.

        Raises:
            SpecError: the model cannot be cached: its layers do not keep the KV of every token,
                what it computes over a cached prefix differs from what it computes without, or its
                adapters have virtual tokens.
            ConfigError: the model has a forward hook, and no ``fingerprint`` is given.
            NotEnoughMemory: the pools are larger than the memory that is left.
            BackendError: the storage backend cannot be opened.
        """
        probe = check_model(model)
        identity = ModelIdentity(model, fingerprint)
        spec = kv_spec_of(model, identity.fingerprint)
        n_pages = max(1, device_tokens // config.page_size)
        n_units = [_n_units(group, config, n_pages) for group in spec.groups]
        pool = DevicePool.with_groups(spec, config.page_size, n_pages, n_units, model.device)
        if _PREFETCH_POLICY not in config.model_fields_set:
            config = config.model_copy(update={_PREFETCH_POLICY: "wait_complete"})
        cache = HiCache(config, spec, pool)
        cached = cls(model, cache, pool, identity)
        cached._snapshot_interval = config.state_snapshot_interval
        cached._keeps_answers = probe.decodes_alike
        return cached

    def close(self) -> None:
        """Closes the cache; pending writes may be dropped (call ``cache.flush`` before)."""
        self._end_turn("the model was closed")
        self.cache.close()

    def hand_over(self) -> None:
        """Makes the next thread that calls the owner.

        Raises:
            WrongThread: the caller does not own it.
        """
        self.cache.owner.hand_over()

    def weights_changed(self) -> None:
        """Call it after weights were written in a way that torch does not count (``.data``).

        Everything is read again at the next prompt. Changes that torch counts, and switched
        adapters, are noticed without this call.
        """
        self._identity.weights_changed()

    def __enter__(self) -> CachedModel:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()

    def generate(
        self, input_ids: Tokens, *, namespace: Namespace = _SHARED, **arguments: Any
    ) -> Answer:
        """``model.generate`` with the longest cached prefix; stores prompt and answer afterwards.

        If the prefix cannot be loaded, the prompt is computed as if nothing had been found.

        Args:
            input_ids: one prompt, shape (n_tokens,) or (1, n_tokens), or a sequence of ints.
            namespace: tenant and adapter; prefixes are shared inside a namespace only.
            arguments: of ``model.generate``, if they do not change the KV of a token:
                max_new_tokens, do_sample, streamer, … ``inputs_embeds`` of shape
                (1, n_tokens, width) are cached under a digest of their content.

        Raises:
            InvalidTokens: the prompt is empty, there are several, or an id is not a token id.
            ConfigError: an argument cannot be used; nothing was computed.
            WrongThread: the caller does not own it.
        """
        ids = token_list(input_ids)
        defaults = getattr(self.model, "generation_config", None)
        asked = Arguments.of(arguments, len(ids), defaults)
        try:
            with self._turn(ids, namespace, asked.inputs, from_nothing=asked.from_nothing) as turn:
                sequence = self._run(ids, turn, asked)
                turn.store(sequence)
        except LoadFailed as error:
            log.warning("the cached prefix did not arrive, computing all of it: %s", error)
            with self._turn(ids, namespace, asked.inputs, from_nothing=True) as turn:
                sequence = self._run(ids, turn, asked)
        return Answer(sequence[len(ids) :], turn.cached)

    def _run(self, ids: list[int], turn: Turn, asked: Arguments) -> list[int]:
        if asked.inputs is None and not asked.from_nothing:
            self._prefill(ids, turn)
        passed = dict(asked.passed)
        if turn.past.has_state and self._keeps_answers:
            step = AfterEachStep(lambda: turn.snapshot(of_answer=True))
            passed["stopping_criteria"] = [*(passed.get("stopping_criteria") or ()), step]
        prompt = torch.tensor([ids], dtype=torch.int64, device=self.model.device)
        passed[self._cache_argument] = turn.past
        is_other = self._cache_argument != "past_key_values"
        with from_its_end(self.model, turn.past) if is_other else nullcontext():
            output = self.model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), **passed
            )
        sequences: torch.Tensor = getattr(output, "sequences", output)
        tokens: list[int] = sequences[0].tolist()
        return tokens

    def _prefill(self, ids: list[int], turn: Turn) -> None:
        """Computes what a ``generate`` would not leave in the cache that it is given."""
        n_past, pure = turn.past.get_seq_length(), turn.past.pure
        if pure.kind is Kind.LONG and n_past <= pure.rule.context:
            fill(self.model, ids[n_past:-1], turn.past)  # generate would leave a cache so short
        for stop in turn.boundaries(len(ids)):
            fill(self.model, ids[turn.past.get_seq_length() : stop], turn.past)
            turn.snapshot()

    @contextmanager
    def turn(self, input_ids: Tokens, *, namespace: Namespace = _SHARED) -> Iterator[Turn]:
        """Finds, fetches and loads the longest cached prefix, for a loop of the caller's own.

        ::

            with cached.turn(ids) as turn:
                output = model.generate(…, past_key_values=turn.past)
                turn.store(output[0])

        The model always computes the last token of the prompt, since its logits give the first new
        token. Rows of the prefix may still be copied when this returns; each layer waits for its
        own. A turn is for one ``generate``, or for forward passes of the caller.

        If the model has a state (linear attention, Mamba), the prompt is computed up to its last
        page boundary, where a snapshot is taken; so ``past`` may hold more than what was found.

        Raises:
            InvalidTokens: the prompt is empty, there are several, or an id is not a token id.
            WrongThread: the caller does not own it.
        """
        ids = token_list(input_ids)
        with self._turn(ids, namespace, None, from_nothing=False) as turn:
            if turn.past.has_state:
                self._prefill(ids, turn)
            yield turn

    @contextmanager
    def _turn(
        self, ids: list[int], namespace: Namespace, inputs: str | None, *, from_nothing: bool
    ) -> Iterator[Turn]:
        tokens = pack_tokens(ids)
        rule = self._length_rule
        kind = rule.kind_of(len(ids))
        self.cache.owner.check()
        self._end_turn("this turn has ended: another one began")
        turn = self._open_turn = Turn(
            self.cache,
            self.device_pool,
            self._identity,
            self._overrides,
            self._snapshot_interval,
        )
        try:
            if kind is Kind.NONE:
                log_once(log, logging.WARNING, rule.notice())
                restart(self.model)
                from_nothing = True
            turn.begin(tokens, rule.namespace(kind, namespace), inputs, from_nothing=from_nothing)
            turn.past.pure = PureRows(rule, kind, turn.past.get_seq_length())
            if not self._keeps_answers:
                turn.keep_only(len(ids))
            yield turn
        finally:
            turn.end("this turn has ended: its pages may be others' by now")
            if self._open_turn is turn:
                self._open_turn = None

    def _end_turn(self, reason: str) -> None:
        """Ends the turn that is open, if any: also one that a signal has kept from ending."""
        if self._open_turn is not None:
            self._open_turn.end(reason)
            self._open_turn = None


def _n_units(group: Group, config: HiCacheConfig, n_pages: int) -> int:
    """Device units of a group for a pool of ``n_pages`` full pages.

    Of a window, a quarter of its pages, but twice what one prefix needs. Of a state, one for each
    snapshot interval, but 4.
    """
    page_size = config.page_size
    if group.kind is GroupKind.STATE:
        return max(4, n_pages * page_size // config.state_snapshot_interval)
    n_needed = min(n_pages, -(-(group.window - 1) // page_size) + 1)
    return max(2 * n_needed, n_pages // 4)
