"""Histograms of what storage calls take and move, and counts of what went wrong."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

LATENCY_BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Upper bounds of the latency buckets, in seconds; one bucket more takes what is above."""

NBYTES_BOUNDS = tuple(4**n for n in range(6, 16))
"""Upper bounds of the byte buckets, 4 KiB to 1 GiB; one bucket more takes what is above."""

OPERATIONS = ("exists", "get", "set", "delete")


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by upper bound; not cumulative.

    Attributes:
        bounds: upper bounds, each inclusive.
        counts: one count for each bound, and one for what is above the last.
        total: sum of all that was counted.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def n(self) -> int:
        """How many values were counted."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class OperationStatus:
    """What the calls of one operation took and moved.

    Attributes:
        latency_s: seconds of each call that came back, failed ones and retries included.
        nbytes: bytes that each successful call moved.
    """

    latency_s: Histogram
    nbytes: Histogram


class _Counts:
    """A histogram that grows. The caller holds the lock."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def frozen(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.total)


class CallRecorder:
    """Counts the calls of one backend, by operation. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latency = {name: _Counts(LATENCY_BOUNDS_S) for name in OPERATIONS}
        self._nbytes = {name: _Counts(NBYTES_BOUNDS) for name in OPERATIONS}
        self._errors: dict[tuple[str, str], int] = {}

    def took(self, operation: str, elapsed_s: float) -> None:
        """A call came back, whatever came of it."""
        with self._lock:
            self._latency[operation].add(elapsed_s)

    def moved(self, operation: str, nbytes: int) -> None:
        """A call succeeded and moved ``nbytes``."""
        with self._lock:
            self._nbytes[operation].add(nbytes)

    def failed(self, operation: str, kind: str) -> None:
        """A call raised an exception of class ``kind``."""
        with self._lock:
            self._errors[operation, kind] = self._errors.get((operation, kind), 0) + 1

    def operations(self) -> Mapping[str, OperationStatus]:
        """The histograms of every operation, as of now."""
        with self._lock:
            return {
                name: OperationStatus(self._latency[name].frozen(), self._nbytes[name].frozen())
                for name in OPERATIONS
            }

    def errors(self) -> Mapping[tuple[str, str], int]:
        """How often each operation raised each class of exception."""
        with self._lock:
            return dict(self._errors)
