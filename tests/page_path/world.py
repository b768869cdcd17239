"""The smallest world a page can walk through: tiny pages, real pools, a real tree, a real store.

The content of every page is a function of its prefix, so wrong KV can never pass unseen.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.kv.keys import pack_tokens
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.ranks.base import RankGroup
from hicache_core.types import Namespace

PAGE_SIZE = 4
SPEC = KVSpec.mha(
    num_layers=2, num_heads=1, head_dim=2, dtype="float32", fingerprint="tiny-test-model"
)


def page_content(tokens: bytes, page: int, component: int, layer: int, nbytes: int) -> bytes:
    """What a page must hold, from the whole prefix that it ends."""
    prefix = tokens[: (page + 1) * PAGE_SIZE * 4]
    return hashlib.shake_256(prefix + bytes([component, layer])).digest(nbytes)


@dataclass(frozen=True)
class Outcome:
    """What one request saw.

    Attributes:
        device: tokens found on the device.
        host: tokens found on the host, those from storage included.
        storage: tokens that storage delivered for this request.
        computed_pages: whole pages that had to be computed.
    """

    device: int
    host: int
    storage: int
    computed_pages: int


@dataclass
class World:
    """An engine that computes pages out of their prefix, on one cache."""

    cache: HiCache
    pool: DevicePool
    salt: Namespace = field(default_factory=Namespace)
    n_requests: int = 0

    def request(self, ids: Sequence[int], *, prefetch: bool = True, polls: int = 10_000) -> Outcome:
        """One request from arrival to end; checks every byte that it is served."""
        tokens = pack_tokens(ids)
        self.n_requests += 1
        request_id = f"request-{self.n_requests}"
        if prefetch and self.cache.prefetch(request_id, tokens, self.salt):
            self.wait_for_prefetch(request_id, polls)
        storage = self.cache.finish_prefetch(request_id)
        match = self.cache.match_prefix(tokens, self.salt, request_id=request_id)
        outcome = (match.n_device_tokens, match.n_host_tokens)
        self.cache.lock(match.node)
        loaded = self.cache.load_back(match)
        n_pages = len(tokens) // (4 * PAGE_SIZE)
        n_cached = len(loaded.device_pages)
        pages = loaded.device_pages + self.cache.allocate(n_pages - n_cached)
        for layer in range(SPEC.num_layers):
            self.cache.wait_layer(layer)
            self.check_layer(tokens, pages[:n_cached], layer)
            self.compute_layer(tokens, pages, n_cached, layer)
        result = self.cache.insert(tokens, pages, self.salt)
        self.cache.free(result.duplicates)
        self.cache.unlock(match.node)
        self.check()
        return Outcome(*outcome, storage, n_pages - n_cached)

    def wait_for_prefetch(self, request_id: str, polls: int = 10_000) -> None:
        """Polls until the policy lets the request run."""
        for _ in range(polls):
            if self.cache.prefetch_ready(request_id):
                return
            self.cache.wait(5.0)
            self.cache.poll()
        raise AssertionError(f"{request_id} never became ready")

    def compute_layer(self, tokens: bytes, pages: array[int], first: int, layer: int) -> None:
        for page in range(first, len(pages)):
            for component, layers in enumerate(self.pool.buffers):
                row = layers[layer][pages[page]].view(torch.uint8)
                content = page_content(tokens, page, component, layer, row.numel())
                row.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8).view(row.shape))

    def check_layer(self, tokens: bytes, pages: array[int], layer: int) -> None:
        """The pages hold what their prefix says: no wrong KV."""
        for page, page_id in enumerate(pages):
            for component, layers in enumerate(self.pool.buffers):
                row = layers[layer][page_id].contiguous().view(torch.uint8)
                expected = page_content(tokens, page, component, layer, row.numel())
                assert bytes(row.flatten().tolist()) == expected, (page, component, layer)

    def flush_device(self) -> int:
        """Empties the device tier as far as nothing is locked; pages that left it."""
        return self.cache.evict(self.pool.n_pages)

    def check(self) -> None:
        """Every invariant, now."""
        self.cache.check_integrity()

    def close(self) -> None:
        self.cache.flush(10.0)
        self.check()
        self.cache.close()


def make_world(
    *,
    device_pages: int = 16,
    ratio: float = 2.0,
    storage: dict[str, Any] | None = None,
    backend: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    ranks: RankGroup | None = None,
    batch_pages: int = 128,
    **settings: Any,
) -> World:
    """A world; ``storage`` are the settings of a memory backend (or of ``backend``)."""
    extra: dict[str, Any] = {"prefetch_threshold": PAGE_SIZE} | (storage or {})
    name = backend or ("memory" if storage is not None else None)
    config = HiCacheConfig(
        page_size=PAGE_SIZE,
        hicache_ratio=ratio,
        hicache_storage_backend=name,
        hicache_storage_backend_extra_config=extra,
        **({"hicache_storage_prefetch_policy": "wait_complete"} | settings),
    )
    pool = DevicePool(SPEC, PAGE_SIZE, device_pages)
    cache = HiCache(config, SPEC, pool, clock=clock, ranks=ranks, batch_pages=batch_pages)
    return World(cache, pool)


def opened(worlds: list[World], **settings: Any) -> World:
    """A world that the fixture ``worlds`` closes."""
    world = make_world(**settings)
    worlds.append(world)
    return world


def ids(n: int, start: int = 0) -> list[int]:
    """``n`` token ids that count up from ``start``."""
    return list(range(start, start + n))
