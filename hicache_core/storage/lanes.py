"""Splits the work of one call over a few threads. For work that releases the GIL."""

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
"""Less work than this is not given to another thread: the hand-over would cost more."""


def default_lanes() -> int:
    """Returns 2 where there are two cores, else 1. More add little: memory is the bottleneck."""
    return min(2, len(os.sched_getaffinity(0)))


class Lanes:
    """Up to ``n_lanes`` threads for each call, including the caller's own.

    Threads start when they are first needed and end in ``close``. After ``close`` everything runs
    in the caller. Any thread may call any method.
    """

    def __init__(self, n_lanes: int, name: str) -> None:
        self.n_lanes = n_lanes
        self._pool: ThreadPoolExecutor | None = None
        if n_lanes > 1:
            self._pool = ThreadPoolExecutor(n_lanes - 1, thread_name_prefix=name)

    def split(self, n_items: int, nbytes: int) -> list[range]:
        """Cuts ``range(n_items)`` into up to ``n_lanes`` contiguous parts.

        There are fewer parts if they would have less than ``SPLIT_NBYTES`` on average.

        Args:
            n_items: items of the work.
            nbytes: bytes of all items together.
        """
        n_parts = max(1, min(self.n_lanes, n_items, nbytes // SPLIT_NBYTES))
        cuts = [n_items * part // n_parts for part in range(n_parts + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(cuts)]

    def run(self, work: Callable[[range], T], parts: Sequence[range]) -> list[T]:
        """Returns ``work(part)`` of each part, in order.

        Blocks until all parts have ended, also when one of them raises. Then raises what the first
        of them raised.
        """
        pool = self._pool
        if pool is None or len(parts) < 2:
            return [work(part) for part in parts]
        shares = [_Share(work, part) for part in parts[1:]]
        with contextlib.suppress(RuntimeError):  # no thread can be started
            for share in shares:
                pool.submit(share.run)
        try:
            results = [work(parts[0])]
        finally:
            # Parts that no thread has begun are done here: the pool may be busy for another caller.
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


def n_leading_done(parts: Sequence[range], counts: Sequence[int]) -> int:
    """Returns how many leading items are done, given how many of each part are."""
    total = 0
    for part, count in zip(parts, counts, strict=True):
        total += count
        if count < len(part):
            break
    return total


class _Share(Generic[T]):
    """A part of the work, done by the first thread that takes it.

    A pool that cannot start a thread keeps its tasks and may run them much later, when the pages
    belong to other jobs. So a part can be taken only once.
    """

    def __init__(self, work: Callable[[range], T], part: range) -> None:
        self.part = part
        self.future: Future[T] = Future()
        self._work = work
        self._claim = threading.Lock()

    def take(self) -> bool:
        """Returns whether the caller is the first; then the caller must do the part."""
        return self._claim.acquire(blocking=False)

    def run(self) -> None:
        """Does the part unless it was taken; runs on a thread of the pool."""
        if not self.take():
            return
        try:
            self.future.set_result(self._work(self.part))
        except BaseException as error:  # raised again in the caller
            self.future.set_exception(error)
