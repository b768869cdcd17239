"""KvFeed: tells a listener of KV as it is computed, and keeps its pages while it reads them."""

from __future__ import annotations

from array import array
from typing import Protocol

from hicache_core.engine.page_table import PageTable
from hicache_core.engine.request import Request
from hicache_core.engine.runner import EachLayer, nothing
from hicache_core.engine.task import Task


class Listener(Protocol):
    """Who takes the KV of prompts elsewhere: the prefill side of disaggregation.

    All methods are called on the engine's thread and must neither block nor raise. With several
    ranks, ``holds`` must say the same on all of them at the same step.
    """

    def wants(self, request: Request) -> bool:
        """Whether it listens to this request; asked when the request starts, and starts over."""
        ...

    def computed(
        self, request: Request, pages: array[int], layer: int, start: int, stop: int
    ) -> None:
        """Rows [start, stop) of a layer are in ``pages``, those from the caches among them.

        For each layer the calls follow each other without gaps, from 0 on; a request that starts
        over begins at 0 again, in other pages.

        Args:
            request: whose prompt it is.
            pages: ids in the device pool, one for each page of the sequence, in order. The array
                may change after the call, so a listener that keeps it copies it.
            layer: index among the layers in memory.
            start: position of the first token.
            stop: position after the last token.
        """
        ...

    def ended(self, request: Request, *, complete: bool) -> None:
        """No more rows come; ``complete``: all rows of the prompt were told."""
        ...

    def holds(self, request_id: str) -> bool:
        """Whether pages of the request, of an attempt that has ended, are still read."""
        ...

    def step(self) -> None:
        """Called once a step, before ``holds`` is asked."""
        ...


class KvFeed:
    """Stands between the scheduler and a listener, if there is one. Owner thread only."""

    def __init__(self) -> None:
        """Nobody listens."""
        self.listener: Listener | None = None
        self._told: dict[str, int] = {}  # rows that were told of, by request
        self._held: list[tuple[str, PageTable]] = []

    @property
    def is_holding(self) -> bool:
        """Whether pages wait for the listener."""
        return bool(self._held)

    def pages(self) -> set[int]:
        """The pages that wait for it."""
        return set().union(*(table.pages for _, table in self._held))

    def begin(self, task: Task) -> None:
        """A request got its pages."""
        if self.listener is not None and self.listener.wants(task.request):
            self._told[task.request.request_id] = 0
            task.table.is_sent = True

    def after_layer(self, task: Task, stop: int) -> EachLayer:
        """What a forward of a request's rows up to ``stop`` calls at each layer."""
        request, listener = task.request, self.listener
        start = self._told.get(request.request_id)
        if listener is None or start is None or start >= task.n_prompt:
            return nothing
        self._told[request.request_id] = stop = min(stop, task.n_prompt)
        pages = task.table.pages
        return lambda layer: listener.computed(request, pages, layer, start, stop)

    def release(self, task: Task) -> None:
        """Gives the pages of a request back, or keeps them while the listener reads them."""
        request, listener = task.request, self.listener
        n_told = self._told.pop(request.request_id, None)
        if listener is not None and n_told is not None:
            listener.ended(request, complete=n_told == task.n_prompt <= task.n_computed)
            if listener.holds(request.request_id):
                self._held.append((request.request_id, task.table))
                task.table = task.table.another()
                return
        task.table.release()

    def step(self) -> None:
        """Gives back what the listener does not read any more."""
        if self.listener is None:
            return
        self.listener.step()
        held, self._held = self._held, []
        for request_id, table in held:
            if self.listener.holds(request_id):
                self._held.append((request_id, table))
            else:
                table.release()

    def give_up(self) -> None:
        """Gives everything back at once; the listener must have ended."""
        for _, table in self._held:
            table.release()
        self._held.clear()
        self._told.clear()
