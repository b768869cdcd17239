"""Copies pages into one link of a chain, in the background."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Collection, Sequence

from hicache_core.storage.base import StorageBackend
from hicache_core.storage.segments import nbytes_of
from hicache_core.storage.workers.executor import Worker
from hicache_core.types import JobState, Page, WriteJob

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.05
"""Waiting checks at least this often, since another thread may take the result first."""


class Copier:
    """Copies pages and lets a worker store them. Drops and counts what exceeds its limit.

    Threads: any thread may call any method. ``settle`` and ``close`` block, up to their timeout.
    """

    def __init__(
        self, backend: StorageBackend, worker: Worker, max_nbytes: int, clock: Callable[[], float]
    ) -> None:
        """Copies nothing yet.

        Args:
            backend: the link that gets the copies.
            worker: stores them; ``close`` closes it.
            max_nbytes: maximum bytes of copies that wait or are being stored.
            clock: seconds; only differences count.
        """
        self._backend = backend
        self._worker = worker
        self._max_nbytes = max_nbytes
        self._clock = clock
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._pending: dict[int, frozenset[str]] = {}
        self._n_copied = 0
        self._n_dropped = 0
        self._n_lost_since_settled = 0

    @property
    def counts(self) -> tuple[int, int]:
        """Number of pages that were copied, and of pages that were dropped or not stored."""
        self._take_results()
        with self._lock:
            return self._n_copied, self._n_dropped

    @property
    def nbytes_in_flight(self) -> int:
        """Bytes of copies that wait or are being stored."""
        return self._worker.write_nbytes_in_flight

    def offer(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        """Accepts the leading pages that fit into the limit, and copies them.

        The caller may reuse the memory of ``pages`` when this returns.

        Args:
            keys: one for each page.
            pages: to be stored in the link.

        Returns:
            How many pages were accepted.
        """
        self._take_results()
        room = self._max_nbytes - self._worker.write_nbytes_in_flight
        n_taken = nbytes = 0
        for page in pages:
            if nbytes + nbytes_of(page) > room:
                break
            nbytes += nbytes_of(page)
            n_taken += 1
        if n_taken:
            copies = [_copy(page) for page in pages[:n_taken]]
            if not self._submit(keys[:n_taken], copies, nbytes):
                n_taken = 0
        if n_taken < len(keys):
            with self._lock:
                self._n_dropped += len(keys) - n_taken
                self._n_lost_since_settled += len(keys) - n_taken
        return n_taken

    def settle(self, timeout_s: float, keys: Collection[str] | None = None) -> bool:
        """Blocks until no copy is pending, or none of ``keys``.

        Args:
            timeout_s: maximum time to block, in seconds.
            keys: only copies of these; None for all.

        Returns:
            False if the time ran out.
        """
        wanted = None if keys is None else frozenset(keys)
        while True:
            self._take_results()
            with self._lock:
                pending = list(self._pending.values())
            if not any(wanted is None or wanted & one for one in pending):
                return True
            if timeout_s <= 0:
                return False
            slice_s = min(timeout_s, LOOK_INTERVAL_S)
            if not self._worker.wait(slice_s):
                timeout_s -= slice_s

    def take_losses(self) -> int:
        """Returns how many pages were dropped or not stored since the last call of this."""
        self._take_results()
        with self._lock:
            n_lost, self._n_lost_since_settled = self._n_lost_since_settled, 0
            return n_lost

    def close(self, timeout_s: float) -> bool:
        """Waits up to ``timeout_s`` for pending copies, then drops and counts the rest.

        Returns:
            False if the link hangs; a thread that is inside a call of it is abandoned.
        """
        end_s = self._clock() + timeout_s
        self.settle(timeout_s)
        abandoned = self._worker.close(max(0.0, end_s - self._clock()))
        self._take_results()
        with self._lock:
            n_left = sum(len(keys) for keys in self._pending.values())
        if abandoned:
            logger.warning(
                "backend %s is still storing %d copied pages; they are abandoned",
                self._backend.name,
                n_left,
            )
        return not abandoned

    def _submit(self, keys: Sequence[str], copies: Sequence[Page], nbytes: int) -> bool:
        job_id = next(self._ids)
        with self._lock:
            self._pending[job_id] = frozenset(keys)
        accepted = self._worker.submit(WriteJob(job_id, list(keys), copies, nbytes, each=True))
        if not accepted:
            with self._lock:
                del self._pending[job_id]
        return accepted

    def _take_results(self) -> None:
        """Counts the copies that have ended since the last call, and releases their memory."""
        for result in self._worker.drain():
            if result.state is JobState.OVERDUE:
                continue
            n_copied = sum(result.mask or ())
            with self._lock:
                n_lost = len(result.job.keys) - n_copied
                del self._pending[result.job.job_id]
                self._n_copied += n_copied
                self._n_dropped += n_lost
                self._n_lost_since_settled += n_lost


def _copy(page: Page) -> Page:
    """Returns a copy of the page with the same segments."""
    memory = memoryview(bytearray(nbytes_of(page)))
    copies: list[memoryview] = []
    start = 0
    for segment in page:
        copies.append(memory[start : start + segment.nbytes])
        copies[-1][:] = segment
        start += segment.nbytes
    return copies
