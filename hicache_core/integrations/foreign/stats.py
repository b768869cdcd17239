"""What an engine has asked of a store, and what it got."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hicache_core.integrations.foreign.answer import Answer, Kind, OnDone, Request
from hicache_core.observe.snapshot import BackendStatus
from hicache_core.storage.segments import nbytes_of


@dataclass(frozen=True, slots=True)
class CallStats:
    """The answered calls of one kind.

    Attributes:
        n_calls: how many there were.
        n_failed: those of them that the store could not answer for all pages.
        n_pages: pages that they named.
        n_yes: pages that were present, were read and verified, or are stored.
        nbytes: bytes of those pages; 0 for questions.
        elapsed_s: time they took together, in seconds; two calls at once count twice.
    """

    n_calls: int = 0
    n_failed: int = 0
    n_pages: int = 0
    n_yes: int = 0
    nbytes: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Figures of a store since it was opened; made without asking it.

    Attributes:
        exists: questions; ``n_yes`` of ``n_pages`` were hits.
        read: reads.
        write: writes. A store that does not write counts none.
        refused: objects that were damaged, or sealed for another key, by reason.
        n_in_flight: background calls that are not answered.
        n_without_staging: calls refused since calls that hang held all staging memory.
        staging_nbytes: staging memory that running calls hold; None if there is none.
        backends: breaker, latencies and errors of each store, the nearest first.
    """

    exists: CallStats
    read: CallStats
    write: CallStats
    refused: Mapping[str, int] = field(default_factory=dict)
    n_in_flight: int = 0
    n_without_staging: int = 0
    staging_nbytes: int | None = None
    backends: Sequence[BackendStatus] = ()


class Counter:
    """Counts the answers of a store. Threads: any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = dict.fromkeys(Kind, CallStats())

    def counting(self, request: Request, on_done: OnDone) -> OnDone:
        """Returns ``on_done`` that counts the answer first."""

        def counted(answer: Answer) -> None:
            self.add(request, answer)
            on_done(answer)

        return counted

    def add(self, request: Request, answer: Answer) -> None:
        """Counts an answered call."""
        n_yes = sum(answer.mask)
        nbytes = request.nbytes
        if n_yes < len(answer.mask):
            yes = zip(request.pages, answer.mask, strict=False)
            nbytes = sum(nbytes_of(page) for page, good in yes if good)
        with self._lock:
            before = self._sums[request.kind]
            self._sums[request.kind] = CallStats(
                before.n_calls + 1,
                before.n_failed + bool(answer.error),
                before.n_pages + len(answer.mask),
                before.n_yes + n_yes,
                before.nbytes + nbytes,
                before.elapsed_s + answer.elapsed_s,
            )

    def stats(self, kind: Kind) -> CallStats:
        """Returns the counts of one kind."""
        with self._lock:
            return self._sums[kind]
