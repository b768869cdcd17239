"""The desk: what other threads want to see is made by the owner thread, when it passes by."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Made(NamedTuple, Generic[T]):
    """Something made, and how many seconds ago."""

    value: T
    age_s: float


class Desk(Generic[T]):
    """Makes one thing over and over while somebody wants to see it, and never while nobody does.

    The owner calls ``serve`` once a step; without a wish that costs a comparison. A thread that
    asks gets what is made next, or after ``patience_s`` what was made last: an engine that does not
    step changes nothing.
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
            min_age_s: what is younger is not made again.
            wish_s: how long a wish lasts, so that a page which asks now and then is never behind.
            clock: seconds.
        """
        self._min_age_s = min_age_s
        self._wish_s = wish_s
        self._clock = clock
        self._wanted_until: float | None = None
        self._made: tuple[T, float] | None = None
        self._changed = threading.Condition()

    def serve(self, make: Callable[[], T]) -> None:
        """Makes it if it is wanted and not fresh. Owner thread."""
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

    def ask(self, patience_s: float) -> Made[T] | None:
        """What was made last, once it is fresh or ``patience_s`` are over; None if nothing was.

        Any thread but the owner's.
        """
        with self._changed:
            asked = self._clock()
            self._wanted_until = asked + self._wish_s
            self._changed.wait_for(lambda: self._is_fresh(asked), patience_s)
            made = self._made
        return None if made is None else Made(made[0], max(0.0, self._clock() - made[1]))

    def _is_fresh(self, now: float) -> bool:
        return self._made is not None and now - self._made[1] < self._min_age_s
