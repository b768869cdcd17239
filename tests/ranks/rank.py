"""One rank: a process with a cache of its part of the model, driven through a pipe.

Every page's content is a function of its prefix and of which layer, head and component of the model
it is, so wrong KV can never pass unseen: not another rank's, not another layer's.
"""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.errors import RankLost
from hicache_core.kv.keys import pack_tokens
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.ranks.gloo import TorchRankGroup
from tests.ranks.stores import Store

PAGE_SIZE = 4
MHA = KVSpec.mha(
    num_layers=4, num_heads=8, head_dim=2, dtype="float32", fingerprint="tiny", scale_dtype="int8"
)
MLA = KVSpec.mla(num_layers=4, kv_lora_rank=6, rope_dim=2, dtype="float32", fingerprint="tiny")
WINDOW = 64


def spec_of(parallel: str, rank: int, world_size: int) -> KVSpec:
    """What a rank holds: ``tensor``, ``latent`` (MLA, the same on all), or ``pipeline``."""
    if parallel == "latent":
        return MLA
    if parallel == "pipeline":
        n_layers = MHA.num_layers // world_size
        return MHA.shard(layers=(rank * n_layers, (rank + 1) * n_layers))
    n_heads = 8 // world_size
    return MHA.shard(heads=(rank * n_heads, (rank + 1) * n_heads))


class Rank:
    """The commands of a rank; each is a method, called by every rank in the same order."""

    def __init__(self, group: TorchRankGroup) -> None:
        self.group = group
        self.cache: HiCache | None = None
        self.n_requests = 0

    def open(
        self,
        path: str,
        *,
        parallel: str = "tensor",
        device_pages: int = 32,
        trouble: dict[str, Any] | None = None,
        **settings: Any,
    ) -> int:
        """Opens a cache on the store at ``path``; pages of its host pool."""
        Store.trouble(**(trouble or {}))
        self.spec = spec_of(parallel, self.group.rank, self.group.world_size)
        self.pool = DevicePool(self.spec, PAGE_SIZE, device_pages)
        extra = {
            "backend_name": Store.name,
            "module_path": "tests.ranks.stores",
            "class_name": "Store",
            "path": path,
            "prefetch_threshold": PAGE_SIZE,
        } | settings.pop("extra", {})
        config = HiCacheConfig(
            page_size=PAGE_SIZE,
            hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config=extra,
            **({"hicache_storage_prefetch_policy": "wait_complete"} | settings),
        )
        self.cache = HiCache(config, self.spec, self.pool, ranks=self.group)
        host = self.cache.snapshot().host
        assert host is not None
        return host.n_pages

    def trouble(self, **attributes: Any) -> None:
        Store.trouble(**attributes)

    def request(self, ids: Sequence[int], *, prefetch: bool = True) -> dict[str, int]:
        """One request from arrival to end; checks every byte that it is served."""
        cache, tokens = self.open_cache, pack_tokens(ids)
        self.n_requests += 1
        request_id = f"request-{self.n_requests}"
        n_polls = 0
        if prefetch and cache.prefetch(request_id, tokens):
            while not cache.prefetch_ready(request_id):
                cache.wait(0.05)
                cache.poll()
                n_polls += 1
        storage = cache.finish_prefetch(request_id)
        match = cache.match_prefix(tokens)
        found = {"device": match.n_device_tokens, "host": match.n_host_tokens, "storage": storage}
        cache.lock(match.node)
        loaded = cache.load_back(match)
        n_pages, n_cached = len(tokens) // (4 * PAGE_SIZE), len(loaded.device_pages)
        pages = loaded.device_pages + cache.allocate(n_pages - n_cached)
        for layer in range(self.spec.num_layers):
            cache.wait_layer(layer)
            for page, page_id in enumerate(pages):
                for component in range(len(self.spec.components)):
                    self.visit(tokens, page, page_id, component, layer, is_cached=page < n_cached)
        result = cache.insert(tokens, pages)
        cache.free(result.duplicates)
        cache.unlock(match.node)
        cache.poll()
        cache.check_integrity()
        return found | {"computed_pages": n_pages - n_cached}

    def visit(
        self, tokens: bytes, page: int, page_id: int, component: int, layer: int, *, is_cached: bool
    ) -> None:
        """Checks a page's rows of one layer, or computes them."""
        rows = self.pool.buffers[component][layer][page_id].view(torch.uint8)
        first_layer, (first_head, stop_head, _) = self.spec.layers[0], self.spec.heads
        prefix = tokens[: (page + 1) * PAGE_SIZE * 4]
        heads = [
            hashlib.shake_256(prefix + bytes([component, first_layer + layer, head])).digest(
                rows.numel() // (stop_head - first_head)
            )
            for head in range(first_head, stop_head)
        ]
        expected = torch.frombuffer(bytearray(b"".join(heads)), dtype=torch.uint8)
        expected = expected.view(len(heads), PAGE_SIZE, -1).transpose(0, 1).reshape(rows.shape)
        if is_cached:
            assert torch.equal(rows, expected), (page, component, layer)
        else:
            rows.copy_(expected)

    def flush(self) -> bool:
        return self.open_cache.flush(20.0)

    def poll_for(self, n_polls: int) -> None:
        for _ in range(n_polls):
            self.open_cache.poll()

    def poll_on(self) -> tuple[str, float]:
        """Polls until a rank is lost: what was said, and how long the last poll took."""
        while True:
            start = time.monotonic()
            try:
                self.open_cache.poll()
            except RankLost as error:
                return str(error), time.monotonic() - start

    def forget(self) -> bool:
        """Empties device and host once nothing is under way; storage stays."""
        cache = self.open_cache
        return cache.flush(20.0) and cache.reset()

    def evict_device(self) -> int:
        return self.open_cache.evict(self.pool.n_pages)

    def counters(self) -> dict[str, int]:
        counters = self.open_cache.counters
        return {name: getattr(counters, name) for name in counters.__slots__}

    def n_written(self) -> int:
        return Store.n_written

    def agree(self, n: int) -> list[int]:
        return self.group.agree_min([n + self.group.rank] * WINDOW)[:1]

    def gather(self, text: str) -> list[str]:
        return self.group.gather(text * self.group.rank)

    def close(self) -> float:
        """Closes the cache; seconds that it took."""
        start = time.monotonic()
        if self.cache is not None:
            self.cache.close(2.0)
        return time.monotonic() - start

    @property
    def open_cache(self) -> HiCache:
        assert self.cache is not None
        return self.cache


def serve(
    pipe: Connection, rank: int, world_size: int, store: str, timeout_s: float, group_args: Any
) -> None:
    """The process: joins the group, then carries out (command, arguments) until the pipe closes."""
    torch.set_num_threads(1)
    try:
        group = TorchRankGroup.create(
            rank, world_size, store, timeout_s=timeout_s, **({"window": WINDOW} | group_args)
        )
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))
        return
    served = Rank(group)
    pipe.send((True, None))
    while True:
        try:
            command, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(served, command)(*args, **kwargs)))
        except Exception as error:
            lines = traceback.format_exception_only(error)
            where = "".join(traceback.format_tb(error.__traceback__)[-2:])
            pipe.send((False, f"{''.join(lines)}{where}"))
