"""What one ``poll()`` costs the scheduler while many storage jobs are in flight.

Everything is real but the backend, whose calls wait until the benchmark lets them go: so the jobs
stay in flight while ``poll`` is measured. A sample is the CPU time of the scheduler's thread.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence

from benchmarks.bookkeeping import PAGE_SIZE, SPEC, thread_cpu_us
from benchmarks.harness import Row
from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.kv.keys import pack_tokens
from hicache_core.pools.device import DevicePool
from hicache_core.storage.memory import MemoryBackend
from hicache_core.types import Page

N_JOBS = 256
TABLE = "poll() of the controller (CPU of the scheduler's thread)"


class HeldBackend(MemoryBackend):
    """Writes wait for the gate; the rest is a memory store."""

    name = "held"
    gate = threading.Event()

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        """Waits, then stores."""
        self.gate.wait()
        return super().batch_set(keys, pages)


def opened() -> HiCache:
    """A cache whose writes stay in flight."""
    extra = {
        "backend_name": "held",
        "module_path": __name__,
        "class_name": "HeldBackend",
        "share": uuid.uuid4().hex,
    }
    config = HiCacheConfig(
        page_size=PAGE_SIZE,
        hicache_storage_backend="dynamic",
        hicache_storage_backend_extra_config=extra,
    )
    return HiCache(config, SPEC, DevicePool(SPEC, PAGE_SIZE, 2 * N_JOBS))


def rows(quick: bool) -> Iterator[Row]:
    """One ``poll()`` with nothing, and with 256 jobs, in flight."""
    repeat, number = (5, 200) if quick else (20, 1000)
    with opened() as cache:
        yield _row(cache, "nothing in flight", repeat, number, None)
        for n in range(N_JOBS):  # each prefix is one write job
            cache.insert(pack_tokens([n] * PAGE_SIZE), cache.allocate(1))
        while cache.snapshot().jobs_in_flight["copy"]:
            cache.wait(0.1)
            cache.poll()
        n_in_flight = sum(cache.snapshot().jobs_in_flight.values())
        assert n_in_flight >= N_JOBS, n_in_flight
        yield _row(cache, f"{n_in_flight} storage jobs in flight", repeat, number, "< 500 us")
        HeldBackend.gate.set()
        samples = [thread_cpu_us(cache.snapshot) for _ in range(repeat)]
        note = "on the thread that scrapes, not the scheduler's"
        yield Row(TABLE, "snapshot for metrics and status", "us", samples, note=note)


def _row(cache: HiCache, name: str, repeat: int, number: int, target: str | None) -> Row:
    def polls() -> None:
        for _ in range(number):
            cache.poll()

    samples = [thread_cpu_us(polls) / number for _ in range(repeat)]
    return Row(TABLE, name, "us", samples, target=target)
