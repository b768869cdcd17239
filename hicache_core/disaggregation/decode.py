"""DecodeConnector: fetches the KV of prompts from prefill nodes; their requests go on here."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable

from hicache_core.controller.controller import Controller
from hicache_core.disaggregation.first_token import FirstToken
from hicache_core.disaggregation.transfer_counts import TransferCounts
from hicache_core.engine.connector import Connector
from hicache_core.engine.page_table import PageTable
from hicache_core.engine.scheduler import Scheduler
from hicache_core.engine.task import Task
from hicache_core.errors import PoolExhausted, TransferError
from hicache_core.kv.spec import GroupKind
from hicache_core.kv_transfer.base import KvTransferBackend, Notice, TransferState, UnitRows

log = logging.getLogger(__name__)


class DecodeConnector(Connector):
    """Keeps the requests with a room until the KV of their prompt is here. Owner thread only.

    ::

        expected  →  fetching  →  running          (it arrived)
                              ↘  waiting → running (it did not: the prompt is computed here)

    A request whose KV does not come is computed here, like any other; only later.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cache: Controller,
        vocabulary: int,
        transfer: KvTransferBackend,
        timeout_s: float,
        counts: TransferCounts,
    ) -> None:
        """Keeps its arguments.

        Args:
            scheduler: runs the requests.
            cache: of the scheduler.
            vocabulary: number of token ids.
            transfer: is open; ``close`` closes it.
            timeout_s: a prompt whose KV has not come by then is computed here.
            counts: of this node, updated here.
        """
        self._scheduler = scheduler
        self._cache = cache
        self._vocabulary = vocabulary
        self._transfer = transfer
        self._timeout_s = timeout_s
        self._counts = counts
        self._groups = transfer.context.memory.spec.groups
        self._expected: dict[str, Task] = {}
        self._fetching: dict[int, Task] = {}
        self._abandoned: dict[int, PageTable] = {}

    @property
    def n_waiting(self) -> int:
        # docstring inherited
        return len(self._expected)

    @property
    def n_running(self) -> int:
        # docstring inherited; pages into which rows may still come are in use
        return len(self._fetching) + len(self._abandoned)

    @property
    def is_busy(self) -> bool:
        # docstring inherited
        return bool(self._expected or self._fetching or self._abandoned)

    def tables(self) -> Iterable[PageTable]:
        # docstring inherited
        return [*(task.table for task in self._fetching.values()), *self._abandoned.values()]

    def requests(self) -> Iterable[str]:
        # docstring inherited
        return [*self._expected, *(task.request.request_id for task in self._fetching.values())]

    def takes(self, task: Task) -> bool:
        # docstring inherited
        if task.request.bootstrap is None:
            return False
        self._expected[task.request.request_id] = task
        return True

    def abort(self, request_id: str) -> Task | None:
        # docstring inherited
        for room, task in self._fetching.items():
            if task.request.request_id == request_id:
                del self._fetching[room]
                self._transfer.cancel(room, "the client has left")
                self._abandoned[room] = task.table
                task.table = task.table.another()
                return task
        return self._expected.pop(request_id, None)

    def ended(self, task: Task, tokens: tuple[int, ...]) -> None:
        # docstring inherited
        del tokens
        self._expected.pop(task.request.request_id, None)

    def give_up(self) -> None:
        # docstring inherited
        for task in self._fetching.values():
            task.table.release()
        for table in self._abandoned.values():
            table.release()
        self._expected.clear()
        self._fetching.clear()
        self._abandoned.clear()

    def close(self) -> None:
        # docstring inherited
        self._transfer.close()

    def step(self) -> None:
        # docstring inherited
        for notice in self._transfer.poll():
            self._settle(notice)
        for task in sorted(self._expected.values(), key=lambda task: task.order):
            is_full = False
            with self._scheduler.blame.on(task):
                may_start = self._scheduler.may_start(task, len(self._fetching))
                is_full = not may_start or not self._takes_pages(task)
            if is_full:
                return
            if task.request.request_id in self._expected:
                self._fetch(task)

    def _takes_pages(self, task: Task) -> bool:
        """Gives a request pages and units for its whole prompt; False if there are too few.

        ::

            prompt   | on this device already | to be fetched .... tail |
            window                         | to be fetched ...... tail |
        """
        look = self._cache.match_prefix(task.packed(0, task.n_prompt - 1), task.request.namespace)
        match = self._cache.device_part(look)
        task.n_failed_loads = self._cache.n_failed_loads
        self._cache.lock(match.node)
        task.table.begin(match.node, match.device_pages, array("i"))
        try:
            task.table.extend(task.n_prompt)
            task.table.units.expect(task.n_prompt)
        except PoolExhausted:
            task.table.release()
            return False
        return True

    def _fetch(self, task: Task) -> None:
        """Asks for the rows that are not here."""
        bootstrap = task.request.bootstrap
        assert bootstrap is not None
        del self._expected[task.request.request_id]
        address = f"{bootstrap.host}:{bootstrap.port}"
        span = (task.table.n_stored * self._cache.page_size, task.n_prompt)
        room, groups = bootstrap.room, self._group_rows(task)
        try:
            self._transfer.receive(room, [address], task.table.pages, span, self._timeout_s, groups)
        except TransferError as error:
            self._compute_here(task, str(error))
        else:
            self._fetching[room] = task

    def _group_rows(self, task: Task) -> tuple[UnitRows, ...]:
        """What is to be fetched of each group: whole pages of the last window, and the state."""
        rows = []
        for at, group in enumerate(self._groups):
            held, tokens = task.table.units.held_of(at), (0, 1)
            if group.kind is GroupKind.WINDOW:
                tokens = (held.first * self._cache.page_size, task.n_prompt)
            rows.append(UnitRows(held.from_start, tokens))
        return tuple(rows)

    def _settle(self, notice: Notice) -> None:
        abandoned = self._abandoned.pop(notice.room, None)
        if abandoned is not None:
            abandoned.release()
            return
        task = self._fetching.pop(notice.room, None)
        if task is not None:
            with self._scheduler.blame.on(task):
                self._take(task, notice)

    def _take(self, task: Task, notice: Notice) -> None:
        """The transfer of a request has ended and no longer writes into its pages."""
        if notice.state is not TransferState.ARRIVED:
            self._compute_here(task, notice.error)
            return
        try:
            first = FirstToken.unpack(notice.note, task.n_prompt, self._vocabulary)
        except TransferError as error:
            self._compute_here(task, str(error))
            return
        if not self._scheduler.loads.have_arrived(task):
            task.may_load = False
            self._compute_here(task, "what was on this device already did not get there")
            return
        self._counts.received += 1
        self._counts.nbytes += notice.nbytes
        task.cached = first.cached
        self._scheduler.go_on(task, first.token)

    def _compute_here(self, task: Task, error: str) -> None:
        """The rows did not come: queues the request, to compute its prompt here."""
        request_id = task.request.request_id
        log.warning("request %s is computed here: %s", request_id, error)
        self._counts.failed += 1
        self._counts.recomputed += 1
        self._counts.last_error = error
        task.table.release()
        self._scheduler.queue(task)
