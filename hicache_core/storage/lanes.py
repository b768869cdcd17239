"""Splits one call's work over a few threads, where the work releases the GIL (I/O, checksums)."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

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
        shares = [_Share(work, part) for part in parts[1:]]
        with contextlib.suppress(RuntimeError):  # no thread is to be had
            for share in shares:
                pool.submit(share.run)
        try:
            results = [work(parts[0])]
        finally:
            # What no thread has begun is done here: the pool may be busy for another caller.
            left = [share.take() for share in shares]
            wait([share.future for share, mine in zip(shares, left, strict=True) if not mine])
        for share, mine in zip(shares, left, strict=True):
            results.append(work(share.part) if mine else share.future.result())
        return results

    def close(self) -> None:
        """Joins the threads."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


class _Share(Generic[T]):
    """A part of the work, done by whoever takes it first.

    A pool that cannot start a thread keeps what it was given and may come to it much later: the
    pages may belong to others by then.
    """

    def __init__(self, work: Callable[[range], T], part: range) -> None:
        self.part = part
        self.future: Future[T] = Future()
        self._work = work
        self._claim = threading.Lock()

    def take(self) -> bool:
        """Whether the caller is the first, and does it."""
        return self._claim.acquire(blocking=False)

    def run(self) -> None:
        """Does it, unless somebody has taken it; on a thread of the pool."""
        if not self.take():
            return
        try:
            self.future.set_result(self._work(self.part))
        except BaseException as error:  # goes to the caller whole
            self.future.set_exception(error)
