"""KvFeed: tells a listener of KV as it is computed, and keeps its pages while it reads them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Protocol

from hicache_core.engine.page_table import PageTable
from hicache_core.engine.request import Request
from hicache_core.engine.runner import EachLayer, nothing
from hicache_core.engine.task import Task
from hicache_core.kv.spec import GroupKind, KVSpec


class Listener(Protocol):
    """Who takes the KV of prompts elsewhere: the prefill side of disaggregation.

    All methods are called on the engine's thread and must neither block nor raise. With several
    ranks, ``holds`` must say the same on all of them at the same step.

    Of a model with groups of layers it also hears of what one needs of them to go on after the
    prompt: the rows of the last window, and the state. The latter, and layers that keep nothing in
    full pages, it hears of when the request ends.
    """

    def wants(self, request: Request) -> bool:
        """Whether it listens to this request; asked when the request starts, and starts over."""
        ...

    def computed(
        self,
        request: Request,
        pages: array[int],
        layer: int,
        start: int,
        stop: int,
        group: int | None = None,
    ) -> None:
        """Rows [start, stop) of a layer are in ``pages``, those from the caches among them.

        For each layer the calls follow each other without gaps, from 0 on; those of a window begin
        with the first page that the last whole page of the prompt needs. A request that starts over
        begins again, in other pages.

        Args:
            request: whose prompt it is.
            pages: ids in the device pool, one for each page of the sequence, in order. The array
                may change after the call, so a listener that keeps it copies it. Of a window, those
                of pages before ``start`` mean nothing; of a state, the one unit.
            layer: index among the layers in memory.
            start: position of the first token; of a state 0.
            stop: position after the last token; of a state 1.
            group: index of the group of layers, whose pool has the pages; None, and not passed, for
                the full pages.
        """
        ...

    def ended(self, request: Request, *, complete: bool) -> None:
        """No more rows come; ``complete``: all rows of the prompt were told.

        With groups of layers, only what ends with its prompt is complete: an answer takes the place
        of the window and of the state.
        """
        ...

    def holds(self, request_id: str) -> bool:
        """Whether pages of the request, of an attempt that has ended, are still read."""
        ...

    def step(self) -> None:
        """Called once a step, before ``holds`` is asked."""
        ...


class KvFeed:
    """Stands between the scheduler and a listener, if there is one. Owner thread only."""

    def __init__(self, spec: KVSpec, page_size: int) -> None:
        """Nobody listens.

        Args:
            spec: of the device pool.
            page_size: tokens of a page.
        """
        self.listener: Listener | None = None
        self._page_size = page_size
        self._groups = spec.groups
        layers = range(spec.num_layers)
        self._without_rows = [layer for layer in layers if not spec.components_in(layer)]
        self._windows: dict[int, int] = {}  # index of the group, by layer
        self._states: list[tuple[int, int]] = []  # index of the group, and layer
        for at, group in enumerate(spec.groups):
            its = [layer for layer in layers if group.spec.components_in(layer)]
            if group.kind is GroupKind.WINDOW:
                self._windows.update(dict.fromkeys(its, at))
            else:
                self._states += [(at, layer) for layer in its]
        self._told: dict[str, int] = {}  # rows that were told of, by request
        self._held: list[tuple[str, PageTable]] = []

    @property
    def is_holding(self) -> bool:
        """Whether pages wait for the listener."""
        return bool(self._held)

    def tables(self) -> Iterable[PageTable]:
        """The pages and units that wait for it."""
        return [table for _, table in self._held]

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
        if self._windows:
            return self._each_window(task, listener, start, stop)
        return lambda layer: listener.computed(request, pages, layer, start, stop)

    def _each_window(self, task: Task, listener: Listener, start: int, stop: int) -> EachLayer:
        """As ``after_layer``, where layers have their rows in the pages of windows."""
        request, pages, units = task.request, task.table.pages, task.table.units
        n_pages = task.n_prompt // self._page_size
        rows = {}
        for at in set(self._windows.values()):
            first = self._groups[at].first_needed(n_pages, self._page_size)
            rows[at] = (units.held_of(at).from_start, max(start, first * self._page_size))

        def tell(layer: int) -> None:
            at = self._windows.get(layer)
            if at is None:
                listener.computed(request, pages, layer, start, stop)
                return
            its_pages, its_start = rows[at]
            if its_start < stop:
                listener.computed(request, its_pages, layer, its_start, stop, at)

        return tell

    def release(self, task: Task) -> None:
        """Gives the pages of a request back, or keeps them while the listener reads them."""
        request, listener = task.request, self.listener
        n_told = self._told.pop(request.request_id, None)
        if listener is not None and n_told is not None:
            complete = n_told == task.n_prompt <= task.n_computed
            if self._groups and complete:
                complete = task.n_computed == task.n_prompt
            if complete:
                self._tell_rest(task, listener)
            listener.ended(request, complete=complete)
            if listener.holds(request.request_id):
                self._held.append((request.request_id, task.table))
                task.table = task.table.another()
                return
        task.table.release()

    def _tell_rest(self, task: Task, listener: Listener) -> None:
        """Tells of what no layer says: of the state, and of layers without full rows."""
        request, table = task.request, task.table
        for layer in self._without_rows:
            listener.computed(request, table.pages, layer, 0, task.n_prompt)
        for at, layer in self._states:
            listener.computed(request, table.units.held_of(at).units, layer, 0, 1, at)

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
