"""Finds where many pages are by asking about few of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from hicache_s3.batch_threads import BatchThreads
from hicache_s3.index import PackIndex
from hicache_s3.pages import Alone, Found


class Search:
    """Where each of ``keys`` is.

    One page of a pack leads to all of the pack, so it is enough to ask about every ``stride``-th
    key; all that one answer covers need no question of their own:

        keys     0 1 2 3 4 5 6 7 8 9        stride 4, packs of 4 pages
        asked    x       x       x          one round of three requests at once
        known    0-3     4-7     8-11

    Attributes:
        places: what is known of each key; None for those that are absent or were not asked for.
        end: the first absent key, or the number of keys.
    """

    def __init__(self, keys: Sequence[str], stride: int, *, leading: bool = True) -> None:
        """Asks nothing yet.

        Args:
            keys: keys, those of a pack side by side.
            stride: how many pages a pack is likely to have.
            leading: whether keys behind the first absent one are of no interest.
        """
        self.keys = keys
        self.stride = stride
        self.places: list[Found] = [None] * len(keys)
        self.end = len(keys)
        self._leading = leading
        self._absent: set[int] = set()
        self._lock = threading.Lock()

    def know(self, find: Callable[[str], PackIndex | None]) -> None:
        """Takes over what is known without asking."""
        for n, key in enumerate(self.keys):
            if self.places[n] is None:
                self.places[n] = find(key)

    def run(self, threads: BatchThreads, ask: Callable[[int], Found]) -> None:
        """Calls ``ask`` with positions, from several threads, until all is known."""
        while waiting := self._waiting():
            asked = waiting[:: self.stride]
            found: dict[int, Found] = {}

            def question(n: int, found: dict[int, Found] = found) -> None:
                if n >= self.end and self._leading:
                    return
                found[n] = place = ask(n)
                if place is None:
                    self.miss(n)

            threads.run(question, asked)
            self._learn(found, waiting)

    def miss(self, n: int) -> None:
        """Notes that the key at ``n`` is absent."""
        with self._lock:
            self._absent.add(n)
            self.places[n] = None
            self.end = min(self.end, n)

    def _waiting(self) -> list[int]:
        """Positions that have no answer yet."""
        stop = self.end if self._leading else len(self.keys)
        return [n for n in range(stop) if self.places[n] is None and n not in self._absent]

    def _learn(self, found: dict[int, Found], waiting: Sequence[int]) -> None:
        for n, place in found.items():
            if isinstance(place, Alone):
                self.places[n] = place
                self.stride = 1
            elif place is not None:
                self.stride = min(self.stride, len(place.slots))
                for other in waiting:
                    if self.keys[other] in place.slots and self.places[other] is None:
                        self.places[other] = place
