"""What Python does for pages on their way down: calls for a node of 8, and the segments of a page.

The calls are those of all threads, from ``insert`` until storage has the pages: owner, copy thread
and storage threads. Calls of C functions do not count.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Iterator
from types import FrameType

from benchmarks.harness import Row
from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.kv.keys import pack_tokens
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.pools.layout import LAYOUTS

N_PAGES = 8
PAGE_SIZE = 64
CALLS = "Python calls for a node of 8 pages going down (storage: memory)"
SEGMENTS = "segments of a page, 30 layers of k and v (CPU of the thread)"


class CallCount:
    """Counts the Python calls of all threads that start while it is installed."""

    def __init__(self) -> None:
        """Counts nothing yet."""
        self.n = 0

    def __call__(self, _frame: FrameType, event: str, _arg: object) -> None:
        """One event of ``sys.setprofile``."""
        self.n += event == "call"


def calls(layout: str, repeat: int) -> list[float]:
    """Calls for each of ``repeat`` nodes that go down in a cache of this host layout."""
    spec = KVSpec.mha(num_layers=30, num_heads=1, head_dim=1, dtype="int8", fingerprint="page_down")
    config = HiCacheConfig(
        page_size=PAGE_SIZE,
        hicache_mem_layout=layout,  # type: ignore[arg-type]
        hicache_storage_backend="memory",
        hicache_storage_backend_extra_config={"share": uuid.uuid4().hex},
    )
    count, samples = CallCount(), []
    threading.setprofile(count)
    try:
        with HiCache(config, spec, DevicePool(spec, PAGE_SIZE, N_PAGES * (repeat + 1))) as cache:
            for number in range(repeat + 1):  # the first starts threads
                tokens = pack_tokens([number] * (N_PAGES * PAGE_SIZE))
                pages = cache.allocate(N_PAGES)
                count.n = 0
                sys.setprofile(count)
                cache.insert(tokens, pages)
                stored = cache.flush()
                sys.setprofile(None)
                assert stored
                samples.append(float(count.n))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return samples[1:]


def segments_us(layout: str, repeat: int) -> list[float]:
    """Microseconds for the segments of one page."""
    spec = KVSpec.mha(num_layers=30, num_heads=1, head_dim=8, dtype="int8", fingerprint="page_down")
    n_pages = 200
    pool = HostPool(spec, PAGE_SIZE, n_pages, LAYOUTS[layout])
    pages, samples = pool.pages(range(n_pages)), []
    for _ in range(repeat):
        start = time.thread_time()
        for page in range(n_pages):
            pages[page]
        samples.append((time.thread_time() - start) / n_pages * 1e6)
    return samples


def rows(quick: bool) -> Iterator[Row]:
    """Calls and segments, by host layout."""
    repeat = 5 if quick else 20
    for layout in LAYOUTS:
        yield Row(CALLS, layout, "calls", calls(layout, repeat), target="≤ 400")
    for layout in LAYOUTS:
        target = "≤ 5 us" if layout == "layer_first" else None
        yield Row(SEGMENTS, layout, "us", segments_us(layout, 10 * repeat), target=target)
