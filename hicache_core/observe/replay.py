"""The latest batches, for subscribers that missed some."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator


class ReplayBuffer:
    """Numbers batches and keeps the newest ones, within two bounds. One thread."""

    def __init__(self, max_batches: int, max_nbytes: int, first_seq: int = 0) -> None:
        """Starts empty.

        Args:
            max_batches: batches that are kept.
            max_nbytes: bytes that are kept.
            first_seq: sequence number of the first batch.
        """
        self._max_batches = max_batches
        self._max_nbytes = max_nbytes
        self._batches: deque[bytes] = deque()
        self._nbytes = 0
        self._first_seq = self.next_seq = first_seq

    @property
    def n_batches(self) -> int:
        """Batches added so far."""
        return self.next_seq - self._first_seq

    def add(self, payload: bytes) -> int:
        """Adds ``payload``, drops the oldest batches above the limits; returns its number."""
        self._batches.append(payload)
        self._nbytes += len(payload)
        while len(self._batches) > self._max_batches or self._nbytes > self._max_nbytes:
            self._nbytes -= len(self._batches.popleft())
        self.next_seq += 1
        return self.next_seq - 1

    def since(self, start_seq: int) -> Iterator[tuple[int, bytes]]:
        """The batches from ``start_seq`` on that are still kept, each with its number."""
        first = self.next_seq - len(self._batches)
        for seq, payload in enumerate(self._batches, first):
            if seq >= start_seq:
                yield seq, payload
