"""The history: samples of a cache, one per second, of which the latest are kept for charts."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hicache_core.histogram import Histogram
from hicache_core.observe.snapshot import CacheSnapshot, PoolStatus
from hicache_core.observe.windows import Observation, Watch
from hicache_core.process.main_thread import main_has_ended

MAX_SAMPLES = 900
INTERVAL_S = 1.0
MAX_OPERATIONS = 24


@dataclass(frozen=True, slots=True)
class PoolSample:
    """Tokens of one pool.

    Attributes:
        total: all tokens.
        used: tokens in pages that have an owner.
        evictable: cached tokens that can be evicted; None if they are not counted.
    """

    total: int
    used: int
    evictable: int | None


@dataclass(frozen=True, slots=True)
class OperationSample:
    """Calls of one operation of one store since the sample before.

    Attributes:
        backend, op: the backend and the operation.
        n: number of calls.
        p50_s, p99_s: upper bounds of the median and of the 99th percentile; None without calls.
    """

    backend: str
    op: str
    n: int
    p50_s: float | None
    p99_s: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A cache at one moment; counters since its start.

    Attributes:
        n: number of the sample, from 1.
        at_s: when, in seconds since 1970.
        device, host: the pools; ``host`` is None without a host tier.
        stored_nbytes, loaded_nbytes: bytes that stores acknowledged and delivered.
        usage_nbytes: bytes that the stores hold, as far as they know; None if none knows.
        hit_tokens: cached prompt tokens, by tier.
        missed_tokens: computed prompt tokens.
        hit_rate: share of cached tokens in the last minute.
        breakers: state of each breaker, by backend.
        operations: calls of stores since the sample before.
    """

    n: int
    at_s: float
    device: PoolSample
    host: PoolSample | None
    stored_nbytes: int
    loaded_nbytes: int
    usage_nbytes: int | None
    hit_tokens: Mapping[str, int]
    missed_tokens: int
    hit_rate: float
    breakers: Mapping[str, str]
    operations: tuple[OperationSample, ...]


class History:
    """Samples a watch on a thread of its own and keeps the last ``MAX_SAMPLES``.

    Example:
        >>> from hicache_core.observe.snapshot import CacheSnapshot, PoolStatus
        >>> snapshot = CacheSnapshot(16, 4096, device=PoolStatus(8, 6, 0, None, 2))
        >>> history = History(Watch(lambda: snapshot))
        >>> history.sample()
        >>> [sample.device.used for sample in history.since(0)]
        [32]
    """

    def __init__(
        self,
        watch: Watch,
        *,
        interval_s: float = INTERVAL_S,
        max_samples: int = MAX_SAMPLES,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Starts nothing.

        Args:
            watch: what to sample.
            interval_s: seconds between two samples.
            max_samples: how many samples are kept; the oldest are dropped.
            now: seconds since 1970.
        """
        self.interval_s = interval_s
        self.started_s = now()
        self._watch = watch
        self._now = now
        self._samples: deque[Sample] = deque(maxlen=max_samples)
        self._calls: dict[tuple[str, str], tuple[int, ...]] = {}
        self._n = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name="hicache-history")
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; may be called twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def sample(self) -> None:
        """Takes a sample now; one thread at a time."""
        seen = self._watch.observe()
        operations = self._operations(seen.snapshot)
        self._n += 1
        sample = _sample(self._n, self._now(), seen, operations)
        with self._lock:
            self._samples.append(sample)

    def since(self, n: int) -> list[Sample]:
        """The samples after number ``n``, oldest first; any thread."""
        with self._lock:
            return [sample for sample in self._samples if sample.n > n]

    def _run(self) -> None:
        while not self._stop.is_set() and not main_has_ended():
            self.sample()
            self._stop.wait(self.interval_s)

    def _operations(self, snapshot: CacheSnapshot) -> tuple[OperationSample, ...]:
        found = []
        calls: dict[tuple[str, str], tuple[int, ...]] = {}
        for backend in snapshot.backends:
            for operation in backend.operations[: MAX_OPERATIONS - len(calls)]:
                key, latency = (backend.name, operation.op), operation.latency_s
                calls[key] = tuple(latency.counts)
                grown = _grown(latency, self._calls.get(key))
                p50_s, p99_s = grown.quantile(0.5), grown.quantile(0.99)
                found.append(OperationSample(*key, grown.n, p50_s, p99_s))
        self._calls = calls
        return tuple(found)


def _grown(latency: Histogram, before: tuple[int, ...] | None) -> Histogram:
    """The growth since ``before``; everything, if the store was reopened."""
    counts = tuple(latency.counts)
    if before is not None and len(before) == len(counts):
        grown = tuple(new - old for new, old in zip(counts, before, strict=True))
        if min(grown, default=0) >= 0:
            counts = grown
    return Histogram(latency.bounds, counts, 0.0)


def _sample(
    n: int, at_s: float, seen: Observation, operations: tuple[OperationSample, ...]
) -> Sample:
    snapshot = seen.snapshot
    usages = [sum(b.usage_nbytes.values()) for b in snapshot.backends if b.usage_nbytes]
    host = snapshot.host
    return Sample(
        n,
        at_s,
        _pool(snapshot.device, snapshot.page_size),
        None if host is None else _pool(host, snapshot.page_size),
        snapshot.stored_nbytes,
        snapshot.loaded_nbytes,
        sum(usages) if usages else None,
        dict(snapshot.hit_tokens),
        snapshot.counters.get("missed_tokens", 0),
        seen.hit_rate,
        {backend.name: backend.breaker for backend in snapshot.backends},
        operations,
    )


def _pool(pool: PoolStatus, page_size: int) -> PoolSample:
    evictable = pool.evictable_pages
    return PoolSample(
        pool.n_pages * page_size,
        pool.used_pages * page_size,
        None if evictable is None else evictable * page_size,
    )
