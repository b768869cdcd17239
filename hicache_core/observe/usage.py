"""The bytes that stores hold, asked for now and then on a separate thread, so that readers never
wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence

from hicache_core.errors import HiCacheError
from hicache_core.storage.base import ReportsUsage, StorageBackend

EVERY_S = 30.0
"""Seconds between two questions at least."""
MAX_SHARE = 0.01
"""Largest share of the time: a store that must look at all its objects is asked less often."""


class UsageWatch:
    """The bytes by namespace of several open stores, as they were a while ago.

    Threads: ``nbytes`` may be called on any thread and returns at once. Each question runs on a
    thread of its own; while a store does not answer, it is not asked again.
    """

    def __init__(
        self,
        stores: Sequence[StorageBackend],
        clock: Callable[[], float],
    ) -> None:
        """Asks nothing yet.

        Args:
            stores: open stores; those that cannot report their usage are never asked.
            clock: seconds, increasing.
        """
        self._reporting = [store.capability(ReportsUsage) for store in stores]
        self._clock = clock
        self._lock = threading.Lock()
        self._found: Sequence[Mapping[str, int]] = [{} for _ in stores]
        self._next_s: float | None = None  # None: at once
        self._thread: threading.Thread | None = None
        self._can_tell = any(store is not None for store in self._reporting)

    def nbytes(self) -> Sequence[Mapping[str, int]]:
        """The last known usage of each store; empty if it is not known."""
        with self._lock:
            is_due = self._next_s is None or self._clock() >= self._next_s
            if self._can_tell and is_due and self._thread is None:
                thread = threading.Thread(target=self._ask, name="hicache-usage", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread is to be had: asked later
                    thread.start()
                    self._thread = thread
            return self._found

    def close(self, timeout_s: float = 1.0) -> None:
        """Asks no more, and waits for the answer to a running question; may be called twice."""
        with self._lock:
            self._can_tell = False
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _ask(self) -> None:
        started_s = self._clock()
        found = [_usage(store) for store in self._reporting]
        with self._lock:
            now_s = self._clock()
            self._next_s = now_s + max(EVERY_S, (now_s - started_s) / MAX_SHARE)
            self._found = found
            self._thread = None


def _usage(store: ReportsUsage | None) -> Mapping[str, int]:
    if store is None:
        return {}
    try:
        return dict(store.usage())
    except (HiCacheError, OSError):  # the guard has counted it, and the breaker may know
        return {}
