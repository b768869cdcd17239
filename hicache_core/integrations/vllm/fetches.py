"""Pages that a worker has read and verified for requests that wait for their blocks."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from hicache_core.integrations.foreign.store import Answer, OnDone
from hicache_core.types import Page

logger = logging.getLogger(__name__)

MAX_WAIT_S = 5.0
"""How long a fetch waits for room; then its request is computed."""


class Pages(Protocol):
    """Host memory for some pages."""

    @property
    def pages(self) -> Sequence[Page]:
        """The memory of each page."""


P = TypeVar("P", bound=Pages)


class Reader(Protocol):
    """What is used of a ``ForeignStore``."""

    def submit_exists(self, keys: Sequence[str], on_done: OnDone) -> None:
        """Asks which keys are present."""

    def submit_read(self, keys: Sequence[str], pages: Sequence[Page], on_done: OnDone) -> None:
        """Reads and verifies pages.

        Args:
            keys: one for each page.
            pages: where to read to.
            on_done: gets the answer.
        """


@dataclass(eq=False, slots=True)
class _Fetch(Generic[P]):
    """One fetch.

    Attributes:
        fetch_id: its id.
        keys: of the pages, in order.
        until_s: when it stops to wait for room.
        n_pages: pages that it reads: those that are present, as far as they ever fit.
        held: their memory, once there is room and it was allocated.
        n_good: leading pages that were verified; None while that is unknown.
        is_dropped: whether nobody waits for it any more.
    """

    fetch_id: int
    keys: Sequence[str]
    until_s: float
    n_pages: int = 0
    held: P | None = None
    n_good: int | None = None
    is_dropped: bool = False


class Fetches(Generic[P]):
    """Reads leading pages ahead, into a limited amount of host memory.

    A fetch asks which pages are present, waits for room, reads, and is then held until it is taken
    or dropped. Memory is allocated outside the lock, as that may take long: it is pinned if the KV
    cache is on a GPU.

    Threads: ``start``, ``take``, ``drop`` and ``take_reports`` belong to the worker; the rest runs
    on threads of the store. ``take`` and ``drop`` allocate for fetches that waited for their room.
    """

    def __init__(
        self,
        store: Reader,
        allocate: Callable[[int], P],
        *,
        max_pages: int,
        clock: Callable[[], float],
    ) -> None:
        """Holds nothing yet.

        Args:
            store: has the pages.
            allocate: returns memory for a number of pages.
            max_pages: how many pages may be held at a time; a fetch reads no more than these.
            clock: seconds; only differences count.
        """
        self._store = store
        self._allocate = allocate
        self._max_pages = max_pages
        self._clock = clock
        self._lock = threading.Lock()
        self._fetches: dict[int, _Fetch[P]] = {}
        self._waiting: deque[_Fetch[P]] = deque()  # for room
        self._ended: list[_Fetch[P]] = []
        self._n_free = max_pages

    @property
    def n_free(self) -> int:
        """Pages for which there is room."""
        with self._lock:
            return self._n_free

    def start(self, fetch_id: int, keys: Sequence[str]) -> None:
        """Starts a fetch.

        Args:
            fetch_id: its id, never used before.
            keys: of its pages, in order.
        """
        fetch = _Fetch[P](fetch_id, keys, self._clock() + MAX_WAIT_S)
        self._fetches[fetch_id] = fetch
        self._store.submit_exists(keys, lambda answer: self._found(fetch, answer))

    def take(self, fetch_id: int) -> P:
        """Hands over the pages of a fetch that was reported; gives their room back."""
        fetch = self._fetches.pop(fetch_id)
        assert fetch.held is not None
        held = fetch.held
        self._give_back(fetch)
        return held

    def drop(self, fetch_id: int) -> None:
        """Gives a fetch up. Its memory stays until no call can write to it."""
        fetch = self._fetches.pop(fetch_id)
        with self._lock:
            fetch.is_dropped = True
            is_reading = fetch.held is not None and fetch.n_good is None
        if not is_reading:
            self._give_back(fetch)

    def take_reports(self) -> dict[int, int]:
        """Returns the fetches that ended since the last call: leading pages that were verified."""
        now = self._clock()
        with self._lock:
            late = [fetch for fetch in self._waiting if fetch.until_s < now or fetch.is_dropped]
            for fetch in late:
                self._waiting.remove(fetch)
                self._end(fetch, 0)
            ended, self._ended = self._ended, []
        return {fetch.fetch_id: fetch.n_good or 0 for fetch in ended if not fetch.is_dropped}

    # From here on threads of the store come, too.

    def _found(self, fetch: _Fetch[P], answer: Answer) -> None:
        with self._lock:
            fetch.n_pages = min(answer.n_leading, self._max_pages)
            if fetch.n_pages == 0 or fetch.is_dropped:
                self._end(fetch, 0)
                return
            self._waiting.append(fetch)
        self._read_what_fits()

    def _read_what_fits(self) -> None:
        while (fetch := self._reserve()) is not None:
            held = self._allocated(fetch.n_pages)
            if self._hold(fetch, held) and held is not None:
                keys = fetch.keys[: fetch.n_pages]
                self._store.submit_read(keys, held.pages, self._on_read(fetch))

    def _reserve(self) -> _Fetch[P] | None:
        """Takes room for the fetch that has waited longest; None if there is not enough."""
        with self._lock:
            while self._waiting and self._waiting[0].n_pages <= self._n_free:
                fetch = self._waiting.popleft()
                if not fetch.is_dropped:
                    self._n_free -= fetch.n_pages
                    return fetch
        return None

    def _allocated(self, n_pages: int) -> P | None:
        try:
            return self._allocate(n_pages)
        except (MemoryError, RuntimeError) as error:  # torch raises the second
            logger.warning("no memory for %d pages: %s", n_pages, error)
            return None

    def _hold(self, fetch: _Fetch[P], held: P | None) -> bool:
        """Gives a fetch its memory; returns whether it is to be read.

        It gives the room back if there is no memory, or if the fetch was dropped meanwhile.
        """
        with self._lock:
            if held is not None and not fetch.is_dropped:
                fetch.held = held
                return True
            self._n_free += fetch.n_pages
            self._end(fetch, 0)
            return False

    def _on_read(self, fetch: _Fetch[P]) -> OnDone:
        return lambda answer: self._read(fetch, answer)

    def _read(self, fetch: _Fetch[P], answer: Answer) -> None:
        with self._lock:
            self._end(fetch, answer.n_leading)
            is_useless = fetch.is_dropped or not fetch.n_good
        if is_useless:
            self._give_back(fetch)

    def _end(self, fetch: _Fetch[P], n_good: int) -> None:
        """Notes the outcome; the caller holds the lock."""
        fetch.n_good = n_good
        self._ended.append(fetch)

    def _give_back(self, fetch: _Fetch[P]) -> None:
        with self._lock:
            if fetch.held is not None:
                fetch.held = None
                self._n_free += fetch.n_pages
        self._read_what_fits()
