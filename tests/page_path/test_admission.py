"""Cost-aware admission through the whole controller, on a store of any speed, in virtual time."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.kv.keys import pack_tokens
from hicache_core.pools.device import DevicePool
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.workers.executor import run_job
from hicache_core.types import ExistsJob, Job, JobResult, JobState, WriteJob
from tests.page_path.world import PAGE_SIZE, SPEC, ids

N_PAGES = 64
N_REQUESTS = 100
COMPUTE_S = 1.0
"""Time to compute a whole prompt."""


@dataclass
class Clock:
    """Seconds that pass only when somebody waits or computes."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Store:
    """One thread that carries out jobs in virtual time; writes take none."""

    backend: StorageBackend
    clock: Clock
    latency_s: float
    page_s: float
    free_at_s: float = 0.0
    jobs: dict[int, tuple[Job, float, float]] = field(default_factory=dict)
    cancelled: list[Job] = field(default_factory=list)

    def submit(self, job: Job) -> bool:
        cost_s = 0.0
        if isinstance(job, ExistsJob):
            cost_s = self.latency_s
        elif not isinstance(job, WriteJob):
            cost_s = self.latency_s + len(job.keys) * self.page_s
        start_s = max(self.clock(), self.free_at_s)
        self.free_at_s = start_s + cost_s
        self.jobs[job.job_id] = (job, start_s, self.free_at_s)
        return True

    def submit_all(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if not self.submit(job)]

    def cancel(self, job_id: int) -> bool:
        job, start_s, _ = self.jobs.get(job_id, (None, 0.0, 0.0))
        if job is None or start_s < self.clock():
            return False
        del self.jobs[job_id]
        self.free_at_s = max((end for _, _, end in self.jobs.values()), default=self.clock())
        self.cancelled.append(job)
        return True

    def drain(self) -> list[JobResult]:
        results = [JobResult(job, JobState.CANCELLED, 0) for job in self.cancelled]
        self.cancelled.clear()
        done = [entry for entry in self.jobs.values() if entry[2] <= self.clock()]
        for job, start_s, end_s in done:
            del self.jobs[job.job_id]
            result = run_job(self.backend, job, lambda: 0.0)
            results.append(JobResult(job, result.state, result.n_pages, "", end_s - start_s))
        return results

    def wait(self, timeout_s: float, *, for_all: bool = False) -> bool:
        ends = [end_s for _, _, end_s in self.jobs.values()]
        until_s = self.clock() + timeout_s
        self.clock.now_s = max(self.clock(), min([*ends, until_s]))
        return bool(ends)

    @property
    def n_in_flight(self) -> int:
        return len(self.jobs)

    def close(self, timeout_s: float) -> list[Job]:
        return []


@dataclass
class Engine:
    """Serves one prompt again and again, each time from storage or by computing it."""

    cache: HiCache
    clock: Clock
    store: Store
    n_served: int = 0

    def compute(self, n_pages: int) -> None:
        seconds = COMPUTE_S * n_pages / N_PAGES
        self.clock.now_s += seconds
        self.cache.prefilled(n_pages * PAGE_SIZE, seconds)

    def first_token_s(self) -> float:
        """Time to the first token of the prompt, which neither device nor host has."""
        while not (self.cache.flush(1e9) and self.cache.reset()):
            self.cache.wait(1.0)
        self.n_served += 1
        tokens, request_id = pack_tokens(ids(N_PAGES * PAGE_SIZE + 1)), str(self.n_served)
        start_s = self.clock()
        self.cache.prefetch(request_id, tokens)
        self.cache.poll()
        while not self.cache.prefetch_ready(request_id):
            self.cache.wait(0.05)
            self.cache.poll()
        self.cache.finish_prefetch(request_id)
        match = self.cache.match_prefix(tokens)
        self.cache.lock(match.node)
        loaded = self.cache.load_back(match).device_pages
        if len(loaded) < N_PAGES:
            self.compute(N_PAGES - len(loaded))
        end_s = self.clock()
        pages = loaded + self.cache.allocate(N_PAGES - len(loaded))
        self.cache.free(self.cache.insert(tokens, pages).duplicates)
        self.cache.unlock(match.node)
        self.cache.check_integrity()
        return end_s - start_s


@pytest.fixture
def opened() -> Iterator[Any]:
    caches: list[HiCache] = []

    def open_engine(admission: str, latency_s: float, page_s: float) -> Engine:
        clock = Clock()
        config = HiCacheConfig(
            page_size=PAGE_SIZE,
            hicache_storage_backend="memory",
            hicache_storage_backend_extra_config={
                "share": uuid.uuid4().hex,
                "prefetch_threshold": PAGE_SIZE,
            },
            hicache_storage_prefetch_policy="wait_complete",
            prefetch_admission=admission,
        )
        pool = DevicePool(SPEC, PAGE_SIZE, 2 * N_PAGES)
        cache = HiCache(config, SPEC, pool, clock=clock, batch_pages=16)
        caches.append(cache)
        assert cache.parts.storage is not None
        attachment = cache.parts.storage.current
        assert attachment is not None
        attachment.worker.close(1.0)
        store = Store(attachment.backend, clock, latency_s, page_s)
        attachment.worker = store  # type: ignore[assignment]  # all that the controller calls
        engine = Engine(cache, clock, store)
        engine.first_token_s()  # computes the prompt and stores it
        return engine

    yield open_engine
    for cache in caches:
        cache.close()


@pytest.mark.parametrize("latency_s", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("slowness", [0.02, 0.2, 0.7, 1.0, 1.5, 5.0, 30.0])
def test_cost_aware_loses_at_most_five_percent_at_any_store_speed(
    opened: Any, slowness: float, latency_s: float
) -> None:
    """Against the better of always and never loading; ``slowness`` is load over compute time."""
    page_s = slowness * COMPUTE_S / N_PAGES
    always_s = N_REQUESTS * opened("always", latency_s, page_s).first_token_s()
    never_s = N_REQUESTS * COMPUTE_S
    aware = opened("cost_aware", latency_s, page_s)
    aware_s = sum(aware.first_token_s() for _ in range(N_REQUESTS))
    assert aware_s <= 1.05 * min(always_s, never_s)


@pytest.mark.parametrize(("before", "after"), [(30.0, 0.02), (0.02, 30.0), (5.0, 0.5)])
def test_a_store_that_changes_its_speed_is_noticed(
    opened: Any, before: float, after: float
) -> None:
    aware = opened("cost_aware", 0.0, before * COMPUTE_S / N_PAGES)
    for _ in range(50):
        aware.first_token_s()
    aware.store.page_s = after * COMPUTE_S / N_PAGES
    took_s = [aware.first_token_s() for _ in range(400)]
    assert max(took_s) <= 2.1 * COMPUTE_S  # nobody waits longer than computing takes
    assert sorted(took_s[-20:])[10] <= 1.05 * COMPUTE_S * min(after, 1.0)
