"""Which chunks a server stored, as far as it knows, and how large they are."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

MAX_CHUNKS = 1 << 20
"""So many chunks are remembered."""

K = TypeVar("K", bound=Hashable)


class HeldChunks(Generic[K]):
    """Bytes of the chunks stored and not found missing since, the last used ones. Any thread."""

    def __init__(self, max_chunks: int = MAX_CHUNKS) -> None:
        """Stores its argument: of more chunks the least recently used are forgotten."""
        self._max_chunks = max_chunks
        self._lock = threading.Lock()
        self._nbytes: OrderedDict[K, int] = OrderedDict()

    def add(self, stored: Mapping[K, int]) -> tuple[list[int], dict[K, int]]:
        """Remembers chunks.

        Args:
            stored: bytes of each.

        Returns:
            By how many bytes each adds to what was held: 0 if it was held already. And the chunks
            that are forgotten for them.
        """
        with self._lock:
            added = [0 if key in self._nbytes else nbytes for key, nbytes in stored.items()]
            for key, nbytes in stored.items():
                self._nbytes.setdefault(key, nbytes)
                self._nbytes.move_to_end(key)
            n_over = len(self._nbytes) - self._max_chunks
            return added, dict(self._nbytes.popitem(last=False) for _ in range(n_over))

    def touch(self, keys: Iterable[K]) -> None:
        """Makes the held ones of ``keys`` the last used ones."""
        with self._lock:
            for key in keys:
                if key in self._nbytes:
                    self._nbytes.move_to_end(key)

    def remove(self, keys: Iterable[K]) -> dict[K, int]:
        """Removes and returns those of ``keys`` that are held."""
        with self._lock:
            return {key: self._nbytes.pop(key) for key in keys if key in self._nbytes}
