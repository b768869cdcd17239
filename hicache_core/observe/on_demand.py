"""OnDemand: a value that the owner thread makes when another thread wants to see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Aged(NamedTuple, Generic[T]):
    """Something made, and how many seconds ago."""

    value: T
    age_s: float


class OnDemand(Generic[T]):
    """Lets other threads ask for something that only the owner thread can make.

    The owner calls ``serve`` once a step; if nobody asks, that costs one comparison. A thread that
    asks gets what is made next, or after ``patience_s`` what was made last. That is current too,
    since an engine that takes no step changes nothing.
    """

    def __init__(
        self,
        *,
        min_age_s: float = 1.0,
        wish_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Holds nothing yet.

        Args:
            min_age_s: nothing is made again before it is this old, in seconds.
            wish_s: seconds that a request to make it lasts, so that a page which asks regularly
                always finds a recent one.
            clock: seconds, increasing.
        """
        self._min_age_s = min_age_s
        self._wish_s = wish_s
        self._clock = clock
        self._wanted_until: float | None = None
        self._made: tuple[T, float] | None = None
        self._changed = threading.Condition()

    def serve(self, make: Callable[[], T]) -> None:
        """Makes it if a thread asked for it and the last one is too old. Owner thread."""
        if self._wanted_until is None:
            return
        with self._changed:
            now = self._clock()
            if self._wanted_until is not None and now > self._wanted_until:
                self._wanted_until = None
            if self._wanted_until is None or self._is_fresh(now):
                return
        value = make()
        with self._changed:
            self._made = (value, now)
            self._changed.notify_all()

    def ask(self, patience_s: float) -> Aged[T] | None:
        """What was made last, once it is fresh or ``patience_s`` are over; None if nothing was.

        Any thread but the owner's.
        """
        with self._changed:
            asked = self._clock()
            self._wanted_until = asked + self._wish_s
            self._changed.wait_for(lambda: self._is_fresh(asked), patience_s)
            made = self._made
        return None if made is None else Aged(made[0], max(0.0, self._clock() - made[1]))

    def _is_fresh(self, now: float) -> bool:
        return self._made is not None and now - self._made[1] < self._min_age_s
