"""Limits: the longest requests that a model and its device pool can serve."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch

from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.config import EngineConfig
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.request import Request
from hicache_core.errors import ConfigError, InvalidTokens, NotEnoughMemory
from hicache_core.integrations.length_rule import length_rule_of
from hicache_core.integrations.model_check import vocabulary_of
from hicache_core.kv.spec import Group, GroupKind, KVSpec
from hicache_core.ranks.base import RankGroup, agree_all

log = logging.getLogger(__name__)

CPU_DEVICE_TOKENS = 16384
"""Room of the device tier on a CPU, unless the context is longer or it is set."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are checked against.

    Attributes:
        n_slots: tokens of the device pool, in whole pages.
        context_length: maximum tokens of prompt and answer together.
        vocabulary: number of token ids; valid ids are below it.
        eos_token_ids: tokens that end an answer.
        n_units: units of each group of the spec, in its device pool.
    """

    n_slots: int
    context_length: int
    vocabulary: int
    eos_token_ids: frozenset[int]
    n_units: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, loaded: LoadedModel, spec: KVSpec, config: EngineConfig, cache: HiCacheConfig
    ) -> Limits:
        """The limits of a model under a configuration.

        Args:
            loaded: the model and its tokenizer.
            spec: of its KV.
            config: of the engine.
            cache: of the cache: its pages and snapshots.

        Raises:
            NotEnoughMemory: ``mem_fraction_static`` leaves no room for a page.
            ConfigError: ``context_length`` exceeds the length from which the model's KV changes.
        """
        model = loaded.model
        context_length = _context_length(model, config)
        page_size = cache.page_size
        n_tokens = config.device_tokens or _device_tokens(
            model, spec, config, cache, context_length
        )
        n_pages = max(1, n_tokens // page_size)
        n_units = tuple(_n_units(group, n_pages, config, cache) for group in spec.groups)
        return cls(
            n_pages * page_size, context_length, vocabulary_of(model), _ends(loaded), n_units
        )

    def agreed(self, ranks: RankGroup, page_size: int) -> Limits:
        """The same limits with the smallest device pools of all ranks. A collective."""
        n_pages, *n_units = agree_all(ranks, [self.n_slots // page_size, *self.n_units])
        return replace(self, n_slots=n_pages * page_size, n_units=tuple(n_units))

    def n_new_max(self, request: Request) -> int:
        """Maximum tokens of the request's answer: what it asks for, or what fits.

        Raises:
            InvalidTokens: the prompt is empty, has unknown tokens, or leaves no room.
        """
        tokens = request.tokens
        if not tokens:
            raise InvalidTokens("the prompt is empty; send at least one token")
        if not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            wrong = max(tokens) if min(tokens) >= 0 else min(tokens)
            raise InvalidTokens(
                f"token id {wrong} does not exist in this model; its vocabulary has "
                f"{self.vocabulary} tokens"
            )
        for name, limit in (("context", self.context_length), ("device pool", self.n_slots)):
            if len(tokens) >= limit:
                raise InvalidTokens(
                    f"the prompt has {len(tokens)} tokens; the {name} has room for {limit}, "
                    "the answer included: send a shorter prompt"
                )
        room = min(self.context_length, self.n_slots) - len(tokens)
        return min(request.sampling.max_new_tokens, room)

    @staticmethod
    def check_id(request_id: str, under_way: Collection[str]) -> None:
        """Raises InvalidTokens: a request of this id has not ended."""
        if request_id in under_way:
            raise InvalidTokens(f"request {request_id!r} is still running; use another id")


def _context_length(model: Any, config: EngineConfig) -> int:
    """What is asked for, or what the model was made for and all its requests can share."""
    text = model.config.get_text_config(decoder=True)
    own = int(getattr(text, "max_position_embeddings", 0) or 0)
    own = own if own > 0 else 2048
    rule = length_rule_of(model)
    if (config.context_length or 0) > rule.context:
        raise ConfigError(
            f"context_length is {config.context_length}; it must be at most {rule.context}, since "
            f"the KV of this model is other beyond that length ({rule.cause}) and requests could "
            "not be batched"
        )
    if config.context_length is None and own > rule.context:
        log.warning(
            "the context is %s tokens and not the model's %d: its KV is other beyond that length "
            "(%s) and requests could not be batched",
            rule.context,
            own,
            rule.cause,
        )
    return config.context_length or int(min(own, rule.context))


def _ends(loaded: LoadedModel) -> frozenset[int]:
    """End-of-sequence tokens, by the model's generation config and by the tokenizer."""
    ids: list[Any] = []
    for owner in (getattr(loaded.model, "generation_config", None), loaded.tokenizer):
        found = getattr(owner, "eos_token_id", None)
        ids += found if isinstance(found, list) else [found]
    return frozenset(int(token) for token in ids if token is not None)


def units_needed(group: Group, n_tokens: int, chunk_tokens: int, page_size: int) -> int:
    """Units that one running sequence needs at once.

    Args:
        group: of the spec.
        n_tokens: of the sequence.
        chunk_tokens: tokens of its prompt that are computed together at most.
        page_size: tokens of a page.
    """
    if group.kind is GroupKind.STATE:
        return 2  # its own state, and a snapshot
    # While it decodes, the window of its prompt stays locked beside its own.
    n_read = min(n_tokens, group.window - 1 + max(chunk_tokens, group.window))
    return -(-n_read // page_size) + 2  # it may begin and end inside a page


def _n_units(group: Group, n_pages: int, config: EngineConfig, cache: HiCacheConfig) -> int:
    """The size of a group's device pool beside ``n_pages`` full pages.

    It is what all running sequences need at once. Windows need no more than the full pages do.
    There is room for as many snapshots again as there are intervals in the full pages.
    """
    n_tokens = n_pages * cache.page_size
    n_running = config.max_running * units_needed(
        group, n_tokens, config.chunk_tokens, cache.page_size
    )
    if group.kind is GroupKind.WINDOW:
        return min(n_pages, n_running)
    return n_running + max(config.max_running, n_tokens // cache.state_snapshot_interval)


def _device_tokens(
    model: Any, spec: KVSpec, config: EngineConfig, cache: HiCacheConfig, context_length: int
) -> int:
    n_default = max(CPU_DEVICE_TOKENS, context_length)
    if model.device.type != "cuda":
        return n_default
    free, total = torch.cuda.mem_get_info(model.device)
    used = total - free  # the weights, mostly
    room = int(total * config.mem_fraction_static) - used
    token_nbytes: float = spec.token_nbytes
    for group in spec.groups:
        unit_nbytes = group.spec.page_nbytes(group.page_size(cache.page_size))
        is_state = group.kind is GroupKind.STATE
        room -= unit_nbytes * _n_units(group, 0 if is_state else sys.maxsize, config, cache)
        token_nbytes += is_state * unit_nbytes / cache.state_snapshot_interval
    n_tokens = int(room // token_nbytes) if token_nbytes else n_default * (room > 0)
    if n_tokens < 1:
        raise NotEnoughMemory(
            f"mem_fraction_static {config.mem_fraction_static} of {total / 1e9:.1f} GB leaves no "
            f"room beside {used / 1e9:.1f} GB of weights; raise it, or set device_tokens"
        )
    return n_tokens
