"""Splits one call's work over a few threads, where the work releases the GIL (I/O, checksums)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")

SPLIT_NBYTES = 2 << 20
"""Below this a hand-over to another thread costs more than it saves."""


def default_lanes() -> int:
    """Two where there are two cores: a third adds little, since memory is what they wait for."""
    return min(2, len(os.sched_getaffinity(0)))


class Lanes:
    """Up to ``n_lanes`` threads, the caller's among them; threads start when first needed.

    Any thread may call ``run``; ``close`` joins. A closed one runs everything in the caller.
    """

    def __init__(self, n_lanes: int, name: str) -> None:
        self.n_lanes = n_lanes
        self._pool: ThreadPoolExecutor | None = None
        if n_lanes > 1:
            self._pool = ThreadPoolExecutor(n_lanes - 1, thread_name_prefix=name)

    def split(self, n_items: int, nbytes: int) -> list[range]:
        """``range(n_items)`` in as many contiguous parts as pay for ``nbytes`` of work."""
        n_parts = max(1, min(self.n_lanes, n_items, nbytes // SPLIT_NBYTES))
        cuts = [n_items * part // n_parts for part in range(n_parts + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(cuts)]

    def run(self, work: Callable[[range], T], parts: Sequence[range]) -> list[T]:
        """``work`` of each part; returns when all have ended, also if one of them raises."""
        pool = self._pool
        if pool is None or len(parts) < 2:
            return [work(part) for part in parts]
        futures = [pool.submit(work, part) for part in parts[1:]]
        try:
            results = [work(parts[0])]
        finally:
            # What no thread has begun is done here: the pool may be busy for another caller.
            left = [future.cancel() for future in futures]
            wait(futures)
        for part, future, is_left in zip(parts[1:], futures, left, strict=True):
            results.append(work(part) if is_left else future.result())
        return results

    def close(self) -> None:
        """Joins the threads."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
