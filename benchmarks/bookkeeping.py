"""What HiCache itself costs the scheduler for one request of 100,000 tokens.

The KV of a token is two bytes here, so that moving it costs next to nothing and what is left is
bookkeeping: packing is done, tree, keys, allocators, jobs and policies are real, as are the copy
thread and the storage threads. "By CPU time" is that of the scheduler's thread alone.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Iterator

from benchmarks.harness import Row
from hicache_core.build import HiCache
from hicache_core.config import HiCacheConfig
from hicache_core.kv_spec import KVSpec
from hicache_core.page_keys import pack_tokens
from hicache_core.pools.device import DevicePool

N_TOKENS = 100_000
PAGE_SIZE = 64
N_PAGES = N_TOKENS // PAGE_SIZE
SPEC = KVSpec.mha(num_layers=1, num_heads=1, head_dim=1, dtype="int8", fingerprint="bookkeeping")


def opened(**settings: object) -> HiCache:
    """A cache that holds a handful of such requests."""
    config = HiCacheConfig(page_size=PAGE_SIZE, **settings)  # type: ignore[arg-type]
    return HiCache(config, SPEC, DevicePool(SPEC, PAGE_SIZE, 8 * N_PAGES))


def prompt(number: int) -> bytes:
    """The ``number``-th prompt; no two share a page."""
    return pack_tokens(array("I", range(number * 1000, number * 1000 + N_TOKENS)))


def timed(steps: list[Callable[[], object]]) -> tuple[float, float]:
    """Wall and thread CPU seconds of ``steps``, one after the other."""
    gc.collect()
    gc.disable()
    cpu_start, start = time.thread_time(), time.perf_counter()
    for step in steps:
        step()
    end, cpu_end = time.perf_counter(), time.thread_time()
    gc.enable()
    return end - start, cpu_end - cpu_start


def serve(cache: HiCache, tokens: bytes) -> None:
    """All calls of one request, without a model."""
    cache.poll()
    match = cache.match_prefix(tokens)
    cache.lock(match.node)
    loaded = cache.load_back(match)
    pages = loaded.device_pages + cache.allocate(N_PAGES - len(loaded.device_pages))
    cache.wait_layer(0)
    result = cache.insert(tokens, pages)
    cache.free(result.duplicates)
    cache.unlock(match.node)
    cache.poll()


def scenarios(cache: HiCache, repeat: int) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Each scenario's samples, taken on fresh prompts."""
    samples: dict[str, list[tuple[float, float]]] = {"cold": [], "device hit": [], "host hit": []}
    for number in range(repeat):
        tokens = prompt(number)
        samples["cold"].append(timed([lambda: serve(cache, tokens)]))  # noqa: B023 - runs at once
        cache.flush()
        samples["device hit"].append(timed([lambda: serve(cache, tokens)]))  # noqa: B023
        cache.flush()
        cache.evict(8 * N_PAGES)
        samples["host hit"].append(timed([lambda: serve(cache, tokens)]))  # noqa: B023
        cache.flush()
        cache.evict(8 * N_PAGES)
    yield from samples.items()


def rows(quick: bool) -> Iterator[Row]:
    """Cold, device hit and host hit; without and with storage."""
    table = "bookkeeping of a request of 100,000 tokens, page 64"
    for label, settings in (
        ("device and host", {}),
        ("and storage (memory)", {"hicache_storage_backend": "memory"}),
    ):
        with opened(**settings) as cache:
            for name, samples in scenarios(cache, 5 if quick else 20):
                yield Row(
                    table,
                    f"{name}, {label}",
                    "us",
                    [wall * 1e6 for wall, _ in samples],
                    [cpu * 1e6 for _, cpu in samples],
                    target="≤ 1,000 us",
                )
