"""What HiCache itself costs the scheduler for one request of 100,000 tokens.

The KV of a token is two bytes here, so that moving it costs next to nothing and what is left is
bookkeeping. Everything is real: tree, keys, allocators, jobs, policies, the copy thread and the
storage threads. A sample is the CPU time of the scheduler's thread for all calls of one request,
from its arrival until its last page has been settled. Between two polls the thread sleeps, as if
the model had a step to do; what the sleep itself costs is not the cache's, and is taken off.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.harness import Row
from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.kv.keys import pack_tokens
from hicache_core.kv.spec import KVSpec
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


def thread_cpu_us(step: Callable[[], object]) -> float:
    """CPU time of this thread for one call, in microseconds."""
    gc.collect()
    gc.disable()
    start = time.thread_time()
    step()
    end = time.thread_time()
    gc.enable()
    return (end - start) * 1e6


class Pauses:
    """Sleeps a little at each call; ``cpu_us`` is what that has cost this thread."""

    def __init__(self) -> None:
        self.cpu_us = 0.0

    def __call__(self) -> None:
        start = time.thread_time()
        time.sleep(0.001)
        self.cpu_us += (time.thread_time() - start) * 1e6


def request_us(cache: HiCache, tokens: bytes) -> float:
    """CPU time of one request's calls, in microseconds."""
    pauses = Pauses()
    return thread_cpu_us(partial(serve, cache, tokens, pauses)) - pauses.cpu_us


def serve(cache: HiCache, tokens: bytes, pause: Callable[[], object]) -> None:
    """Makes all calls of one request, without a model, until every job has settled.

    Args:
        cache: the cache.
        tokens: packed token ids of the prompt.
        pause: called between two polls.
    """
    if cache.prefetch("request", tokens):
        while not cache.prefetch_ready("request"):
            pause()
            cache.poll()
    cache.finish_prefetch("request")
    match = cache.match_prefix(tokens)
    cache.lock(match.node)
    loaded = cache.load_back(match)
    pages = loaded.device_pages + cache.allocate(N_PAGES - len(loaded.device_pages))
    cache.wait_layer(0)
    result = cache.insert(tokens, pages)
    cache.free(result.duplicates)
    cache.unlock(match.node)
    assert cache.flush()


def scenarios(share: str | None, repeat: int) -> dict[str, list[float]]:
    """Each scenario's samples, taken on fresh prompts."""
    settings: dict[str, object] = {"hicache_storage_prefetch_policy": "wait_complete"}
    if share is not None:
        settings["hicache_storage_backend"] = "memory"
        settings["hicache_storage_backend_extra_config"] = {"share": share}
    samples: dict[str, list[float]] = {"cold": [], "device hit": [], "host hit": []}
    with opened(**settings) as cache:
        for number in range(repeat):
            run = partial(request_us, cache, prompt(number))
            samples["cold"].append(run())
            samples["device hit"].append(run())
            cache.evict(8 * N_PAGES)
            samples["host hit"].append(run())
            cache.evict(8 * N_PAGES)
        if share is not None:
            with opened(**settings) as other:
                samples["storage hit"] = [
                    request_us(other, prompt(number)) for number in range(repeat)
                ]
    return samples


def rows(quick: bool) -> Iterator[Row]:
    """Cold, device hit, host hit, storage hit; without and with storage."""
    table = "bookkeeping of a request of 100,000 tokens, page 64 (CPU of the scheduler's thread)"
    for label, share in (("no storage", None), ("storage: memory", "bookkeeping")):
        for name, samples in scenarios(share, 5 if quick else 20).items():
            yield Row(table, f"{name}, {label}", "us", samples, target="≤ 1,000 us")
