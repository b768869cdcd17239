"""Finds out where many pages are with few requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from hicache_s3.index import PackIndex
from hicache_s3.pages import Alone, Found
from hicache_s3.request_threads import RequestThreads


class Search:
    """Where the page of each of ``keys`` is.

    The index under one page of a pack lists the whole pack. So it is enough to look up every
    ``stride``-th key; one answer covers its neighbours:

        keys     0 1 2 3 4 5 6 7 8 9        stride 4, packs of 4 pages
        asked    x       x       x          one round of three requests at once
        known    0-3     4-7     8-11

    Where none of the keys that were asked is present, the step is halved, down to every key: what
    is stored may begin between them.

    Attributes:
        places: where each page is; None if it is absent or was not looked up.
        end: index of the first absent key, or the number of keys.
    """

    def __init__(self, keys: Sequence[str], stride: int, *, leading: bool = True) -> None:
        """Makes no request yet.

        Args:
            keys: of the pages; those of a pack are neighbours.
            stride: how many pages a pack is likely to have.
            leading: whether to ignore the keys after the first absent one.
        """
        self.keys = keys
        self.stride = stride
        self.places: list[Found] = [None] * len(keys)
        self.end = len(keys)
        self._leading = leading
        self._absent: set[int] = set()
        self._lock = threading.Lock()

    def know(self, find: Callable[[str], PackIndex | None]) -> None:
        """Uses ``find`` for the places that are known without a request."""
        for n, key in enumerate(self.keys):
            if self.places[n] is None:
                self.places[n] = find(key)

    def run(self, threads: RequestThreads, ask: Callable[[int], Found]) -> None:
        """Calls ``ask`` with indexes of keys, on ``threads``, until every place is known."""
        step = self.stride
        while waiting := self._waiting():
            asked = waiting[::step]
            found: dict[int, Found] = {}

            def question(n: int, found: dict[int, Found] = found) -> None:
                if n >= self.stop:
                    return
                found[n] = place = ask(n)
                if place is None:
                    self.miss(n)

            threads.run(question, asked)
            self._learn(found, waiting)
            came = any(place is not None for place in found.values())
            step = self.stride if came else max(1, step // 2)

    def miss(self, n: int) -> None:
        """Records that the key at index ``n`` is absent."""
        with self._lock:
            self._absent.add(n)
            self.places[n] = None
            self.end = min(self.end, n)

    @property
    def stop(self) -> int:
        """The index behind the last key whose place matters."""
        return self.end if self._leading else len(self.keys)

    def _waiting(self) -> list[int]:
        """Returns the indexes of keys without an answer."""
        return [n for n in range(self.stop) if self.places[n] is None and n not in self._absent]

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
