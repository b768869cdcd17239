"""Prefix caching for Hugging Face transformers: a model whose prompts come from HiCache.

::

    with CachedModel.open(model, HiCacheConfig()) as cached:
        answer = cached.generate(input_ids, max_new_tokens=32)
        print(answer.tokens, answer.cached)

One sequence at a time, on the thread that opened it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import xxhash
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hicache_core.build import HiCache
from hicache_core.config import HiCacheConfig
from hicache_core.controller.controller import Controller
from hicache_core.errors import InvalidTokens, LoadFailed, PoolExhausted, SpecError
from hicache_core.integrations.paged_cache import PagedCache
from hicache_core.kv_spec import KVSpec
from hicache_core.page_keys import TOKEN_NBYTES, pack_tokens
from hicache_core.pools.device import DevicePool
from hicache_core.radix.results import Match
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

Tokens = Sequence[int] | torch.Tensor

# Requests that share with all others of no name.
_SHARED = Namespace()

# How long to sleep between two looks at a prefetch that is under way.
_POLL_S = 0.0005


@dataclass(frozen=True, slots=True)
class Answer:
    """What ``CachedModel.generate`` gives back.

    Attributes:
        tokens: the new tokens, without the prompt.
        cached: how many tokens of the prompt came from where.
    """

    tokens: list[int]
    cached: CachedTokens


class Turn:
    """One prompt under way; made by ``CachedModel.turn``.

    Attributes:
        past: the cache to hand to the model; it holds the prefix that was found.
        cached: how many tokens of the prompt came from where.
    """

    def __init__(
        self,
        cache: Controller,
        past: PagedCache,
        match: Match,
        cached: CachedTokens,
        namespace: Namespace,
    ) -> None:
        """Owns nothing: ``match`` stays locked as long as the turn lasts."""
        self.past = past
        self.cached = cached
        self._cache = cache
        self._match = match
        self._namespace = namespace

    def store(self, tokens: Tokens, *, priority: int = 0) -> int:
        """Gives what the model computed to the cache: the whole pages of it.

        Args:
            tokens: the prompt and all that followed. The last token of an answer was never fed to
                the model, so it may be among them: only what ``past`` holds is stored.
            priority: for the eviction policy of that name.

        Returns:
            How many tokens of the sequence the cache knows now. Fewer than a page short of all;
            only the prefix if the device pool has no room.

        Raises:
            InvalidTokens: fewer tokens than the model has seen.
        """
        ids = _token_list(tokens)
        n_seen = self.past.get_seq_length()
        if len(ids) < n_seen:
            raise InvalidTokens(f"the model has seen {n_seen} tokens; only {len(ids)} were given")
        page_size = self._cache.page_size
        n_pages, n_shared = n_seen // page_size, self.past.n_shared_pages
        try:
            new_pages = self._cache.allocate(n_pages - n_shared)
        except PoolExhausted as error:
            log.warning("%d tokens are not cached: %s", n_seen - n_shared * page_size, error)
            return n_shared * page_size
        try:
            self.past.write_pages(n_shared, new_pages)
        except BaseException:
            self._cache.free(new_pages)
            raise
        pages = self._match.device_pages[:n_shared] + new_pages
        result = self._cache.insert(
            pack_tokens(ids[: n_pages * page_size]), pages, self._namespace, priority=priority
        )
        self._cache.free(result.duplicates)
        self._cache.poll()
        return n_pages * page_size


class CachedModel:
    """A transformers ``…ForCausalLM`` and a HiCache for its prefixes.

    Attributes:
        model: the model, unchanged.
        cache: the tiers behind it.
        device_pool: the first of them.
    """

    def __init__(self, model: Any, cache: Controller, device_pool: DevicePool) -> None:
        """Joins the two; use ``open`` to build the cache as well.

        Raises:
            SpecError: the model has layers that do not keep the KV of every token.
        """
        check_layers(model.config)
        self.model = model
        self.cache = cache
        self.device_pool = device_pool
        self._request_ids = (f"turn-{n}" for n in itertools.count(1))

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
            model: a transformers ``…ForCausalLM`` without sliding windows.
            config: of the cache.
            device_tokens: room of the device tier, in tokens.
            fingerprint: identity of config and weights; ``fingerprint_of_model`` by default.

        Raises:
            SpecError: the model has layers that do not keep the KV of every token.
            NotEnoughMemory: the pools are larger than what is left.
            BackendError: the storage backend cannot be opened.
        """
        check_layers(model.config)
        spec = kv_spec_of(model, fingerprint or fingerprint_of_model(model))
        n_pages = max(1, device_tokens // config.page_size)
        pool = DevicePool(spec, config.page_size, n_pages, model.device)
        return cls(model, HiCache(config, spec, pool), pool)

    def close(self) -> None:
        """Closes the cache; what has not reached storage yet is given up (``cache.flush``)."""
        self.cache.close()

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
            arguments: of ``model.generate``: max_new_tokens, do_sample, streamer, …

        Raises:
            InvalidTokens: an empty prompt, more than one, or something that is no token.
            ConfigError: assisted decoding over a prefix.
        """
        ids = _token_list(input_ids)
        try:
            return self._generate(ids, namespace, arguments)
        except LoadFailed as error:
            log.warning("the cached prefix did not arrive, computing all of it: %s", error)
            past = PagedCache(self.device_pool, array("i"))
            return Answer(self._run(ids, past, arguments)[len(ids) :], CachedTokens())

    def _generate(self, ids: list[int], namespace: Namespace, arguments: dict[str, Any]) -> Answer:
        with self.turn(ids, namespace=namespace) as turn:
            sequence = self._run(ids, turn.past, arguments)
            turn.store(sequence)
        return Answer(sequence[len(ids) :], turn.cached)

    def _run(self, ids: list[int], past: PagedCache, arguments: dict[str, Any]) -> list[int]:
        prompt = torch.tensor([ids], dtype=torch.int64, device=self.model.device)
        mask = torch.ones_like(prompt)
        output = self.model.generate(prompt, attention_mask=mask, past_key_values=past, **arguments)
        sequences: torch.Tensor = getattr(output, "sequences", output)
        tokens: list[int] = sequences[0].tolist()
        return tokens

    @contextmanager
    def turn(self, input_ids: Tokens, *, namespace: Namespace = _SHARED) -> Iterator[Turn]:
        """Finds, fetches and loads the longest cached prefix; for callers with a loop of their own.

        ::

            with cached.turn(ids) as turn:
                output = model.generate(…, past_key_values=turn.past)
                turn.store(output[0])

        The last token of the prompt is always left to the model: its logits are the answer. The
        rows may still be on their way when this returns; each layer waits for its own.

        Raises:
            InvalidTokens: an empty prompt, more than one, or something that is no token.
        """
        tokens = pack_tokens(_token_list(input_ids))
        match, cached = self._find(tokens, namespace)
        self.cache.lock(match.node)
        try:
            loaded = self.cache.load_back(match)
            if loaded.n_tokens < match.n_tokens:  # no room on the device for what the host has
                cached = CachedTokens(device=loaded.n_tokens)
            past = PagedCache(self.device_pool, loaded.device_pages, self.cache.wait_layer)
            yield Turn(self.cache, past, loaded, cached, namespace)
        finally:
            self.cache.unlock(match.node)

    def _find(self, tokens: bytes, namespace: Namespace) -> tuple[Match, CachedTokens]:
        """The longest match, after storage was asked for what device and host lack."""
        self.cache.poll()
        usable = tokens[:-TOKEN_NBYTES]
        before = self.cache.match_prefix(usable, namespace, touch=False)
        request_id = next(self._request_ids)
        if self.cache.prefetch(request_id, tokens, namespace):
            while not self.cache.prefetch_ready(request_id):
                time.sleep(_POLL_S)
                self.cache.poll()
            self.cache.finish_prefetch(request_id)
        match = self.cache.match_prefix(usable, namespace, request_id=request_id)
        device, host = before.n_device_tokens, before.n_host_tokens
        return match, CachedTokens(device, host, max(0, match.n_tokens - device - host))


def check_layers(config: Any) -> None:
    """Raises SpecError for a model whose layers do not all keep the KV of every token."""
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    if others := sorted(kind.__name__ for kind in kinds - {DynamicLayer}):
        raise SpecError(
            f"{type(config).__name__} has layers of the kind {', '.join(others)}; pages hold full "
            "attention only (a sliding window that the context never fills may be switched off: "
            "config.sliding_window = None)"
        )


def kv_spec_of(model: Any, fingerprint: str) -> KVSpec:
    """The spec of what ``model`` really hands to its cache, found by computing one token.

    A config does not always tell: of an MLA model, transformers caches the latent as keys and the
    rotary key as values, and a model's cache may have another dtype than its weights.

    Raises:
        SpecError: the layers differ in shape or dtype.
    """
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros((1, 1), dtype=torch.int64, device=model.device), past_key_values=past)
    layers: list[Any] = list(past.layers)
    rows = {
        (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], layer.keys.dtype)
        for layer in layers
    }
    if len(rows) != 1:
        raise SpecError(f"the layers have several shapes of KV, pages need one: {sorted(rows)}")
    num_heads, k_dim, v_dim, dtype = rows.pop()
    return KVSpec.mha(
        num_layers=len(layers),
        num_heads=num_heads,
        head_dim=k_dim,
        v_head_dim=v_dim,
        dtype=str(dtype).removeprefix("torch."),
        fingerprint=fingerprint,
    )


def fingerprint_of_model(model: Any) -> str:
    """A digest of the config and of every weight in memory, 32 hex digits.

    It reads all weights: a tenth of a second for each GB on a CPU. For large models on a device,
    ``hicache_core.fingerprint.fingerprint_of_files`` is quicker.
    """
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if not key.startswith("_") and key != "transformers_version"
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        content = xxhash.xxh3_128_hexdigest(raw)
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype} {content}".encode())
    return digest.hexdigest()[:32]


def _token_list(tokens: Tokens) -> list[int]:
    """Token ids as a list; a tensor may have a leading dimension of 1."""
    if isinstance(tokens, torch.Tensor):
        if tokens.ndim == 2 and tokens.shape[0] != 1:
            raise InvalidTokens(f"one prompt at a time; found a batch of {tokens.shape[0]}")
        tokens = tokens.flatten().tolist()
    if not len(tokens):
        raise InvalidTokens("the prompt is empty: there is no token to answer to")
    return list(tokens)
