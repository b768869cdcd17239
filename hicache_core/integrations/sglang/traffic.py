"""What the store has moved, in the shape of SGLang's storage metrics."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

_GB = 1e9


@dataclass(slots=True)
class Moved:
    """The fields of SGLang's ``StorageMetrics``: an item for each call; bandwidths in GB/s."""

    prefetch_pgs: list[int] = field(default_factory=list)
    backup_pgs: list[int] = field(default_factory=list)
    prefetch_bandwidth: list[float] = field(default_factory=list)
    backup_bandwidth: list[float] = field(default_factory=list)


class Traffic:
    """Collects pages and bandwidth of reads and writes until SGLang asks for them. Any thread."""

    def __init__(self, *, counts: bool) -> None:
        """Starts empty.

        Args:
            counts: whether SGLang asks; if not, nothing is kept.
        """
        self._counts = counts
        self._lock = threading.Lock()
        self._moved = Moved()

    def read(self, n_pages: int, page_nbytes: int, elapsed_s: float) -> None:
        """Adds a read.

        Args:
            n_pages: that arrived.
            page_nbytes: of each.
            elapsed_s: time the call took.
        """
        if self._counts and n_pages:
            with self._lock:
                self._moved.prefetch_pgs.append(n_pages)
                self._moved.prefetch_bandwidth.append(_rate(n_pages * page_nbytes, elapsed_s))

    def written(self, n_pages: int, page_nbytes: int, elapsed_s: float) -> None:
        """Adds a write; pages that were stored already do not count.

        Args:
            n_pages: that were written.
            page_nbytes: of each.
            elapsed_s: time the call took.
        """
        if self._counts and n_pages:
            with self._lock:
                self._moved.backup_pgs.append(n_pages)
                self._moved.backup_bandwidth.append(_rate(n_pages * page_nbytes, elapsed_s))

    def take(self) -> Moved | None:
        """Returns what was added since the last call; None if SGLang does not count."""
        if not self._counts:
            return None
        with self._lock:
            taken, self._moved = self._moved, Moved()
        return taken


def _rate(nbytes: int, elapsed_s: float) -> float:
    """Returns GB/s."""
    return nbytes / _GB / max(elapsed_s, 1e-9)
