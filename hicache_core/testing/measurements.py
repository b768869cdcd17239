"""Measurements of a backend: latency and bandwidth as they are here and now, without a verdict."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from hicache_core.testing.harness import Harness
from hicache_core.testing.report import Measurement

_BATCH = 32
_SIZES = (4 << 10, 64 << 10, 1 << 20)
_SINGLES = 100
_REPEATS = 3


def measure(h: Harness) -> list[Measurement]:
    """Latency of single calls on 4 KiB, and bandwidth of batches of 32 at several sizes."""
    measurements = [*_latencies(h)]
    for nbytes in _SIZES:
        if nbytes == h.nbytes(nbytes):
            measurements += _bandwidths(h, nbytes)
    return measurements


def _latencies(h: Harness) -> list[Measurement]:
    backend, (key, absent) = h.backend, h.keys(2, "latency")
    page = h.filled(key, (4096,))
    calls: dict[str, Callable[[], object]] = {
        "set of 4 KiB": lambda: backend.batch_set([key], [page]),
        "get of 4 KiB": lambda: backend.batch_get([key], [page]),
        "exists": lambda: backend.exists(key),
        "exists, absent": lambda: backend.exists(absent),
    }
    measurements = []
    for what, call in calls.items():
        samples = sorted(_timed(call) for _ in range(_SINGLES))
        p99 = samples[int(len(samples) * 0.99) - 1]
        measurements.append(Measurement(f"{what}, median", statistics.median(samples) * 1e6, "us"))
        measurements.append(Measurement(f"{what}, 99 %", p99 * 1e6, "us"))
    return measurements


def _bandwidths(h: Harness, nbytes: int) -> list[Measurement]:
    """MB/s of what the backend says that it stored and filled: a dropped page moved no byte."""
    backend = h.backend
    rates: dict[str, list[float]] = {"set": [], "get": []}
    for n in range(_REPEATS):
        keys = h.keys(_BATCH, f"{nbytes} {n}")
        pages = [h.filled(key, (nbytes,)) for key in keys]
        for what, call in (("set", backend.batch_set), ("get", backend.batch_get)):
            started = time.perf_counter()
            n_pages = call(keys, pages)
            rates[what].append(n_pages * nbytes / 1e6 / (time.perf_counter() - started))
    return [
        Measurement(
            f"{what}, batches of {_BATCH} x {nbytes >> 10} KiB", statistics.median(rate), "MB/s"
        )
        for what, rate in rates.items()
    ]


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
