"""Soft pins: this process touches pinned keys every few seconds, so that they are evicted last.

Redis has no command to keep a key. Under an LRU or LFU policy it evicts keys that were not used for
long, or seldom, before keys that are touched regularly.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from hicache_core.errors import BackendError

logger = logging.getLogger(__name__)

TOUCH_INTERVAL_S = 5.0


class PinRefresher:
    """Touches pinned keys on a thread of its own. Any thread may call any method."""

    def __init__(
        self,
        touch: Callable[[Sequence[bytes]], object],
        interval_s: float = TOUCH_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the thread; ``close`` ends it.

        Args:
            touch: makes keys the most recently used; called on the thread. A ``BackendError``
                does not end the thread.
            interval_s: seconds between two touches.
            clock: seconds; only differences count.
        """
        self._touch = touch
        self._interval_s = interval_s
        self._clock = clock
        self._ends: dict[bytes, float] = {}
        self._changed = threading.Condition()
        self._closed = False
        # A daemon, so that a script that ends without ``close`` exits.
        self._thread = threading.Thread(target=self._run, name="hicache-redis-pins", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Returns how many keys are pinned now."""
        with self._changed:
            return len(self._current())

    def pin(self, keys: Sequence[bytes], ttl_s: float) -> None:
        """Pins ``keys`` for ``ttl_s`` seconds from now on, replacing earlier pins."""
        end = self._clock() + ttl_s
        with self._changed:
            for key in keys:
                if ttl_s > 0:
                    self._ends[key] = end
                else:
                    self._ends.pop(key, None)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after its current touch; all pins end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _current(self) -> list[bytes]:
        """Returns the keys whose pins have not ended; forgets the others. Needs the lock."""
        now = self._clock()
        self._ends = {key: end for key, end in self._ends.items() if end > now}
        return list(self._ends)

    def _run(self) -> None:
        while keys := self._next():
            try:
                self._touch(keys)
            except BackendError as exc:  # a soft pin: the next turn may reach the server again
                logger.warning("%d pinned keys were not touched: %s", len(keys), exc)

    def _next(self) -> list[bytes]:
        """Blocks until keys are pinned, and for an interval; returns them, empty at the end."""
        with self._changed:
            while not self._closed:
                self._changed.wait_for(lambda: self._closed or self._ends)
                self._changed.wait_for(lambda: self._closed, self._interval_s)
                keys = self._current()
                if keys and not self._closed:
                    return keys
        return []
