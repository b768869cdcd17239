"""Figures of a backend: latency and bandwidth as they are here and now, without a verdict."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

from hicache_core.testing.harness import Harness
from hicache_core.testing.report import Figure

_BATCH = 32
_SIZES = (4 << 10, 64 << 10, 1 << 20)
_SINGLES = 100
_REPEATS = 3


def measure(h: Harness) -> list[Figure]:
    """Latency of single calls on 4 KiB, and bandwidth of batches of 32 at several sizes."""
    figures = [*_latencies(h)]
    for nbytes in _SIZES:
        if nbytes == h.nbytes(nbytes):
            figures += _bandwidths(h, nbytes)
    return figures


def _latencies(h: Harness) -> list[Figure]:
    backend, (key, absent) = h.backend, h.keys(2, "latency")
    page = h.filled(key, (4096,))
    calls: dict[str, Callable[[], object]] = {
        "set of 4 KiB": lambda: backend.batch_set([key], [page]),
        "get of 4 KiB": lambda: backend.batch_get([key], [page]),
        "exists": lambda: backend.exists(key),
        "exists, absent": lambda: backend.exists(absent),
    }
    figures = []
    for what, call in calls.items():
        samples = sorted(_timed(call) for _ in range(_SINGLES))
        p99 = samples[int(len(samples) * 0.99) - 1]
        figures.append(Figure(f"{what}, median", statistics.median(samples) * 1e6, "us"))
        figures.append(Figure(f"{what}, 99 %", p99 * 1e6, "us"))
    return figures


def _bandwidths(h: Harness, nbytes: int) -> list[Figure]:
    backend, sets, gets = h.backend, [], []
    for n in range(_REPEATS):
        keys = h.keys(_BATCH, f"{nbytes} {n}")
        pages = [h.filled(key, (nbytes,)) for key in keys]
        sets.append(_timed(partial(backend.batch_set, keys, pages)))
        gets.append(_timed(partial(backend.batch_get, keys, pages)))
    moved = _BATCH * nbytes / 1e6
    what = f"batches of {_BATCH} x {nbytes >> 10} KiB"
    return [
        Figure(f"set, {what}", moved / statistics.median(sets), "MB/s"),
        Figure(f"get, {what}", moved / statistics.median(gets), "MB/s"),
    ]


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
