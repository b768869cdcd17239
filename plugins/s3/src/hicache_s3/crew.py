"""A few threads that share the requests of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from hicache_core.errors import BackendError

T = TypeVar("T")


class Crew:
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

        helpers = [self._pool.submit(share) for _ in range(min(self.n_threads, len(todo)) - 1)]
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
        """Joins the threads."""
        self._pool.shutdown()
