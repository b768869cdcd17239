"""Rate: how many of something there were a second, lately."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

WINDOW_S = 10.0


class Rate:
    """Counts over the last ``WINDOW_S`` seconds. One thread adds; others may read."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Keeps the clock."""
        self._clock = clock
        self._events: deque[tuple[float, int]] = deque()

    def add(self, n: int) -> None:
        """``n`` more, now."""
        now = self._clock()
        self._events.append((now, n))
        while self._events[0][0] < now - WINDOW_S:
            self._events.popleft()

    def per_s(self) -> float:
        """Those of the window, by its length."""
        start = self._clock() - WINDOW_S
        return sum(n for at, n in list(self._events) if at >= start) / WINDOW_S
