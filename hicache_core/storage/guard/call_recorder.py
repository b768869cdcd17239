"""Histograms of the duration and size of storage calls, and counts of their errors."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from hicache_core.histogram import Distribution, Histogram

LATENCY_BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Upper bounds of the latency buckets in seconds; one more bucket holds larger values."""

NBYTES_BOUNDS = tuple(4**n for n in range(6, 16))
"""Upper bounds of the byte buckets, 4 KiB to 1 GiB; one more bucket holds larger values."""

OPERATIONS = ("exists", "get", "set", "delete")
"""Operations that are listed from the start; others appear with their first call."""


@dataclass(frozen=True, slots=True)
class OperationStatus:
    """Duration and size of the calls of one operation.

    Attributes:
        latency_s: seconds of each call that returned, including failures and retries.
        nbytes: bytes that each successful call moved.
    """

    latency_s: Histogram
    nbytes: Histogram


class _Operation:
    """The calls of one operation so far."""

    __slots__ = ("latency_s", "nbytes")

    def __init__(self) -> None:
        self.latency_s = Distribution(LATENCY_BOUNDS_S)
        self.nbytes = Distribution(NBYTES_BOUNDS)


class CallRecorder:
    """Counts the calls of one backend, by operation. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations = defaultdict(_Operation, {name: _Operation() for name in OPERATIONS})
        self._errors: dict[tuple[str, str], int] = {}

    def took(self, operation: str, elapsed_s: float) -> None:
        """Records the duration of a call that returned or raised."""
        with self._lock:
            self._operations[operation].latency_s.add(elapsed_s)

    def moved(self, operation: str, nbytes: int) -> None:
        """Records the bytes of a successful call."""
        with self._lock:
            self._operations[operation].nbytes.add(nbytes)

    def failed(self, operation: str, kind: str) -> None:
        """Records that a call raised an exception of class ``kind``."""
        with self._lock:
            self._errors[operation, kind] = self._errors.get((operation, kind), 0) + 1

    def operations(self) -> Mapping[str, OperationStatus]:
        """Returns a snapshot of the histograms of every operation."""
        with self._lock:
            return {
                name: OperationStatus(calls.latency_s.histogram(), calls.nbytes.histogram())
                for name, calls in self._operations.items()
            }

    def errors(self) -> Mapping[tuple[str, str], int]:
        """Returns how often each operation raised each class of exception."""
        with self._lock:
            return dict(self._errors)
