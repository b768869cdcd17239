"""A few threads that share the requests of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from hicache_core.errors import BackendError

T = TypeVar("T")


class BatchThreads:
    """Up to ``n_threads`` threads for a call, the caller's own among them. Thread-safe."""

    def __init__(self, n_threads: int) -> None:
        """Threads start when they are first needed."""
        self.n_threads = n_threads
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="hicache-s3")

    def run(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """``work`` of each item, begun in order; returns when all have ended.

        After the first ``BackendError`` no more items are begun, and it is raised in the end.
        """
        todo = list(items)
        shared = iter(todo)  # next() of a list's iterator is atomic
        failures: list[BackendError] = []

        def share() -> None:
            for item in shared:
                try:
                    work(item)
                except BackendError as error:
                    failures.append(error)
                if failures:
                    return

        helpers = self._call(share, min(self.n_threads, len(todo)) - 1)
        try:
            share()
        finally:
            # Those that have not begun never need to: the pool may be busy for another caller.
            wait([helper for helper in helpers if not helper.cancel()])
        for helper in helpers:
            if not helper.cancelled():
                helper.result()
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Joins the threads; calls that are under way go on with their callers alone."""
        self._pool.shutdown()

    def _call(self, share: Callable[[], None], n_helpers: int) -> list[Future[None]]:
        helpers: list[Future[None]] = []
        for _ in range(n_helpers):
            try:
                helpers.append(self._pool.submit(share))
            except RuntimeError:  # closed meanwhile
                break
        return helpers
