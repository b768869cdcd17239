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
        self._stored_as: dict[K, int] = {}  # the latest addition of each
        self._n_additions = 0

    @property
    def n_additions(self) -> int:
        """How often ``add`` was called; to be read before the store is asked what it has."""
        return self._n_additions

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
            self._n_additions += 1
            for key, nbytes in stored.items():
                self._nbytes.setdefault(key, nbytes)
                self._nbytes.move_to_end(key)
                self._stored_as[key] = self._n_additions
            n_over = len(self._nbytes) - self._max_chunks
            forgotten = dict(self._nbytes.popitem(last=False) for _ in range(n_over))
            for key in forgotten:
                del self._stored_as[key]
            return added, forgotten

    def touch(self, keys: Iterable[K]) -> None:
        """Makes the held ones of ``keys`` the last used ones."""
        with self._lock:
            for key in keys:
                if key in self._nbytes:
                    self._nbytes.move_to_end(key)

    def remove(self, keys: Iterable[K], n_additions: int | None = None) -> dict[K, int]:
        """Removes and returns those of ``keys`` that are held.

        Args:
            keys: not in the store.
            n_additions: as it was when the store was asked: what was added since stays, of which
                the answer says nothing. None if they were deleted.
        """
        with self._lock:
            latest = self._n_additions if n_additions is None else n_additions
            gone = [key for key in keys if self._stored_as.get(key, latest + 1) <= latest]
            return {key: self._remove(key) for key in dict.fromkeys(gone)}

    def _remove(self, key: K) -> int:
        del self._stored_as[key]
        return self._nbytes.pop(key)
