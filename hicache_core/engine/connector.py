"""Connector: what a scheduler has beside it where prefill and decode are on different nodes."""

from __future__ import annotations

from collections.abc import Iterable

from hicache_core.engine.page_table import PageTable
from hicache_core.engine.task import Task


class Connector:
    """Keeps requests that the scheduler does not have now. Owner thread only.

    This one is of a node that does both halves: it keeps none. The prefill half keeps requests that
    are computed and not fetched yet, the decode half those whose KV is on its way here.
    """

    @property
    def n_waiting(self) -> int:
        """Requests that hold no pages here."""
        return 0

    @property
    def n_running(self) -> int:
        """Requests whose pages are in use, by a transfer."""
        return 0

    @property
    def is_busy(self) -> bool:
        """Whether it needs further steps of the engine."""
        return False

    def tables(self) -> Iterable[PageTable]:
        """The pages and units into which a transfer may still write."""
        return ()

    def requests(self) -> Iterable[str]:
        """Ids of the requests that it keeps."""
        return ()

    def takes(self, task: Task) -> bool:
        """Asked once for each new request: True if the connector keeps it and queues it later."""
        del task
        return False

    def step(self) -> None:
        """Called once a step, before anything is computed."""

    def abort(self, request_id: str) -> Task | None:
        """Lets go of a request, if it keeps that one; the scheduler ends what this returns."""
        del request_id
        return None

    def ended(self, task: Task, tokens: tuple[int, ...]) -> None:
        """A request has ended; ``tokens`` are the last ones of its answer."""

    def give_up(self) -> None:
        """Releases all requests and pages after a failure; no client is told."""

    def close(self) -> None:
        """Ends the transfers; afterwards none of them reads or writes pages."""
