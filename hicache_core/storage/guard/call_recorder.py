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

PAGES_BOUNDS = (1.0, 5.0, 10.0, 50.0, 100.0)
"""Upper bounds of the buckets of pages; one more bucket holds larger batches."""

GIB_PER_S_BOUNDS = (0.1, 0.5, 1.0, 5.0, 10.0, 50.0, 100.0)
"""Upper bounds of the buckets of bandwidth in GiB per second."""

OPERATIONS = ("exists", "get", "set", "delete")
"""Operations that are listed from the start; others appear with their first call."""


@dataclass(frozen=True, slots=True)
class OperationStatus:
    """Duration and size of the calls of one operation.

    Attributes:
        latency_s: seconds of each call that returned, including failures and retries.
        nbytes: bytes that each successful call moved.
        pages: pages of each batch of which at least one was moved.
        gib_per_s: GiB per second that each of these batches moved, retries included.
    """

    latency_s: Histogram
    nbytes: Histogram
    pages: Histogram
    gib_per_s: Histogram


class _Operation:
    """The calls of one operation so far."""

    __slots__ = ("gib_per_s", "latency_s", "nbytes", "pages")

    def __init__(self) -> None:
        self.latency_s = Distribution(LATENCY_BOUNDS_S)
        self.nbytes = Distribution(NBYTES_BOUNDS)
        self.pages = Distribution(PAGES_BOUNDS)
        self.gib_per_s = Distribution(GIB_PER_S_BOUNDS)

    def status(self) -> OperationStatus:
        return OperationStatus(
            self.latency_s.histogram(),
            self.nbytes.histogram(),
            self.pages.histogram(),
            self.gib_per_s.histogram(),
        )


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

    def moved_batch(self, operation: str, n_pages: int, nbytes: int, elapsed_s: float) -> None:
        """Records a successful call for a batch.

        Args:
            operation: its name.
            n_pages: pages that were moved.
            nbytes: bytes of these.
            elapsed_s: how long it took, retries included.
        """
        with self._lock:
            calls = self._operations[operation]
            calls.nbytes.add(nbytes)
            if n_pages and elapsed_s > 0:
                calls.pages.add(n_pages)
                calls.gib_per_s.add(nbytes / 2**30 / elapsed_s)

    def failed(self, operation: str, kind: str) -> None:
        """Records that a call raised an exception of class ``kind``."""
        with self._lock:
            self._errors[operation, kind] = self._errors.get((operation, kind), 0) + 1

    def operations(self) -> Mapping[str, OperationStatus]:
        """Returns a snapshot of the histograms of every operation."""
        with self._lock:
            return {name: calls.status() for name, calls in self._operations.items()}

    def errors(self) -> Mapping[tuple[str, str], int]:
        """Returns how often each operation raised each class of exception."""
        with self._lock:
            return dict(self._errors)
